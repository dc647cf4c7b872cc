"""Checkpoints: safetensors and JSON in a folder that is written aside, synced, then renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from semantica.errors import UserError
from semantica.train.config import FORMAT

PREFIX = "step-"
UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Damaged(Exception):
    """A checkpoint that is not what was written; the one before may be."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folders(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_aside(final: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder next to its final place, then rename it there; nothing half-written is ever at `final`.

    Raises:
        UserError: the disk is full; what stood at `final` is intact.
    """
    aside = final.with_name(f".{final.name}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        fill(aside)
        for path in sorted(aside.rglob("*")):
            sync(path)
        if final.exists():
            old = final.with_name(f".{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            aside.rename(final)
            shutil.rmtree(old)
        else:
            aside.rename(final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:
            raise UserError(f"no space left to write {final}: free some; earlier checkpoints are intact") from error
        raise


def save(root: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, keep: int) -> Path:
    """Write `step-XXXXXXXX/` with one safetensors file per entry of `tensors` and `state.json`, drop the oldest."""
    final = root / f"{PREFIX}{step:08d}"

    def fill(folder: Path) -> None:
        hashes = {}
        for name, content in tensors.items():
            path = folder / f"{name}.safetensors"
            save_file({key: value.detach().contiguous().cpu() for key, value in content.items()}, path)
            hashes[path.name] = sha256(path)
        record = {"format": FORMAT, "step": step, **state, "sha256": hashes}
        (folder / "state.json").write_text(json.dumps(record, indent=1))

    write_aside(final, fill)
    for old in folders(root)[:-keep]:
        shutil.rmtree(old)
    return final


def load(folder: Path, names: set[str], device: torch.device) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """State and tensors of one checkpoint, every file's hash checked before it is parsed.

    Raises:
        UserError: another format version, or a pickle in the folder.
        Damaged: a file is missing, cut short or altered.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in UNSAFE:
            raise UserError(f"{path} is refused unopened: checkpoints are safetensors and JSON; remove the file")
    try:
        state = json.loads((folder / "state.json").read_text())
        version = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"state.json: {type(error).__name__}") from error
    if version != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {version}: this version reads {FORMAT}; use a matching version"
        )
    tensors = {}
    for name in sorted(names):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise Damaged(f"{path.name} is missing")
        if sha256(path) != state["sha256"].get(path.name):
            raise Damaged(f"{path.name} is not what was written (sha256 differs)")
        tensors[name] = load_file(path, device=str(device))
    return state, tensors


def load_newest(
    root: Path, names: set[str], device: torch.device, say: Callable[[str], None]
) -> tuple[dict, dict[str, dict[str, torch.Tensor]]] | None:
    """The newest checkpoint that is whole; says which ones were not.

    Raises:
        UserError: checkpoints are there and every one is damaged.
    """
    found = folders(root)
    for folder in reversed(found):
        try:
            return load(folder, names, device)
        except Damaged as problem:
            say(f"checkpoint {folder.name} is damaged ({problem}); trying the one before")
    if found:
        raise UserError(f"every checkpoint in {root} is damaged: remove that folder to start again")
    return None
