"""Folders of pictures -> pairs: pictures that share a label folder, or a picture and itself."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image

from semantica.errors import UserError
from semantica.images import BadImage, load_image, load_pixels, probe_image
from semantica.train.data.captions import FILE, Captions, read_captions
from semantica.train.data.draws import PAIR, Pair, View, generator, order
from semantica.train.data.source import MARK, Source, Stamp, around, parted

if TYPE_CHECKING:
    from semantica.train.data.tokens import Table, Tokens

MODES = ("folders", "reconstruct")
SIDE_FILES = {".json", ".jsonl", ".txt", ".tsv", ".csv", ".md"}
# what is wrong with a picture beside the label folders, and what to do where pictures are in no groups
LOOSE = "not in a label folder"
RECONSTRUCT = "train with --mode reconstruct, which needs no pairs"


@dataclass(frozen=True)
class FolderData(Source):
    """What `scan` found.

    root, mode: as given to `scan`.
    groups: label -> paths relative to root, in natural order; "" holds the pictures directly in root.
    sizes: bytes of each picture, by path.
    bad: (path, reason) of each file that cannot be used.
    alone: labels left out because they hold a single picture.
    tokens: what a frozen encoder made of the pictures, where it was stored.
    captions: texts of the pictures, where they were read.
    names: what labels are called, where the data says so; they are texts of pictures that have none of their own.
    """

    root: Path
    mode: str
    groups: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    bad: tuple[tuple[str, str], ...] = ()
    alone: tuple[str, ...] = ()
    tokens: "Tokens | None" = None
    captions: Captions | None = None
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kind: ClassVar[str] = "folders"

    def __len__(self) -> int:
        """The number of pictures, which is the number of samples of an epoch."""
        return int(self.ends[-1]) if self.groups else 0

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.groups)

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum([len(paths) for paths in self.groups.values()])

    def locate(self, number: int) -> tuple[str, int]:
        """The label of the `number`-th picture of all, and its place in that group."""
        group = int(np.searchsorted(self.ends, number, side="right"))
        label = self.labels[group]
        return label, number - int(self.ends[group]) + len(self.groups[label])

    def describe(self) -> str:
        """In words, for the log."""
        stored = ", tokens stored" if self.tokens else ""
        texts = f", {sum(1 for _ in self.captions)} texts" if self.captions else ""
        return f"{len(self)} pictures in {len(self.groups)} groups{stored}{texts}"

    def keep(self, groups: dict[str, tuple[str, ...]]) -> "FolderData":
        """The same folder with only these groups, whose paths are among its own."""
        sizes = {path: self.sizes[path] for paths in groups.values() for path in paths}
        captions = self.captions and self.captions.keep(sizes)
        return replace(self, groups=groups, sizes=sizes, captions=captions, bad=(), alone=())

    def captioned(self) -> "FolderData":
        """With the texts that lie beside the pictures, or else the names of their labels.

        Raises:
            UserError: as `read_captions`, or a label without a name where others have one.
        """
        if not self.names or (self.root / FILE).is_file():
            return replace(self, captions=read_captions(self.root, self.refs()))
        for label in self.groups:
            if not self.names.get(label):
                raise UserError(f"class {label!r} in {str(self.root)!r} has no name: add it to the file of the others")
        texts = {ref: self.names[label] for label, paths in self.groups.items() for ref in paths}
        return replace(self, captions=Captions(texts))

    def digest(self) -> str:
        """16 hex digits over the listing (relative paths and sizes), the stored tokens and the texts, so that a resumed
        run can refuse other data."""
        listing = hashlib.sha256(self.tokens.digest().encode() if self.tokens else b"")
        listing.update(self.captions.digest().encode() if self.captions else b"")
        for path in sorted(self.sizes):
            listing.update(os.fsencode(path) + b"\0%d\0" % self.sizes[path])
        return listing.hexdigest()[:16]

    def split(self, fraction: float, seed: int) -> tuple["FolderData", "FolderData"]:
        """Part the data into (training, held out): whole groups, or single pictures in mode "reconstruct".

        Raises:
            UserError: as `parted`.
        """
        whole = self.mode == "folders"
        units = list(self.groups) if whole else self.refs()
        what, advice = ("label folders", f", or {RECONSTRUCT}") if whole else ("pictures", "")
        _, out = parted(len(units), fraction, seed, what, advice)
        held = {units[i] for i in out}

        def part(out: bool) -> "FolderData":
            if whole:
                return self.keep({label: paths for label, paths in self.groups.items() if (label in held) is out})
            parts = {label: tuple(p for p in paths if (p in held) is out) for label, paths in self.groups.items()}
            return self.keep({label: paths for label, paths in parts.items() if paths})

        return part(False), part(True)

    def draw(self, seed: int, index: int, conditions: int = 1) -> Pair:
        """The pair of global sample `index`: a pure function of its arguments.

        Every picture is the target once per epoch of `len(self)` samples, in an order of that epoch's own. Conditions
        are drawn uniformly from the others of its group, without replacement while there are enough; in mode
        "reconstruct" they are the target, flipped and cropped alike.
        """
        epoch, position = divmod(index, len(self))
        label, place = self.locate(int(order(len(self), seed, epoch)[position]))
        paths = self.groups[label]
        draw = generator(seed, PAIR, index)
        flips, crops = draw.integers(2, size=2).astype(bool).tolist(), draw.random((2, 3)).tolist()
        if self.mode == "reconstruct":
            view = View(paths[place], flips[0], tuple(crops[0]))
            return Pair(label, view, (view,) * conditions)
        others = [(place + 1 + int(draw.integers(len(paths) - 1))) % len(paths)]
        views = [View(paths[others[0]], flips[0], tuple(crops[0]))]
        if conditions > 1:
            rest = [i for i in range(len(paths)) if i not in (place, others[0])]
            others += [rest[i] for i in draw.permutation(len(rest))]
        for number in range(1, conditions):
            flip, crop = bool(draw.integers(2)), tuple(draw.random(3).tolist())
            views.append(View(paths[others[number % len(others)]], flip, crop))
        return Pair(label, View(paths[place], flips[1], tuple(crops[1])), tuple(views))

    def target_candidates(self, group: str, start: str) -> Iterator[str]:
        return around(self.groups[group], start)

    def condition_candidates(self, group: str, target: str, start: str) -> Iterator[str]:
        return (path for path in around(self.groups[group], start) if path != target)

    def load(self, ref: str, near: int | None) -> Image.Image:
        """Raises `BadImage`."""
        return load_image(self.root / ref, near=near)

    def pixels(self, ref: str, near: int) -> np.ndarray:
        """Raises `BadImage`."""
        return load_pixels(self.root / ref, near=near)

    def refs(self) -> list[str]:
        return [path for paths in self.groups.values() for path in paths]

    def picture_bytes(self) -> int:
        return sum(self.sizes.values())

    def stamp(self, ref: str) -> Stamp:
        path, mtime = self.root / ref, 0
        try:
            # before the content: a later change then shows
            mtime = path.stat().st_mtime_ns
            content = path.read_bytes()
        except OSError:
            return Stamp(bytes(MARK), 0, mtime)
        return Stamp(hashlib.sha256(content).digest()[:MARK], len(content), mtime)

    def unchanged(self, refs: Sequence[str], table: "Table", rows: Sequence[int]) -> np.ndarray:
        def same(ref: str, row: int) -> bool:
            try:
                found = (self.root / ref).stat()
            except OSError:
                return False
            # hashed only where its time differs, as in a copy
            return found.st_size == table.size[row] and (
                found.st_mtime_ns == table.mtime[row] or self.stamp(ref).sha == table.picture[row].tobytes()
            )

        with ThreadPoolExecutor(8) as pool:
            return np.fromiter(pool.map(same, refs, rows), bool, len(refs))


def open_folder(root: str, mode: str, low: float | None, high: float | None) -> FolderData:
    """`scan`, for a source that knows no similarities. Raises `UserError` as that, and where they are asked for."""
    refuse_thresholds(root, low, high)
    return scan(root, mode)


def refuse_thresholds(root: str, low: float | None, high: float | None) -> None:
    """Raises `UserError` for similarities asked of pictures in classes."""
    if low is not None or high is not None:
        raise UserError(f"--low and --high are for shards, and {root!r} is a folder of pictures: leave them out")


def scan(root: str | os.PathLike, mode: str) -> FolderData:
    """List a data folder and check every picture's header.

    A group is a folder directly inside root with the pictures directly inside it. In mode "reconstruct" pictures may
    also lie in root itself, and a group may hold a single one. Hidden files and `SIDE_FILES` are passed over; all
    else that is no usable picture is listed as bad.

    Raises:
        UserError: root is missing, no folder or unreadable; no pictures; more than half of the files bad; in mode
            "folders", no group of two.
    """
    root = Path(root)
    if mode not in MODES:
        raise UserError(f"unknown data mode {mode!r}: choose one of {', '.join(MODES)}")
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"data folder {str(root)!r} {what}: give the folder that holds the label folders")
    with listing():
        files, bad = _list_files(root, mode)
    return gathered(root, mode, files, bad)


@contextmanager
def listing() -> Iterator[None]:
    """What fails when folders are listed becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot list data folder {error.filename!r}: {error.strerror}; make it readable") from error


def gathered(root: Path, mode: str, files: list[tuple[str, str]], bad: list[tuple[str, str]]) -> FolderData:
    """Pictures listed as (label, path from root), each one's header checked; bad: (path, reason) of others there.

    Raises:
        UserError: as `scan`.
    """
    where = repr(str(root))
    if mode not in MODES:
        raise UserError(f"unknown data mode {mode!r}: choose one of {', '.join(MODES)}")
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        # oddities that Pillow only warns of are no news here
        warnings.filterwarnings("ignore", module=r"PIL\.")
        checks = list(pool.map(lambda file: _check(root, file[1]), files))

    groups: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    bad = list(bad)
    for (label, path), check in zip(files, checks, strict=True):
        if isinstance(check, str):
            bad.append((path, check))
        else:
            groups.setdefault(label, []).append(path)
            sizes[path] = check
    if not sizes and not bad:
        raise UserError(f"data folder {where} holds no pictures: give the folder that holds the label folders")
    bad.sort(key=lambda entry: natural(entry[0]))
    if len(bad) > len(sizes):
        first = f"the first is {bad[0][0]!r} ({bad[0][1]})"
        total, loose = len(bad) + len(sizes), sum(reason == LOOSE for _, reason in bad)
        advice = f"put them into label folders, or {RECONSTRUCT}" if 2 * loose > len(bad) else "clean the data folder"
        raise UserError(f"{len(bad)} of {total} files in {where} are not usable, {first}: {advice}")
    return grouped(FolderData(root, mode, groups, sizes, bad=tuple(bad)))


def grouped(data: FolderData) -> FolderData:
    """The same without labels that have too few pictures for the mode. Raises `UserError` where none is left."""
    least = 2 if data.mode == "folders" else 1
    alone = tuple(label for label, paths in data.groups.items() if len(paths) < least)
    kept = {label: tuple(paths) for label, paths in data.groups.items() if len(paths) >= least}
    if not kept:
        what = f"no label folder in {str(data.root)!r} holds two usable pictures"
        raise UserError(f"{what}: put pictures that belong together into one folder, or {RECONSTRUCT}")
    return replace(data.keep(kept), bad=data.bad, alone=alone)


def natural(path: str) -> tuple[list[str | int], str]:
    """Sorts img2 before img10, and nothing as equal."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)], path


def names_in(folder: Path) -> list[str]:
    return sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=natural)


def _outside(root: Path, path: Path) -> bool:
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _list_files(root: Path, mode: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Files to check as (label, path), and what is bad by its place alone as (path, reason)."""
    files, bad = [], []
    for name in names_in(root):
        if not (root / name).is_dir():
            if Path(name).suffix.lower() in SIDE_FILES:
                continue
            if mode == "folders":
                bad.append((name, LOOSE))
            else:
                files.append(("", name))
        elif _outside(root, root / name):
            bad.append((name, "leads outside the data folder"))
        else:
            for child in names_in(root / name):
                path = f"{name}/{child}"
                if (root / path).is_dir():
                    bad.append((path, "a folder inside a label folder"))
                elif Path(child).suffix.lower() not in SIDE_FILES:
                    files.append((name, path))
    return files, bad


def _check(root: Path, path: str) -> int | str:
    """The picture's size in bytes, or why it is bad."""
    if _outside(root, root / path):
        return "leads outside the data folder"
    try:
        probe_image(root / path)
    except BadImage as error:
        return error.reason
    return os.stat(root / path).st_size
