"""One file of stored tokens: its pictures encoded, its tokens and their table written, its record last."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from semantica.errors import UserError
from semantica.files import write_bytes, write_json, written
from semantica.images import BadImage
from semantica.sight import Sight
from semantica.train.data.draws import Ref
from semantica.train.data.loading import start_worker
from semantica.train.data.source import Source, Stamp
from semantica.train.data.tokens import VIEWS, Table, mark, whole

# pictures per call of the encoder, each in both views
BATCH = 32
FP16_MAX = float(torch.finfo(torch.float16).max)

# uint8 pictures [BATCH, S, S, 3] -> tokens [BATCH, 2, M, C], pooled [BATCH, 2, C], float32 on the host
Encode = Callable[[np.ndarray], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Unit:
    """One file of tokens: its name and the pictures that it belongs to, as the data refers to them."""

    name: str
    refs: tuple[Ref, ...]


@dataclass(frozen=True)
class Seen:
    """A picture's centre view, uint8 `[S, S, 3]`, or None and why not."""

    view: np.ndarray | None
    reason: str
    stamp: Stamp


class Pictures(Dataset):
    """Some pictures of a source, each as `Seen`."""

    def __init__(self, data: Source, refs: tuple[Ref, ...], sight: Sight):
        self.data, self.refs, self.sight = data, refs, sight

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, i: int) -> Seen:
        # before the picture: a change in between then shows
        stamp = self.data.stamp(self.refs[i])
        try:
            near = 2 * (self.sight.resize or self.sight.size)
            return Seen(self.sight.see(self.data.load(self.refs[i], near)), "", stamp)
        except BadImage as error:
            return Seen(None, error.reason, stamp)


def finished(out: Path, unit: Unit, data: Source) -> bool:
    """Whether the tokens of a unit are there, whole by size and of its pictures as they are now."""
    try:
        record = json.loads((out / f"{unit.name}.json").read_text())
        content = (out / f"{unit.name}.table.safetensors").read_bytes()
        if (out / f"{unit.name}.safetensors").stat().st_size != record["bytes"]:
            return False
        if hashlib.sha256(content).hexdigest() != record["table_sha256"]:
            return False
        return whole(Table(**load(content)), unit.refs, data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def write_unit(
    out: Path,
    unit: Unit,
    data: Source,
    encode: Encode,
    shape: tuple[int, int],
    sight: Sight,
    workers: int,
    done: Callable[[int], object],
) -> None:
    """Write a unit's tokens, their table and, last, its record; the first two count only with that.

    Args:
        shape: M tokens of C values. sight: what the encoder sees of a picture. workers: processes that decode.
        done: told how many pictures were encoded.

    Raises:
        UserError: a token is beyond fp16; the disk is full.
    """
    count = len(unit.refs)
    rows = {name: [] for name in ("row", "pooled", "picture", "usable", "size", "mtime")}
    with written(out / f"{unit.name}.safetensors") as aside:
        with open(aside, "wb") as file:
            digest = hashlib.sha256()

            def put(content: bytes | np.ndarray) -> None:
                digest.update(content)
                file.write(content)

            put(header(count, shape))
            names = map(data.name_of, unit.refs)
            for batch in loaded(data, unit.refs, sight, workers):
                for seen, half, vector in encoded(batch, names, encode, sight.size):
                    marks = [np.frombuffer(mark(*of_view), np.uint8) for of_view in zip(half, vector)]
                    sha, size, mtime = astuple(seen.stamp)
                    known = np.stack(marks), vector, np.frombuffer(sha, np.uint8), seen.view is not None, size, mtime
                    for column, value in zip(rows.values(), known, strict=True):
                        column.append(value)
                    put(half)
                done(len(batch))
            put(np.stack(rows["pooled"]))
            size = file.tell()
        table = save(tables(rows, unit))
        write_bytes(out / f"{unit.name}.table.safetensors", table)
    record = {
        "name": unit.name,
        "pictures": count,
        "unusable": count - sum(rows["usable"]),
        "bytes": size,
        "sha256": digest.hexdigest(),
        "table_sha256": hashlib.sha256(table).hexdigest(),
    }
    write_json(out / f"{unit.name}.json", record, sort_keys=True)


def loaded(data: Source, refs: tuple[Ref, ...], sight: Sight, workers: int) -> Iterator[list[Seen]]:
    """The pictures in batches, decoded by other processes."""
    loader = DataLoader(
        Pictures(data, refs, sight),
        batch_size=BATCH,
        num_workers=workers if len(refs) > BATCH else 0,
        collate_fn=list,
        generator=torch.Generator(),
        worker_init_fn=start_worker,
    )
    return iter(loader)


def encoded(
    batch: list[Seen], names: Iterator[str], encode: Encode, side: int
) -> Iterator[tuple[Seen, np.ndarray, np.ndarray]]:
    """Each picture's tokens fp16 `[2, M, C]` and pooled vectors fp16 `[2, C]`; zeros for one that cannot be used."""
    # always of one size, so that no value depends on what else is encoded
    views = np.zeros((BATCH, side, side, 3), np.uint8)
    for view, seen in zip(views, batch):
        if seen.view is not None:
            view[...] = seen.view
    for seen, tokens, pooled in zip(batch, *encode(views)):
        name = next(names)
        if seen.view is None:
            tqdm.write(f"bad picture {name}: {seen.reason}")
            tokens, pooled = torch.zeros_like(tokens), torch.zeros_like(pooled)
        check_range(name, tokens, pooled)
        yield seen, tokens.half().numpy(), pooled.half().numpy()


def check_range(name: str, tokens: Tensor, pooled: Tensor) -> None:
    """Raises `UserError` where a value would not survive fp16."""
    largest = max(tokens.abs().max().item(), pooled.abs().max().item())
    # not above, so that NaN counts too
    if not largest <= FP16_MAX:
        raise UserError(
            f"a token of picture {name!r} is {largest:.6g}, beyond what fp16 holds ({FP16_MAX:.0f}): train with this "
            "encoder without --tokens"
        )


def header(count: int, shape: tuple[int, int]) -> bytes:
    """The head of a safetensors file of `count` pictures, whose arrays are then written as they come."""
    shapes = {"tokens": (count, VIEWS, *shape), "pooled": (count, VIEWS, shape[1])}
    fields, end = {}, 0
    for name, dims in shapes.items():
        begin, end = end, end + 2 * int(np.prod(dims))
        fields[name] = {"dtype": "F16", "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(fields).encode()
    # the arrays begin on a cache line
    text = text.ljust(len(text) + -(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def tables(rows: dict[str, list], unit: Unit) -> dict[str, np.ndarray]:
    """The arrays of a `Table`; times and names where pictures are referred to by their paths."""
    table = Table(np.stack(rows["picture"]), np.stack(rows["row"]), np.array(rows["usable"], np.uint8))
    named = {}
    if isinstance(unit.refs[0], str):
        names = "\0".join(unit.refs).encode("utf-8", "surrogateescape")
        named = {name: np.array(rows[name], np.int64) for name in ("size", "mtime")}
        named["names"] = np.frombuffer(names, np.uint8)
    return {name: array for name, array in (vars(table) | named).items() if array is not None}
