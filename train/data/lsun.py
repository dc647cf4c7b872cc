"""LSUN as it is distributed: a database of LMDB for each category, read without unpacking it.

Yu et al., arXiv 1506.03365; as github.com/fyu/lsun (data.py) and torchvision's `LSUN` read it:

    LSUN/bedroom_train_lmdb/data.mdb, LSUN/church_outdoor_val_lmdb/data.mdb     LSUN/cat/data.mdb of the objects

An entry's key is the picture's name, 40 hexadecimal digits, and its value the picture's file (WebP or JPEG). They are
read by the package `lmdb`, as everywhere in the field: the bedrooms alone would be three million small files. Pictures
that `data.py export --flat` wrote into one folder for each category are a plain folder of label folders.
"""

import functools
import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from semantica.errors import UserError, first_line
from semantica.images import BadImage, load_image, load_pixels
from semantica.train.data.folders import MODES, FolderData, grouped, refuse_thresholds
from semantica.train.data.source import MARK, Source, Stamp

if TYPE_CHECKING:
    from semantica.train.data.tokens import Table

FILE = "data.mdb"
ENDING = re.compile(r"(_(train|val|test))?_lmdb$")


@dataclass(frozen=True)
class LsunData(FolderData):
    """What `open_lsun` found; paths are "FOLDER OF A DATABASE/KEY". Pictures are looked at when they are read."""

    kind: ClassVar[str] = "lsun"

    def blob(self, ref: str) -> bytes:
        """The picture's file. Raises `BadImage`."""
        import lmdb

        folder, _, key = ref.partition("/")
        try:
            with opened(str(self.root / folder), os.getpid()).begin() as entries:
                found = entries.get(key.encode())
        except lmdb.Error as error:
            raise BadImage(f"its database is broken: {first_line(error)}", ref) from error
        if found is None:
            raise BadImage("not in its database any more", ref)
        return found

    def load(self, ref: str, near: int | None) -> Image.Image:
        return load_image(Named(self.blob(ref), ref), near=near)

    def pixels(self, ref: str, near: int) -> np.ndarray:
        return load_pixels(Named(self.blob(ref), ref), near=near)

    def picture_bytes(self) -> int:
        folders = {ref.partition("/")[0] for ref in self.sizes}
        return sum((self.root / folder / FILE).stat().st_size for folder in folders)

    def stamp(self, ref: str) -> Stamp:
        try:
            content = self.blob(ref)
        except BadImage:
            return Stamp(bytes(MARK))
        return Stamp(hashlib.sha256(content).digest()[:MARK], len(content))

    def unchanged(self, refs: Sequence[str], table: "Table", rows: Sequence[int]) -> np.ndarray:
        return Source.unchanged(self, refs, table, rows)


class Named(io.BytesIO):
    """Bytes that messages can name."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


# an environment of LMDB must not be used in a forked process
@functools.cache
def opened(folder: str, process: int) -> Any:
    """A database, open in a process. Raises `UserError` where it is none, or without the package."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"{folder!r} is a database of LMDB: install semantica-diffusion[lsun]") from error
    try:
        return lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise UserError(f"{folder!r} cannot be opened by LMDB ({first_line(error)}): download it again") from error


def databases(root: str) -> list[Path]:
    """Folders of databases: that one, those in a folder, or those whose path matches a pattern, such as
    LSUN/*_val_lmdb."""
    path = Path(root)
    if (path / FILE).is_file():
        return [path]
    pattern = re.search(r"[*?\[]", path.name) is not None
    if not (path.parent if pattern else path).is_dir():
        return []
    found = path.parent.glob(path.name) if pattern else (Path(e.path) for e in os.scandir(path) if e.is_dir())
    return sorted(place for place in found if (place / FILE).is_file())


def is_lsun(root: str) -> bool:
    return bool(databases(root))


def open_lsun(root: str, mode: str, low: float | None, high: float | None) -> LsunData:
    """Labels are categories, such as "church_outdoor". Keys alone are read, no picture.

    Raises:
        UserError: two databases of one category; one that cannot be opened or holds something else; as `scan` for modes
            and categories of too few pictures.
    """
    refuse_thresholds(root, low, high)
    if mode not in MODES:
        raise UserError(f"unknown data mode {mode!r}: choose one of {', '.join(MODES)}")
    found: dict[str, Path] = {}
    for place in databases(root):
        label = ENDING.sub("", place.name)
        if label in found:
            pattern = str(place.parent / f"*{place.name[len(label) :]}")
            raise UserError(f"{root!r} holds {found[label].name} and {place.name}: give one part, such as {pattern!r}")
        found[label] = place
    groups = {label: keys(place) for label, place in found.items()}
    sizes = dict.fromkeys((ref for refs in groups.values() for ref in refs), 0)
    names = {label: (label.replace("_", " "),) for label in groups}
    return grouped(LsunData(place.parent, mode, groups, sizes, names=names))


def keys(place: Path) -> tuple[str, ...]:
    """References of the pictures in a database, in its order. Raises `UserError` for keys that are no names."""
    with opened(str(place), os.getpid()).begin() as entries:
        found = list(entries.cursor().iternext(values=False))
    if not all(key.isalnum() for key in found):
        raise UserError(f"{str(place)!r} has keys that are no names of pictures: it is no part of LSUN")
    return tuple(f"{place.name}/{key.decode()}" for key in found)
