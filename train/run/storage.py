"""torch.distributed.checkpoint in safetensors: its planner decides who writes what, and no file holds a pickle.

A key `NAME/KEY` is the tensor KEY of `NAME.safetensors`; where several processes hold parts of NAME, each writes
`NAME.00001-of-00002.safetensors` with the places of its parts in the header, in the form that PyTorch's own
`HuggingFaceStorageReader` knows. That one cannot read a whole checkpoint, since it takes equal keys of two files for
one tensor; and headers of PyTorch's writer are not the same bytes twice, so equal checkpoints would differ in hashes.
"""

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from semantica.files import sha256, sync

PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class Damaged(Exception):
    """A checkpoint that is not what was written; the one before may be."""


class Writer(StorageWriter):
    """Writes the parts that each process holds, synced and hashed, into a folder that all processes share.

    Args:
        folder: made by the first process; not there before.
        finish: called on the first process with the SHA-256 of every file once all of them are written.
    """

    def __init__(self, folder: Path, finish: Callable[[dict[str, str]], None]):
        self.folder, self.done = folder, finish

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # where a tensor has fewer rows than there are processes, some hold nothing of it
        return dataclasses.replace(plan, items=[i for i in plan.items if i.tensor_data.chunk.sizes.numel()])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.folder.mkdir(parents=True)
        holders = defaultdict(list)
        for rank, plan in enumerate(plans):
            for file in sorted({split(item.index.fqn)[0] for item in plan.items}):
                holders[file].append(rank)

        def name(file: str, rank: int) -> str:
            ranks = holders[file]
            part = f".{ranks.index(rank) + 1:05d}-of-{len(ranks):05d}" if len(ranks) > 1 else ""
            return f"{file}{part}.safetensors"

        names = [{file: name(file, rank) for file in holders if rank in holders[file]} for rank in range(len(plans))]
        return [dataclasses.replace(plan, storage_data=own) for plan, own in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items: dict[str, list[WriteItem]] = defaultdict(list)
        for item in plan.items:
            items[plan.storage_data[split(item.index.fqn)[0]]].append(item)
        results = []
        for name, parts in items.items():
            tensors = {split(item.index.fqn)[1]: planner.resolve_data(item).contiguous() for item in parts}
            places = {split(item.index.fqn)[1]: {OFFSETS: list(item.tensor_data.chunk.offsets)} for item in parts}
            path = self.folder / name
            save_file(tensors, path, metadata=None if "-of-" not in name else {PLACES: json.dumps(places)})
            sync(path)
            digest = sha256(path)
            results += [WriteResult(i.index, i.tensor_data.chunk.sizes.numel(), (name, digest)) for i in parts]
        return finished(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.done(dict(sorted({result.storage_data for rank in results for result in rank})))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class Reader(StorageReader):
    """Reads what any number of processes wrote; only the bytes that this process needs.

    Args:
        folder: whose files were checked, see `semantica.train.run.checkpoint.verify`.
        names: of the safetensors files.

    Raises:
        Damaged: a header cannot be read.
    """

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self.metadata, self.files = headers(folder, names)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reads: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            reads[self.files[item.storage_index]].append(item)
        for name, items in reads.items():
            with safe_open(self.folder / name, "pt") as file:
                for item in items:
                    place = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths))
                    key = split(item.storage_index.fqn)[1]
                    # a scalar has no slices
                    value = file.get_slice(key)[place] if place else file.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(value)
                    planner.commit_tensor(item, target)
        return finished(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def headers(folder: Path, names: list[str]) -> tuple[Metadata, dict[MetadataIndex, str]]:
    """What the files hold, and which file holds which part."""
    chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    dtypes, files = {}, {}
    try:
        for name in names:
            with safe_open(folder / name, "pt") as file:
                places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    fqn, shape = f"{name.split('.')[0]}/{key}", part.get_shape()
                    offsets = torch.Size(places[key][OFFSETS] if places else [0] * len(shape))
                    chunks[fqn].append(ChunkStorageMetadata(offsets, torch.Size(shape)))
                    dtypes[fqn] = DTYPES[part.get_dtype()]
                    files[MetadataIndex(fqn, offsets)] = name
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{name}: {type(error).__name__}") from error
    tensors = {fqn: TensorStorageMetadata(TensorProperties(dtypes[fqn]), whole(c), c) for fqn, c in chunks.items()}
    return Metadata(tensors), files


def whole(chunks: list[ChunkStorageMetadata]) -> torch.Size:
    """The size of the tensor that these are parts of."""
    ends = ([o + n for o, n in zip(chunk.offsets, chunk.sizes)] for chunk in chunks)
    return torch.Size(max(column) for column in zip(*ends))


def split(fqn: str) -> tuple[str, str]:
    """The file and the key in it."""
    file, _, key = fqn.partition("/")
    return file, key


def finished(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
