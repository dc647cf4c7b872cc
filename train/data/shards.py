"""Shards of `semantica pairs` -> pairs: pictures that share a page and whose similarity lies between two thresholds.

The shards may lie in a local folder or behind an fsspec URL. They are read by offset, through the tables beside them:
nothing is unpacked, executed or unpickled, and each picture is checked against its hash.
"""

import hashlib
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load

from semantica.errors import UserError
from semantica.images import BadImage, load_image, load_pixels
from semantica.train.data.alts import read_alts
from semantica.train.data.captions import Captions
from semantica.train.data.draws import CYCLE, PAIR, Pair, View, generator, order
from semantica.train.data.source import MARK, Source, Stamp, around, parted
from semantica.train.data.store import Store

if TYPE_CHECKING:
    from semantica.train.data.tokens import Table, Tokens

FORMAT = 1
MAX_BAD_SHARDS = 0.5


@dataclass(frozen=True)
class Shard:
    """One shard's table; see `semantica.train.pages.write.table_of`."""

    name: str
    key: np.ndarray
    count: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    sha: np.ndarray
    cosine: np.ndarray


@dataclass(frozen=True)
class ShardData(Source):
    """The pages of some shards, as the trainer draws from them. Made by `open_shards`.

    store: where the bytes are. low, high: similarity of a pair, None for no bound.
    name [S]: shards. shard, first, count, start [P]: of each page its shard, first picture, number of pictures, and
    first similarity. offset, size [N], sha [N, 16], cosine: as in the shards' tables, one after the other.
    page [U]: the pages in use, in the order of the shards. targets [N]: pictures that have a partner.
    bad: (shard, reason) of shards that cannot be used.
    tokens: what a frozen encoder made of the pictures, where it was stored.
    captions: alternative texts of the targets, where they were read.
    """

    root: str
    store: Store
    mode: str
    low: float | None
    high: float | None
    name: tuple[str, ...]
    key: np.ndarray
    shard: np.ndarray
    first: np.ndarray
    count: np.ndarray
    start: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    sha: np.ndarray
    cosine: np.ndarray
    targets: np.ndarray
    page: np.ndarray
    identity: str
    bad: tuple[tuple[str, str], ...] = ()
    tokens: "Tokens | None" = None
    captions: Captions | None = None
    kind: ClassVar[str] = "shards"

    def __len__(self) -> int:
        """Samples of an epoch: of each page the square root of its number of targets, rounded up."""
        return int(self.ends[-1]) if len(self.page) else 0

    @property
    def remote(self) -> bool:
        return self.store.remote

    @cached_property
    def usable(self) -> np.ndarray:
        """Targets of each page in use `[U]`."""
        sums = np.concatenate([[0], np.cumsum(self.targets)])
        return sums[self.first[self.page] + self.count[self.page]] - sums[self.first[self.page]]

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(np.ceil(np.sqrt(self.usable)).astype(np.int64))

    def describe(self) -> str:
        """In words, for the log."""
        pairs = "" if self.low is None and self.high is None else f", similarity {self.low} to {self.high}"
        stored = ", tokens stored" if self.tokens else ""
        texts = ", alternative texts" if self.captions else ""
        return f"{int(self.usable.sum())} pictures on {len(self.page)} pages{pairs}{stored}{texts}"

    def digest(self) -> str:
        """16 hex digits over the shards' hashes, the thresholds, the stored tokens and the texts."""
        stored = f" {self.tokens.digest()}" if self.tokens else ""
        texts = f" {self.captions.digest()}" if self.captions else ""
        return hashlib.sha256(f"{self.identity} {self.low} {self.high}{stored}{texts}".encode()).hexdigest()[:16]

    def keep(self, page: np.ndarray) -> "ShardData":
        """The same shards with only these pages in use."""
        kept = replace(self, page=np.sort(page))
        return kept if self.captions is None else replace(kept, captions=self.captions.keep(kept.target_refs()))

    def captioned(self) -> "ShardData":
        """With the alternative texts that pages gave their pictures; those without one are no targets any more.

        Raises:
            UserError: none has one.
        """
        captions, bad = read_alts(self)
        targets = np.zeros_like(self.targets)
        targets[list(captions.texts)] = True
        data = replace(self, targets=targets, captions=captions, bad=(*self.bad, *bad))
        if not captions.texts:
            raise UserError(
                f"no picture in {self.root} has an alternative text: give shards of pages that have, or pictures with "
                "captions.jsonl in a folder"
            )
        return data.keep(data.page[data.usable > 0])

    def split(self, fraction: float, seed: int) -> tuple["ShardData", "ShardData"]:
        """Part the pages into (training, held out). Raises `UserError` as `parted`."""
        training, held = parted(len(self.page), fraction, seed, "pages")
        return self.keep(self.page[training]), self.keep(self.page[held])

    def draw(self, seed: int, index: int, conditions: int = 1) -> Pair:
        """The pair of global sample `index`: a pure function of its arguments.

        An epoch has ceil(sqrt(n)) samples of a page with n possible targets: a page with 100 pictures counts five
        times one with 4, not 25 times (or, by pairs, 825 times). Every possible target of a page comes once before
        any comes again, over the epochs. Conditions are drawn uniformly among the pictures whose similarity with the
        target is allowed, without replacement while there are enough.
        """
        epoch, position = divmod(index, len(self))
        number = int(order(len(self), seed, epoch)[position])
        at = int(np.searchsorted(self.ends, number, side="right"))
        share = int(self.ends[at] - (self.ends[at - 1] if at else 0))
        slot = number - int(self.ends[at]) + share
        page = int(self.page[at])
        targets = self.targets_of(page)
        cycle, place = divmod(epoch * share + slot, len(targets))
        target = int(targets[generator(seed, CYCLE, page, cycle).permutation(len(targets))[place]])
        draw = generator(seed, PAIR, index)
        if self.mode == "reconstruct":
            flip, crop = bool(draw.integers(2)), tuple(draw.random(3).tolist())
            view = View(target, flip, crop)
            return Pair(page, view, (view,) * conditions)
        partners = self.partners_of(page, target)
        chosen = [int(p) for p in draw.permutation(partners)]
        chosen = [chosen[i % len(chosen)] for i in range(conditions)]
        flips, crops = draw.integers(2, size=conditions + 1).astype(bool).tolist(), draw.random((conditions + 1, 3))
        views = [View(ref, flip, tuple(crop)) for ref, flip, crop in zip([target, *chosen], flips, crops.tolist())]
        return Pair(page, views[0], tuple(views[1:]))

    def target_refs(self) -> list[int]:
        """All targets of the pages in use."""
        used = np.zeros(len(self.count), bool)
        used[self.page] = True
        return np.flatnonzero(self.targets & np.repeat(used, self.count)).tolist()

    def targets_of(self, page: int) -> np.ndarray:
        first, count = int(self.first[page]), int(self.count[page])
        return first + np.flatnonzero(self.targets[first : first + count])

    def partners_of(self, page: int, target: int) -> np.ndarray:
        """The pictures of a page that may be the condition of a target."""
        first, count = int(self.first[page]), int(self.count[page])
        place = target - first
        others = np.array([i for i in range(count) if i != place])
        if self.low is None and self.high is None:
            return first + others
        a, b = np.minimum(others, place), np.maximum(others, place)
        cosine = self.cosine[self.start[page] + pair_number(a, b, count)]
        return first + others[allowed(cosine, self.low, self.high)]

    def target_candidates(self, group: int, start: int) -> Iterator[int]:
        return around(self.targets_of(group).tolist(), start)

    def condition_candidates(self, group: int, target: int, start: int) -> Iterator[int]:
        partners = self.partners_of(group, target).tolist()
        return around(partners, start if start in partners else partners[0])

    def name_of(self, ref: int) -> str:
        """A picture by the names of its shard and member."""
        page = int(np.searchsorted(self.first, ref, side="right")) - 1
        return f"{self.name[self.shard[page]]}.tar:{self.key[page].tobytes().hex()}.{ref - int(self.first[page])}"

    def prefetch(self, refs: set[int]) -> None:
        """Fetch these pictures together, as each request takes its time."""
        self.store.fetch([self._place(ref) for ref in sorted(refs)])

    def _place(self, ref: int) -> tuple[str, int, int]:
        page = int(np.searchsorted(self.first, ref, side="right")) - 1
        return self.name[self.shard[page]] + ".tar", int(self.offset[ref]), int(self.size[ref])

    def load(self, ref: int, near: int | None) -> Image.Image:
        """Raises `BadImage` for bytes that are missing or altered, or no picture."""
        return load_image(io.BytesIO(self._bytes(ref)), near=near)

    def pixels(self, ref: int, near: int) -> np.ndarray:
        """Raises `BadImage` as `load`."""
        return load_pixels(io.BytesIO(self._bytes(ref)), near=near)

    def _bytes(self, ref: int) -> bytes:
        data = self.store.read(*self._place(ref))
        if hashlib.sha256(data).digest()[:MARK] != self.sha[ref].tobytes():
            what = "missing" if len(data) < self.size[ref] else "altered"
            raise BadImage(f"{what}: its bytes in the shard are not those of its hash", self.name_of(ref))
        return data

    def refs(self) -> range:
        return range(len(self.size))

    def parts(self) -> dict[str, range]:
        counts = np.bincount(self.shard, self.count, len(self.name)).astype(int)
        ends = np.cumsum(counts)
        return {name: range(end - n, end) for name, n, end in zip(self.name, counts.tolist(), ends.tolist())}

    def picture_bytes(self) -> int:
        return int(self.size.sum())

    def stamp(self, ref: int) -> Stamp:
        return Stamp(self.sha[ref].tobytes())

    def unchanged(self, refs: Sequence[int], table: "Table", rows: Sequence[int]) -> np.ndarray:
        return (self.sha[refs] == table.picture[rows]).all(1)


def pair_number(i: np.ndarray, j: np.ndarray, count: int) -> np.ndarray:
    """The place of pair (i, j), i < j, among the pairs of `count` pictures, row by row."""
    return i * (2 * count - i - 1) // 2 + j - i - 1


def allowed(cosine: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Where low <= cosine <= high; None is no bound."""
    keep = np.ones(cosine.shape, bool)
    if low is not None:
        keep &= cosine >= low
    return keep & (cosine <= high) if high is not None else keep


def is_shards(root: str) -> bool:
    """Whether a path or URL is to be read as shards: an fsspec URL, or a folder that holds some."""
    return "://" in root or root.startswith("pipe:") or any(Path(root).glob("pages-*.tar"))


def open_shards(root: str, mode: str = "pages", low: float | None = None, high: float | None = None) -> ShardData:
    """Read the index and the tables of shards.

    Args:
        root: folder or fsspec URL.
        mode: "pages", or "reconstruct" (target = condition).
        low, high: smallest and largest similarity of a pair; none in mode "reconstruct".

    Raises:
        UserError: no shards there, a format or address that is not read, most shards unusable, or no pair left.
    """
    if mode not in ("pages", "reconstruct"):
        raise UserError(f"unknown data mode {mode!r} for shards: choose pages or reconstruct")
    if mode == "reconstruct" and (low, high) != (None, None):
        raise UserError("--low and --high are for two pictures of a page: leave them out with --mode reconstruct")
    store = Store(root)
    return open_listed(store, read_index(store), mode, low, high)


def open_listed(store: Store, index: dict, mode: str, low: float | None, high: float | None) -> ShardData:
    """`open_shards` for an index that is at hand."""
    root = store.root
    shards, bad = [], []
    for entry in index["shards"]:
        try:
            shards.append(read_table(store, entry))
        except ValueError as error:
            bad.append((str(entry.get("name")) if isinstance(entry, dict) else "index.json", str(error)))
    if len(bad) > MAX_BAD_SHARDS * len(index["shards"]):
        raise UserError(
            f"{len(bad)} of {len(index['shards'])} shards in {root} cannot be used, the first is {bad[0][0]!r} "
            f"({bad[0][1]}): copy the shards again"
        )
    if not shards:
        raise UserError(f"{root} holds no page with two pictures: mine other pages, or with weaker rules")
    if mode == "pages" and (low, high) != (None, None):
        if not any(len(shard.cosine) for shard in shards):
            raise UserError(
                f"{root} was mined without an encoder, so --low and --high cannot be applied: leave them out, or mine "
                "again with --encoder"
            )
        if low is not None and high is not None and low > high:
            raise UserError(f"--low {low} is above --high {high}: no pair can be kept")
    data = joined(root, store, mode, low, high, shards, tuple(bad))
    if not len(data.page):
        raise UserError(
            f"no pair in {root} has a similarity from {low} to {high}: see 'semantica pairs --report {root}'"
        )
    return data


def joined(root: str, store: Store, mode: str, low, high, shards: list[Shard], bad: tuple) -> ShardData:
    def all_of(name: str) -> np.ndarray:
        return np.concatenate([getattr(shard, name) for shard in shards])

    count = all_of("count").astype(np.int64)
    pairs = count * (count - 1) // 2
    first, start = np.cumsum(count) - count, np.cumsum(pairs) - pairs
    cosine = all_of("cosine")
    if mode == "pages":
        targets = with_partner(first, start, count, cosine, low, high)
    else:
        targets = np.ones(int(count.sum()), bool)
    data = ShardData(
        root, store, mode, low, high, tuple(shard.name for shard in shards), all_of("key"),
        np.repeat(np.arange(len(shards)), [len(shard.count) for shard in shards]), first, count, start,
        all_of("offset"), all_of("size"), all_of("sha"), cosine, targets, np.arange(len(count)),
        hashlib.sha256(all_of("sha").tobytes() + count.tobytes()).hexdigest(), bad,
    )  # fmt: skip
    return data.keep(np.flatnonzero(data.usable > 0))


def with_partner(first, start, count, cosine, low, high) -> np.ndarray:
    """Which pictures `[N]` have at least one partner within the thresholds."""
    if low is None and high is None:
        return np.repeat(count > 1, count)
    found = np.zeros(int(count.sum()), bool)
    for n in np.unique(count):
        pages = np.flatnonzero(count == n)
        i, j = np.triu_indices(n, 1)
        keep = allowed(cosine[start[pages][:, None] + np.arange(len(i))], low, high)
        page, pair = np.nonzero(keep)
        found[first[pages][page] + i[pair]] = True
        found[first[pages][page] + j[pair]] = True
    return found


def read_index(store: Store) -> dict:
    try:
        index = json.loads(store.whole("index.json"))
        version, shards = index["format"], index["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"{store.root} has no index.json that can be read ({why}): give the --out folder of a "
            "finished 'semantica pairs', with all its files"
        ) from error
    if version != FORMAT or not isinstance(shards, list):
        raise UserError(f"{store.root} has format {version!r}: this version reads format {FORMAT}")
    return index


def read_table(store: Store, entry: dict) -> Shard:
    """One shard's table. Raises `ValueError` with the reason why the shard cannot be used."""
    try:
        name, size, sha = str(entry["name"]), int(entry["bytes"]), str(entry["table_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("not described in index.json") from error
    if posixpath.basename(name) != name or not name.startswith("pages-"):
        raise ValueError("its name leads out of the folder")
    try:
        table = store.whole(f"{name}.safetensors")
        there = store.size(f"{name}.tar")
    except OSError as error:
        raise ValueError(f"missing: {error.strerror or type(error).__name__}") from error
    if hashlib.sha256(table).hexdigest() != sha:
        raise ValueError("its table is not that of its hash")
    try:
        shard = Shard(name, **load(table))
    except (SafetensorError, TypeError) as error:
        raise ValueError("its table cannot be read") from error
    if there != size:
        raise ValueError(f"has {there} bytes instead of {size}")
    if not sound(shard, size):
        raise ValueError("its table is not of the pages that it counts")
    return shard


def sound(shard: Shard, size: int) -> bool:
    """Whether a table has what it says of each of its pages, and every picture lies within the shard's bytes."""
    kinds = {"key": "u1", "count": "i4", "offset": "i8", "size": "i8", "sha": "u1", "cosine": "f4"}
    if any(getattr(shard, name).dtype != kind for name, kind in kinds.items()):
        return False
    count = shard.count.astype(np.int64)
    pages, pictures, pairs = len(count), int(count.sum()), int((count * (count - 1) // 2).sum())
    shapes = {"key": (pages, 8), "count": (pages,), "offset": (pictures,), "size": (pictures,), "sha": (pictures, MARK)}
    if any(getattr(shard, name).shape != shape for name, shape in shapes.items()):
        return False
    # an encoder gives a similarity of every pair, and none of none
    known = shard.cosine.shape in ((pairs,), (0,))
    within = (shard.offset >= 0) & (shard.size >= 0) & (shard.size <= size) & (shard.offset <= size - shard.size)
    return known and bool((count > 0).all() and within.all())
