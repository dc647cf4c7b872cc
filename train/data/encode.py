"""A frozen encoder over all pictures of some data, once: the tokens that training reads (`train.data.tokens`).

Each file of tokens is a unit of work: written aside, renamed, then described by a small record. A run that was killed
loses the unit it was at, and makes the same bytes of it again: every batch has the same pictures and the same shape,
whatever was done before, and the arithmetic (device, precision, compiled or not) is part of the identity.
"""

import functools
import shutil
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from semantica.device import pick_device, pick_precision
from semantica.errors import UserError
from semantica.files import read_json, remove, sha256, write_json, written
from semantica.images import to_tensor
from semantica.lock import locked
from semantica.model.compile import compile_in_place
from semantica.model.encoders import frozen_encoder, own_folder, weights_sha256
from semantica.model.image_encoder import preparation_of, sight_of
from semantica.train.data.config import TokensConfig
from semantica.train.data.open import open_data
from semantica.train.data.source import Source
from semantica.train.data.tokencost import measure, report
from semantica.train.data.tokenfile import BATCH, Encode, Unit, finished, write_unit
from semantica.train.data.tokens import FORMAT, VIEWS, origin
from semantica.train.data.workers import processors

# bytes of tokens in one file, where the data has no files of its own
FILE = 256 << 20


def store_tokens(config: TokensConfig) -> None:
    """`semantica pairs --tokens`: store the tokens of all pictures, or go on with it.

    Raises:
        UserError: the data or the encoder cannot be read; the folder holds something else, or tokens of another
            encoder, or another run writes into it; a token is beyond fp16; the disk is full.
    """
    config.check()
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
        "format": FORMAT,
        "data": data.kind,
        "view": "centre and its mirror image",
        "shape": list(shape),
        "encoder": described(encoder, config),
        "arithmetic": {**arithmetic, "batch": BATCH},
    }
    with ExitStack() as held:
        begin(out, identity, encoder, held)
        for name, reason in data.bad:
            tqdm.write(f"left out, {name}: {reason}")
        todo = units(data, picture_bytes(shape))
        left = [unit for unit in todo if not finished(out, unit, data)]
        total = sum(len(unit.refs) for unit in todo)
        room_for(out, sum(len(unit.refs) for unit in left) * picture_bytes(shape))
        if left:
            (out / "index.json").unlink(missing_ok=True)
        workers = config.processes if config.processes is not None else max(1, min(8, processors() // 2))
        with tqdm(total=total, initial=total - sum(len(u.refs) for u in left), desc="tokens", unit="picture") as bar:
            for unit in left:
                write_unit(out, unit, data, encode, shape, sight_of(encoder), workers, bar.update)
        records = [read_json(out / f"{unit.name}.json") for unit in todo]
        sweep(out, todo)
        write_json(out / "index.json", {"format": FORMAT, "identity": identity, "files": records}, sort_keys=True)
        write_json(out / "stats.json", measure(out, data, encoder, encode), sort_keys=True)
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


def described(encoder: nn.Module, config: TokensConfig) -> dict:
    """The encoder's identity: where it came from, its weights, and what it sees and gives."""
    own = own_folder(config.encoder) is not None
    # what no --encoder-size means for this encoder
    default = encoder.image_size if own else encoder.default_size
    return {
        "source": config.encoder,
        "origin": origin(config.encoder),
        "revision": getattr(encoder.config, "revision", None),
        "weights_sha256": weights_sha256(encoder),
        "image_size": encoder.image_size,
        "default_size": default,
        "tokens": config.encoder_tokens,
    }


def begin(out: Path, identity: dict, encoder: nn.Module, held: ExitStack) -> None:
    """Make the folder, or see that it holds tokens of the same identity; held: keeps others out of it."""
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
        if (saved := out / "encoder" / "config.json").is_file():
            then, now = preparation_of(read_json(saved)), preparation_of(encoder.config)
            if then != now:
                raise UserError(
                    f"{out} holds tokens of pictures that were prepared with {brief(then)}, not {brief(now)}: choose "
                    "another --out, or remove that folder"
                )
    elif out.exists() and (not out.is_dir() or any(p.name != "encoder" and p.name[0] != "." for p in out.iterdir())):
        raise UserError(f"{out} exists and holds no stored tokens: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = f"another run stores tokens in {out}: wait for it, or choose another --out"
        held.enter_context(locked(out / ".lock", taken))
        for stale in out.glob(".*.incomplete"):
            remove(stale)
        if recorded is None or hashes(out / "encoder") != recorded:
            with written(out / "encoder") as aside:
                encoder.save_pretrained(aside, safe_serialization=True)
        identity["encoder"]["files"] = hashes(out / "encoder")
        write_json(path, identity, sort_keys=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from error


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob("*"))}


def brief(value) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items() if k != "files") if isinstance(value, dict) else repr(value)


def units(data: Source, each: int) -> list[Unit]:
    """The files to make: one per file of the data; where it has none, pictures in order up to 256 MiB of tokens."""
    parts = data.parts()
    if parts is not None:
        return [Unit(name, tuple(refs)) for name, refs in parts.items()]
    refs, size = data.refs(), max(1, FILE // each)
    return [Unit(f"part-{i // size:05d}", tuple(refs[i : i + size])) for i in range(0, len(refs), size)]


def sweep(out: Path, todo: list[Unit]) -> None:
    """Remove what belongs to pictures that are no longer there."""
    kept = {unit.name for unit in todo}
    for table in out.glob("*.table.safetensors"):
        name = table.name.split(".")[0]
        for path in out.glob(f"{name}.*") if name not in kept else ():
            path.unlink()


def room_for(out: Path, size: int) -> None:
    free = shutil.disk_usage(out).free
    if size > free:
        raise UserError(
            f"the tokens take {size / 1e9:.1f} GB more and {out} has room for {free / 1e9:.1f} GB: choose another "
            "--out, a smaller --encoder-size or a smaller encoder"
        )
