"""Files: written whole or not at all, known by their SHA-256, and the kinds that are never read."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from semantica.errors import UserError

# what a folder that we load from may not hold: each of these can execute code when it is read
UNSAFE = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npz", ".h5", ".msgpack", ".py"}
)  # fmt: skip


def refuse_unsafe(*folders: Path) -> None:
    """Raises `UserError` for a file of an unsafe kind directly in one of the folders, each of which need not exist."""
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() in UNSAFE:
                raise UserError(f"{path} is refused: only safetensors and JSON are read from there; remove it")


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a manifest says about files: `{name: {"sha256": ..., "bytes": ...}}`."""
    return {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names}


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    # Windows opens no folders
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside_of(path: Path, what: str = "incomplete") -> Path:
    """Where something is written before it takes its place."""
    return path.with_name(f".{path.name}.{what}")


def remove(path: Path) -> None:
    """A file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def written(
    path: Path,
    existing: Literal["replace", "refuse", "keep"] = "replace",
    apart: bool = False,
    durable: bool = True,
) -> Iterator[Path]:
    """A name to write a file or folder under: what is there at the end is synced and renamed to `path`.

    After any failure what stood at `path` is as it was, and nothing half-written is left; after a crash nothing
    half-written is at `path`.

    Args:
        path: its folder exists. A link is replaced, not followed.
        existing: what becomes of something that stands at `path` at the end: replaced, an error, or kept.
        apart: a name of this process' own, where several may write the same.
        durable: wait until all is on the disk; not worth it for many small files that can be made again.

    Raises:
        UserError: no space is left, or the place is taken and `existing` is "refuse".
        OSError: anything else that the system refuses.
    """
    aside = aside_of(path, f"{os.getpid()}.incomplete" if apart else "incomplete")
    try:
        remove(aside)
        yield aside
        if durable:
            for part in (*sorted(aside.rglob("*")), aside) if aside.is_dir() else (aside,):
                if not part.is_symlink():
                    sync(part)
        if not os.path.lexists(path) or existing == "replace":
            move_in(aside, path)
        elif existing == "refuse":
            raise UserError(f"{path} exists by now: choose another name")
    except Exception as error:
        # safetensors has errors of its own
        if problem := full(path, error):
            raise problem from error
        raise
    finally:
        remove(aside)


def move_in(aside: Path, path: Path) -> None:
    """Rename what is finished to its place; a folder that stood there is gone only after that."""
    if aside.is_dir() and (path.is_dir() or path.is_symlink()):
        old = aside_of(path, "old")
        remove(old)
        path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            old.rename(path)
            raise
        remove(old)
    else:
        aside.replace(path)
    sync(path.parent)


def full(path: Path, error: BaseException, intact: str = "what was there before is") -> UserError | None:
    """The error of a full disk as one line; None for any other."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return UserError(f"no space left to write {path}: free some; {intact} intact")
    return None


def write_bytes(path: Path, content: bytes, apart: bool = False) -> None:
    """As `written`."""
    with written(path, apart=apart) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str, apart: bool = False) -> None:
    """UTF-8, as `written`."""
    write_bytes(path, text.encode(), apart)


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Indented by one, as `written`; with `sort_keys` equal values are equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=sort_keys))


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing, no JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__}): restore or remake it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    return content
