"""Folders of pictures -> pairs -> batches, where every random choice is a pure function of (seed, global sample index).

Sample `index` of a run is the same whichever process or worker makes it, and whether or not the run was interrupted.
"""

import hashlib
import itertools
import math
import os
import re
import signal
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semantica.errors import UserError
from semantica.images import BadImage, fit, load_image, probe_image, to_tensor

MODES = ("folders", "reconstruct")
SIDE_FILES = {".json", ".jsonl", ".txt", ".tsv", ".csv", ".md"}
# one stream of random numbers per purpose, so that changing one leaves the others as they were
ORDER, PAIR, LEVEL, NOISE, DROP, SPLIT = range(6)
# pictures found broken for one sample before the data is given up
PATIENCE = 64


@dataclass(frozen=True)
class PairData:
    """What `scan` found.

    root, mode: as given to `scan`.
    groups: label -> paths relative to root, in natural order; "" holds the pictures directly in root.
    sizes: bytes of each picture, by path.
    bad: (path, reason) of each file that cannot be used.
    alone: labels left out because they hold a single picture.
    """

    root: Path
    mode: str
    groups: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    bad: tuple[tuple[str, str], ...] = ()
    alone: tuple[str, ...] = ()

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

    def keep(self, groups: dict[str, tuple[str, ...]]) -> "PairData":
        """The same folder with only these groups, whose paths are among its own."""
        sizes = {path: self.sizes[path] for paths in groups.values() for path in paths}
        return PairData(self.root, self.mode, groups, sizes)


@dataclass(frozen=True)
class Pair:
    """One draw. Paths are relative to the data folder; a crop is (x, y, zoom), each uniform in [0, 1)."""

    group: str
    condition: str
    target: str
    flip_condition: bool
    flip_target: bool
    crop_condition: tuple[float, float, float]
    crop_target: tuple[float, float, float]


def generator(seed: int, *key: int) -> np.random.Generator:
    """Philox (Salmon et al., SC 2011), a fresh independent stream for each (seed, *key) of non-negative integers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def scan(root: str | os.PathLike, mode: str) -> PairData:
    """List a data folder and check every picture's header.

    A group is a folder directly inside root with the pictures directly inside it. In mode "reconstruct" pictures may
    also lie in root itself, and a group may hold a single one. Hidden files and `SIDE_FILES` are passed over; all
    else that is no usable picture is listed as bad.

    Raises:
        UserError: root is missing, no folder or unreadable; no pictures; more than half of the files bad; in mode
            "folders", no group of two.
    """
    root = Path(root)
    where = repr(str(root))
    if mode not in MODES:
        raise UserError(f"unknown data mode {mode!r}: choose one of {', '.join(MODES)}")
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"data folder {where} {what}: give the folder that holds the label folders")
    try:
        files, bad = _list_files(root, mode)
    except OSError as error:
        raise UserError(f"cannot list data folder {error.filename!r}: {error.strerror}; make it readable") from error
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        # oddities that Pillow only warns of are no news here
        warnings.filterwarnings("ignore", module=r"PIL\.")
        checks = list(pool.map(lambda file: _check(root, file[1]), files))

    groups: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for (label, path), check in zip(files, checks, strict=True):
        if isinstance(check, str):
            bad.append((path, check))
        else:
            groups.setdefault(label, []).append(path)
            sizes[path] = check
    if not sizes and not bad:
        raise UserError(f"data folder {where} holds no pictures: give the folder that holds the label folders")
    bad.sort(key=lambda entry: _natural(entry[0]))
    if len(bad) > len(sizes):
        first = f"the first is {bad[0][0]!r} ({bad[0][1]})"
        total = len(bad) + len(sizes)
        raise UserError(f"{len(bad)} of {total} files in {where} are not usable, {first}: clean the data folder")
    least = 2 if mode == "folders" else 1
    alone = tuple(label for label, paths in groups.items() if len(paths) < least)
    kept = {label: tuple(paths) for label, paths in groups.items() if len(paths) >= least}
    if not kept:
        what = f"no label folder in {where} holds two usable pictures"
        raise UserError(f"{what}: put pictures that belong together into one folder, or use the mode 'reconstruct'")
    return replace(PairData(root, mode, groups, sizes).keep(kept), bad=tuple(bad), alone=alone)


def digest(data: PairData) -> str:
    """16 hex digits over the listing (relative paths and sizes), so that a resumed run can refuse other data."""
    listing = hashlib.sha256()
    for path in sorted(data.sizes):
        listing.update(os.fsencode(path) + b"\0%d\0" % data.sizes[path])
    return listing.hexdigest()[:16]


def split(data: PairData, fraction: float, seed: int) -> tuple[PairData, PairData]:
    """Part the data into (training, held out): whole groups, or single pictures in mode "reconstruct".

    `fraction` of them, at least one, is held out; 0 holds out none.

    Raises:
        UserError: fraction outside [0, 1), or too few groups (pictures) to leave any for training.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"held-out fraction {fraction} is out of range: give at least 0 and less than 1")
    whole = data.mode == "folders"
    units = list(data.groups) if whole else [path for paths in data.groups.values() for path in paths]
    count = max(1, round(fraction * len(units))) if fraction else 0
    if count >= len(units):
        what = "label folders" if whole else "pictures"
        raise UserError(f"cannot hold out {count} of {len(units)} {what}: add {what} or hold out a fraction of 0")
    held = {units[i] for i in generator(seed, SPLIT).permutation(len(units))[:count]}

    def part(out: bool) -> PairData:
        if whole:
            return data.keep({label: paths for label, paths in data.groups.items() if (label in held) is out})
        parts = {label: tuple(p for p in paths if (p in held) is out) for label, paths in data.groups.items()}
        return data.keep({label: paths for label, paths in parts.items() if paths})

    return part(False), part(True)


def draw_pair(data: PairData, seed: int, index: int) -> Pair:
    """The pair of global sample `index`: a pure function of its arguments.

    Every picture is the target once per epoch of `len(data)` samples, in an order of that epoch's own. The condition is
    drawn uniformly from the others of its group; in mode "reconstruct" it is the target, flipped and cropped alike.
    """
    epoch, position = divmod(index, len(data))
    label, place = data.locate(int(order(len(data), seed, epoch)[position]))
    paths = data.groups[label]
    draw = generator(seed, PAIR, index)
    flips, crops = draw.integers(2, size=2).astype(bool).tolist(), draw.random((2, 3)).tolist()
    if data.mode == "reconstruct":
        return Pair(label, paths[place], paths[place], flips[0], flips[0], tuple(crops[0]), tuple(crops[0]))
    other = (place + 1 + int(draw.integers(len(paths) - 1))) % len(paths)
    return Pair(label, paths[other], paths[place], flips[0], flips[1], tuple(crops[0]), tuple(crops[1]))


@lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the targets in one epoch: a permutation of `range(count)`."""
    return generator(seed, ORDER, epoch).permutation(count)


@lru_cache(maxsize=4)
def strata(global_batch: int, seed: int, batch: int) -> np.ndarray:
    """Which noise-level stratum each sample of one global batch takes: a permutation of `range(global_batch)`."""
    return generator(seed, LEVEL, batch).permutation(global_batch)


class Pairs(Dataset):
    """Sample `index` (any non-negative integer) of a run, as a pure function of (data, options, seed, index).

    An item is a dict: `condition` uint8 `[C, C, 3]`; `target` uint8 `[S, S, 3]`; `noise` float32 `[3, S, S]`, standard
    normal; `u` float in (0, 1), the noise level's quantile, stratified so that each global batch has one in each
    interval `[k / global_batch, (k + 1) / global_batch)`; `drop` bool, whether the condition is dropped; `index`;
    `bad`, a list of (path, reason) of pictures that proved broken and were replaced by the next usable ones.

    Args:
        image_size, condition_size: S and C in pixels; C defaults to S.
        global_batch: samples per optimizer step, over all processes and micro-batches.
        drop: probability of dropping the condition.
        flip: mirror each picture with probability 1/2.
        crop: the smallest side of a random square crop, as a share of the shorter side (1: random place only);
            None takes the centre.

    Raises:
        UserError: drop or crop out of range.
    """

    def __init__(
        self,
        data: PairData,
        *,
        seed: int,
        image_size: int,
        condition_size: int | None = None,
        global_batch: int,
        drop: float = 0.1,
        flip: bool = True,
        crop: float | None = 1.0,
    ):
        if not 0 <= drop <= 1:
            raise UserError(f"condition dropout {drop} is out of range: give a probability from 0 to 1")
        if crop is not None and not 0 < crop <= 1:
            raise UserError(f"crop {crop} is out of range: give a share of the picture above 0 and at most 1")
        self.data = data
        self.seed = seed
        self.image_size = image_size
        self.condition_size = condition_size or image_size
        self.global_batch = global_batch
        self.drop = drop
        self.flip = flip
        self.crop = crop

    def __len__(self) -> int:
        """Samples per epoch; indices run on past it."""
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `UserError` when `PATIENCE` pictures, or all there are, prove broken before a pair is found."""
        bad: list[tuple[str, str]] = []
        pair, condition, target = self._load_pair(index, bad)
        batch, position = divmod(index, self.global_batch)
        # 32 bits at the middle of their cells: never 0 or 1, and exact when the stratum is added
        within = (int(generator(self.seed, LEVEL, batch, position).integers(2**32)) + 0.5) / 2**32
        shape = (3, self.image_size, self.image_size)
        return {
            "condition": self._cut(condition, self.condition_size, pair.crop_condition, pair.flip_condition),
            "target": self._cut(target, self.image_size, pair.crop_target, pair.flip_target),
            "noise": generator(self.seed, NOISE, index).standard_normal(shape, np.float32),
            "u": (int(strata(self.global_batch, self.seed, batch)[position]) + within) / self.global_batch,
            "drop": bool(generator(self.seed, DROP, index).random() < self.drop),
            "index": index,
            "bad": bad,
        }

    def _load_pair(self, index: int, bad: list[tuple[str, str]]) -> tuple[Pair, Image.Image, Image.Image]:
        # every picture is a target at least once in that span
        for later in range(index, index + 2 * len(self.data)):
            pair = draw_pair(self.data, self.seed, later)
            found = self._first_usable(pair.group, pair.target, bad)
            if found is None:
                continue
            path, target = found
            if self.data.mode == "reconstruct":
                return pair, target, target
            found = self._first_usable(pair.group, pair.condition, bad, taken=path)
            if found is not None:
                return pair, found[1], target
        raise self._give_up(bad)

    def _first_usable(
        self, group: str, start: str, bad: list[tuple[str, str]], taken: str | None = None
    ) -> tuple[str, Image.Image] | None:
        """The first picture of the group, from `start` on and around, that decodes and is not `taken`."""
        known = {path for path, _ in bad}
        for path in _around(self.data.groups[group], start):
            if path == taken or path in known:
                continue
            try:
                return path, load_image(self.data.root / path, near=self._near)
            except BadImage as error:
                bad.append((path, error.reason))
            if len(bad) >= PATIENCE:
                raise self._give_up(bad)
        return None

    def _give_up(self, bad: list[tuple[str, str]]) -> UserError:
        what = f"no readable pair after {len(bad)} broken pictures in {str(self.data.root)!r}"
        return UserError(f"{what}, the last is {bad[-1][0]!r} ({bad[-1][1]}): check the data folder")

    @property
    def _near(self) -> int:
        return math.ceil(max(self.image_size, self.condition_size) / (self.crop or 1.0))

    def _cut(self, image: Image.Image, size: int, crop: tuple[float, float, float], flip: bool) -> np.ndarray:
        mirror = flip and self.flip
        if self.crop is None:
            return fit(image, size, mirror=mirror)
        x, y, zoom = crop
        return fit(image, size, x=x, y=y, zoom=1 - zoom * (1 - self.crop), mirror=mirror)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of `Pairs` as one batch.

    Tensors `condition [B, 3, C, C]`, `target [B, 3, S, S]` float32 in [-1, 1], `noise [B, 3, S, S]` float32, `u [B]`
    float64, `drop [B]` bool, `index [B]` int64, and `bad`, all the items' (path, reason) in one list.
    """
    noise = torch.empty(len(items), *items[0]["noise"].shape)
    # torch's own memory: numpy's is aligned by chance, and that can change how later sums are rounded
    for row, item in zip(noise, items, strict=True):
        row.copy_(torch.from_numpy(item["noise"]))
    return {
        "condition": to_tensor([item["condition"] for item in items]),
        "target": to_tensor([item["target"] for item in items]),
        "noise": noise,
        "u": torch.tensor([item["u"] for item in items], dtype=torch.float64),
        "drop": torch.tensor([item["drop"] for item in items], dtype=torch.bool),
        "index": torch.tensor([item["index"] for item in items], dtype=torch.int64),
        "bad": [entry for item in items for entry in item["bad"]],
    }


def batches(
    dataset: Pairs, *, first_index: int, batch: int, workers: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Endless batches (see `collate`) of consecutive indices from `first_index` on,
    with their tensors on `device`, `u` on the host.

    The same bytes for any number of workers (0 loads in this process). Worker processes end when the iterator is
    closed or forgotten. The global random state of torch is not touched.

    Raises:
        UserError: as `Pairs.__getitem__`, also from a worker.
    """
    device = torch.device(device)
    loader = DataLoader(
        _Fetch(dataset),
        batch_sampler=_ranges(first_index, batch),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        # of its own, since the loader draws a seed from it
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        for loaded in iterator:
            if isinstance(loaded, UserError):
                raise loaded
            # u stays on the host, where noise levels are worked out in float64
            tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor) and k != "u"}
            moved = {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
            yield {**loaded, **moved}
    finally:
        # the workers are stopped by its destructor
        del iterator


def bad_record(path: str, reason: str) -> dict[str, str]:
    """One line of `bad_samples.jsonl`."""
    return {"path": path, "reason": reason}


class _Fetch(Dataset):
    """Hands a `UserError` on as a value: the loader would bury its one line in the worker's traceback."""

    def __init__(self, dataset: Pairs):
        self.dataset = dataset

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]] | UserError:
        try:
            return [self.dataset[index] for index in indices]
        except UserError as error:
            return error


def _collate(items: list[dict[str, Any]] | UserError) -> dict[str, Any] | UserError:
    return items if isinstance(items, UserError) else collate(items)


def _ranges(first: int, batch: int) -> Iterator[range]:
    return (range(start, start + batch) for start in itertools.count(first, batch))


def _start_worker(_: int) -> None:
    # the main process decides what an interrupt means, and then ends the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _natural(path: str) -> tuple[list[str | int], str]:
    """Sorts img2 before img10, and nothing as equal."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)], path


def _around(paths: tuple[str, ...], start: str) -> Iterator[str]:
    # the search is only paid for when the first one fails
    yield start
    first = paths.index(start)
    yield from paths[first + 1 :]
    yield from paths[:first]


def _names(folder: Path) -> list[str]:
    return sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=_natural)


def _outside(root: Path, path: Path) -> bool:
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _list_files(root: Path, mode: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Files to check as (label, path), and what is bad by its place alone as (path, reason)."""
    files, bad = [], []
    for name in _names(root):
        if not (root / name).is_dir():
            if Path(name).suffix.lower() in SIDE_FILES:
                continue
            if mode == "folders":
                bad.append((name, "not in a label folder"))
            else:
                files.append(("", name))
        elif _outside(root, root / name):
            bad.append((name, "leads outside the data folder"))
        else:
            for child in _names(root / name):
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
