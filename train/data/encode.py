"""A frozen encoder over all pictures of some data, once: the tokens that training reads (`train.data.tokens`).

Each file of tokens is a unit of work: written aside, renamed, then described by a small record. A run that was killed
loses the unit it was at, and makes the same bytes of it again: every batch has the same pictures and the same shape,
whatever was done before, and the arithmetic (device, precision, compiled or not) is part of the identity.
"""

import errno
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from semantica.device import pick_device, pick_precision
from semantica.errors import UserError
from semantica.files import read_json
from semantica.images import BadImage, fit, load_image, to_tensor
from semantica.model.encoders import frozen_encoder, own_folder, weights_sha256
from semantica.train.data.folders import PairData
from semantica.train.data.pairs import _start_worker, open_data
from semantica.train.data.shards import ShardData
from semantica.train.data.tokencost import measure, report
from semantica.train.data.tokens import FORMAT, MARK, VIEWS, Table, mark, origin, unchanged
from semantica.train.objective import compile_in_place
from semantica.train.pages.config import PairsConfig
from semantica.train.run.checkpoint import sha256, write_aside

# pictures per call of the encoder, each in both views
BATCH = 32
# bytes of tokens in one file, for pictures in folders; shards have one file each
FILE = 256 << 20
FP16_MAX = float(torch.finfo(torch.float16).max)

# uint8 pictures [BATCH, S, S, 3] -> tokens [BATCH, 2, M, C], pooled [BATCH, 2, C], float32 on the host
Encode = Callable[[np.ndarray], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Unit:
    """One file of tokens: its name and the pictures that it belongs to, as the data refers to them."""

    name: str
    refs: tuple[str | int, ...]


class Pictures(Dataset):
    """Picture `i`: its centre view uint8 `[S, S, 3]` or None, why not, first half of its SHA-256, size, mtime."""

    def __init__(self, data: PairData | ShardData, refs: tuple[str | int, ...], side: int):
        self.data, self.refs, self.side = data, refs, side

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, i: int) -> tuple[np.ndarray | None, str, bytes, int, int]:
        ref, digest, size, mtime = self.refs[i], bytes(MARK), 0, 0
        try:
            if isinstance(self.data, ShardData):
                digest = self.data.sha[ref].tobytes()
                image = self.data.load(ref, self.side)
            else:
                path = self.data.root / ref
                mtime = path.stat().st_mtime_ns
                content = path.read_bytes()
                size, digest = len(content), hashlib.sha256(content).digest()[:MARK]
                image = load_image(io.BytesIO(content), near=self.side)
        except (BadImage, OSError) as error:
            reason = error.reason if isinstance(error, BadImage) else f"cannot be read: {error.strerror}"
            return None, reason, digest, size, mtime
        return fit(image, self.side), "", digest, size, mtime


def store_tokens(config: PairsConfig) -> None:
    """`semantica pairs --tokens`: store the tokens of all pictures, or go on with it.

    Raises:
        UserError: the data or the encoder cannot be read; the folder holds something else, or tokens of another
            encoder; a token is beyond fp16; the disk is full.
    """
    device = pick_device(config.device)
    data = open_data(config.tokens, "reconstruct")
    out = config.out or Path(config.tokens.rstrip("/") + ".tokens")
    encoder = frozen_encoder(config.encoder, config.encoder_size, config.encoder_tokens).to(device)
    dtype = pick_precision(config.precision, device)
    encode = encoding(encoder, device, dtype, config.compile)
    # the shapes of what comes out, and a first call that is not timed
    tokens, pooled = encode(np.zeros((BATCH, encoder.image_size, encoder.image_size, 3), np.uint8))
    shape = tokens.shape[2:]
    if pooled.shape[-1] != shape[1]:
        raise UserError(f"encoder {config.encoder!r} pools to another width than its tokens have: it cannot be stored")
    arithmetic = {"device": device.type, "precision": str(dtype).removeprefix("torch."), "compile": config.compile}
    identity = {
        "format": FORMAT, "data": data.kind, "view": "centre and its mirror image", "shape": list(shape),
        "encoder": described(encoder, config), "arithmetic": {**arithmetic, "batch": BATCH},
    }  # fmt: skip
    begin(out, identity, encoder)
    for name, reason in data.bad:
        tqdm.write(f"left out, {name}: {reason}")
    todo = units(data, picture_bytes(shape))
    left = [unit for unit in todo if not finished(out, unit, data)]
    total = sum(len(unit.refs) for unit in todo)
    room_for(out, sum(len(unit.refs) for unit in left) * picture_bytes(shape))
    if left:
        (out / "index.json").unlink(missing_ok=True)
    workers = config.processes if config.processes is not None else max(1, min(8, (os.cpu_count() or 2) // 2))
    with tqdm(total=total, initial=total - sum(len(u.refs) for u in left), desc="tokens", unit="picture") as bar:
        for unit in left:
            write_unit(out, unit, data, encode, shape, encoder.image_size, workers, bar.update)
    records = [read_json(out / f"{unit.name}.json") for unit in todo]
    sweep(out, todo)
    write_json(out / "index.json", {"format": FORMAT, "identity": identity, "files": records})
    write_json(out / "stats.json", measure(out, data, encoder, encode))
    report(out)


def picture_bytes(shape: tuple[int, int]) -> int:
    """Bytes of both views of a picture: M tokens and the pooled vector."""
    return VIEWS * (shape[0] + 1) * shape[1] * 2


def encoding(encoder: nn.Module, device: torch.device, dtype: torch.dtype, compiled: bool) -> Encode:
    """The encoder as it runs in the pass: no gradients, autocast where the precision is lower, compiled per block."""
    if compiled:
        compile_in_place(encoder)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext

    @torch.no_grad()
    def encode(pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        images = to_tensor(pictures).to(device, non_blocking=True)
        # the mirror image of a picture's view is its view's mirror image, pixel by pixel
        both = torch.stack([images, images.flip(-1)], 1).flatten(0, 1)
        with autocast():
            stream = encoder(both)
        return tuple(a.float().cpu().unflatten(0, (len(images), VIEWS)) for a in (stream.tokens, stream.pooled))

    return encode


def described(encoder: nn.Module, config: PairsConfig) -> dict:
    """The encoder's identity: where it came from, its weights, and what it sees and gives."""
    vision = getattr(encoder.config, "vision", None) or {}
    own = own_folder(config.encoder) is not None
    # what no --encoder-size means for this encoder
    default = 224 if vision.get("model_type", "").startswith("dinov2") and not own else encoder.image_size
    return {
        "source": config.encoder,
        "origin": origin(config.encoder),
        "revision": getattr(encoder.config, "revision", None),
        "weights_sha256": weights_sha256(encoder),
        "image_size": encoder.image_size,
        "default_size": default,
        "tokens": config.encoder_tokens,
    }


def begin(out: Path, identity: dict, encoder: nn.Module) -> None:
    """Make the folder, or see that it holds tokens of the same identity."""
    path, recorded = out / "identity.json", None
    if path.exists():
        before = read_json(path)
        made = before.get("encoder", {})
        recorded = made.pop("files", None)
        if made.get("origin") == identity["encoder"]["origin"]:
            # the same weights by another path
            identity["encoder"]["source"] = made.get("source")
        if before != identity:
            changed = [k for k in ("encoder", "arithmetic", "data", "format") if before.get(k) != identity[k]]
            name = (changed or ["shape"])[0]
            raise UserError(
                f"{out} holds tokens with {name} {brief(before.get(name))}, not {brief(identity.get(name))}: choose "
                "another --out, or remove that folder"
            )
    elif out.exists() and (not out.is_dir() or any(p.name != "encoder" and p.name[0] != "." for p in out.iterdir())):
        raise UserError(f"{out} exists and holds no stored tokens: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in out.glob(".*.incomplete"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        if recorded is None or hashes(out / "encoder") != recorded:
            write_aside(out / "encoder", lambda folder: encoder.save_pretrained(folder, safe_serialization=True))
        identity["encoder"]["files"] = hashes(out / "encoder")
        write_json(path, identity)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from error


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob("*"))}


def brief(value) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items() if k != "files") if isinstance(value, dict) else repr(value)


def units(data: PairData | ShardData, each: int) -> list[Unit]:
    """The files to make: one per shard; for folders, pictures in natural order up to 256 MiB of tokens."""
    if isinstance(data, ShardData):
        counts = np.bincount(data.shard, data.count, len(data.name)).astype(int)
        spans = zip(data.name, counts.tolist(), np.cumsum(counts).tolist())
        return [Unit(name, tuple(range(end - n, end))) for name, n, end in spans]
    paths = [path for group in data.groups.values() for path in group]
    size = max(1, FILE // each)
    return [Unit(f"part-{i // size:05d}", tuple(paths[i : i + size])) for i in range(0, len(paths), size)]


def finished(out: Path, unit: Unit, data: PairData | ShardData) -> bool:
    """Whether the tokens of a unit are there, whole by size and of its pictures as they are now."""
    try:
        record = json.loads((out / f"{unit.name}.json").read_text())
        content = (out / f"{unit.name}.table.safetensors").read_bytes()
        if (out / f"{unit.name}.safetensors").stat().st_size != record["bytes"]:
            return False
        if hashlib.sha256(content).hexdigest() != record["table_sha256"]:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    table = Table(**load(content))
    if isinstance(data, ShardData):
        return np.array_equal(table.picture, data.sha[list(unit.refs)])
    return table.paths() == list(unit.refs) and all(
        unchanged(data.root / path, int(size), int(mtime), digest.tobytes())
        for path, size, mtime, digest in zip(unit.refs, table.size, table.mtime, table.picture, strict=True)
    )


def loaded(data: PairData | ShardData, refs: tuple, side: int, workers: int) -> Iterator[list[tuple]]:
    """The pictures in batches, decoded by other processes."""
    loader = DataLoader(
        Pictures(data, refs, side), batch_size=BATCH, num_workers=workers if len(refs) > BATCH else 0,
        collate_fn=list, generator=torch.Generator(), worker_init_fn=_start_worker,
    )  # fmt: skip
    return iter(loader)


def write_unit(
    out: Path,
    unit: Unit,
    data: PairData | ShardData,
    encode: Encode,
    shape: tuple[int, int],
    side: int,
    workers: int,
    done: Callable[[int], object],
) -> None:
    """Encode the pictures of a unit, write its tokens and its table aside, rename them; its record comes last."""
    count = len(unit.refs)
    asides = [out / f".{unit.name}.{kind}.incomplete" for kind in ("tokens", "table")]
    rows = {name: [] for name in ("row", "pooled", "picture", "usable", "size", "mtime")}
    try:
        with open(asides[0], "wb") as file:
            digest = hashlib.sha256()

            def put(content: bytes | np.ndarray) -> None:
                digest.update(content)
                file.write(content)

            put(header(count, shape))
            place = 0
            for batch in loaded(data, unit.refs, side, workers):
                views = np.zeros((BATCH, side, side, 3), np.uint8)
                for i, (view, *_) in enumerate(batch):
                    views[i] = 0 if view is None else view
                tokens, pooled = (a[: len(batch)] for a in encode(views))
                for i, (view, reason, picture, size, mtime) in enumerate(batch):
                    name = data.name_of(unit.refs[place + i])
                    if view is None:
                        tqdm.write(f"bad picture {name}: {reason}")
                        tokens[i], pooled[i] = 0, 0
                    check_range(name, tokens[i], pooled[i])
                    half, vector = tokens[i].half().numpy(), pooled[i].half().numpy()
                    marks = [np.frombuffer(mark(*of_view), np.uint8) for of_view in zip(half, vector)]
                    known = np.stack(marks), vector, np.frombuffer(picture, np.uint8), view is not None, size, mtime
                    for key, value in zip(rows, known, strict=True):
                        rows[key].append(value)
                    put(half)
                place += len(batch)
                done(len(batch))
            put(np.stack(rows["pooled"]))
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        table = save(tables(rows, unit, isinstance(data, PairData)))
        with open(asides[1], "wb") as file:
            file.write(table)
            file.flush()
            os.fsync(file.fileno())
        asides[1].replace(out / f"{unit.name}.table.safetensors")
        asides[0].replace(out / f"{unit.name}.safetensors")
        record = {
            "name": unit.name, "pictures": count, "unusable": count - sum(rows["usable"]), "bytes": size,
            "sha256": digest.hexdigest(), "table_sha256": hashlib.sha256(table).hexdigest(),
        }  # fmt: skip
        write_json(out / f"{unit.name}.json", record)
    except OSError as error:
        for aside in asides:
            with suppress(OSError):
                aside.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to write {out}: free some and give the same command again") from error
        raise


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


def tables(rows: dict[str, list], unit: Unit, folders: bool) -> dict[str, np.ndarray]:
    """The arrays of a `Table`."""
    table = {
        "picture": np.stack(rows["picture"]), "row": np.stack(rows["row"]), "usable": np.array(rows["usable"], np.uint8)
    }  # fmt: skip
    if folders:
        names = "\0".join(unit.refs).encode("utf-8", "surrogateescape")
        table |= {name: np.array(rows[name], np.int64) for name in ("size", "mtime")}
        table["names"] = np.frombuffer(names, np.uint8)
    return table


def sweep(out: Path, todo: list[Unit]) -> None:
    """Remove what belongs to pictures that are no longer there."""
    kept = {unit.name for unit in todo}
    for path in out.glob("part-*" if todo[0].name.startswith("part-") else "pages-*"):
        if path.name.split(".")[0] not in kept:
            path.unlink()


def room_for(out: Path, size: int) -> None:
    free = shutil.disk_usage(out).free
    if size > free:
        raise UserError(
            f"the tokens take {size / 1e9:.1f} GB more and {out} has room for {free / 1e9:.1f} GB: choose another "
            "--out, a smaller --encoder-size or a smaller encoder"
        )


def write_json(path: Path, content: dict) -> None:
    aside = path.with_name(f".{path.name}.incomplete")
    with open(aside, "w") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
