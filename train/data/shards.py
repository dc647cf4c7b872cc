"""Shards of `semantica pairs` -> pairs: pictures that share a page and whose similarity lies between two thresholds.

The shards may lie in a local folder or behind an fsspec URL. They are read by offset, through the tables beside them:
nothing is unpacked, executed or unpickled, and each picture is checked against its hash.
"""

import errno
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load

from semantica.errors import UserError, first_line
from semantica.images import BadImage, load_image, load_pixels
from semantica.train.data.draws import CYCLE, PAIR, Pair, View, generator, order
from semantica.train.data.source import MARK, Source, Stamp, around, parted

if TYPE_CHECKING:
    from semantica.train.data.tokens import Table, Tokens

FORMAT = 1
# where shards may be read from; others can run programs or chain to such as can
PROTOCOLS = {"file", "memory", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf"}
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
    """

    root: str
    store: "Store"
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
        return f"{int(self.usable.sum())} pictures on {len(self.page)} pages{pairs}{stored}"

    def digest(self) -> str:
        """16 hex digits over the shards' hashes, the thresholds and the stored tokens."""
        stored = f" {self.tokens.digest()}" if self.tokens else ""
        return hashlib.sha256(f"{self.identity} {self.low} {self.high}{stored}".encode()).hexdigest()[:16]

    def keep(self, page: np.ndarray) -> "ShardData":
        return replace(self, page=np.sort(page))

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

    def load(self, ref: int, near: int) -> Image.Image:
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
        low, high: smallest and largest similarity of a pair.

    Raises:
        UserError: no shards there, a format or address that is not read, most shards unusable, or no pair left.
    """
    if mode not in ("pages", "reconstruct"):
        raise UserError(f"unknown data mode {mode!r} for shards: choose pages or reconstruct")
    store = Store(root)
    return open_listed(store, read_index(store), mode, low, high)


def open_listed(store: "Store", index: dict, mode: str, low: float | None, high: float | None) -> ShardData:
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


def joined(root: str, store: "Store", mode: str, low, high, shards: list[Shard], bad: tuple) -> ShardData:
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


def read_index(store: "Store") -> dict:
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


def read_table(store: "Store", entry: dict) -> Shard:
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
    return shard


class Store:
    """Bytes of files in one folder, local or behind an fsspec URL; also in a process that was forked since.

    Raises:
        UserError: a protocol that is not read, or whose package is missing.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = str(root)
        protocol = self.root.split("://")[0] if "://" in self.root else self.root.split(":")[0]
        self.remote = "://" in self.root
        if (self.remote and protocol not in PROTOCOLS) or protocol == "pipe" or "::" in self.root:
            raise UserError(f"--data {self.root} is refused: give a folder or one of {', '.join(sorted(PROTOCOLS))}")
        self._connect()

    def _connect(self) -> None:
        self.files = lru_cache(maxsize=64)(lambda name: open(Path(self.root, name), "rb", buffering=0))
        self.process, self.system = os.getpid(), None
        self.fetched: dict[tuple[str, int], bytes] = {}
        if self.remote:
            import fsspec

            try:
                self.system, self.path = fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError) as error:
                raise UserError(f"--data {self.root} cannot be opened: {first_line(error)}") from error

    def __getstate__(self) -> dict:
        return {"root": self.root, "remote": self.remote}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._connect()

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Around requests: each process has connections of its own, and what a library raises becomes an `OSError`."""
        # a forked one has the systems of fsspec, but not the threads that serve them
        if self.process != os.getpid():
            self._connect()
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001
            raise OSError(errno.EIO, f"{type(error).__name__}: {first_line(error)}") from error

    def whole(self, name: str) -> bytes:
        with self.asked():
            return self.system.cat_file(f"{self.path}/{name}") if self.system else Path(self.root, name).read_bytes()

    def size(self, name: str) -> int:
        with self.asked():
            return self.system.size(f"{self.path}/{name}") if self.system else os.stat(Path(self.root, name)).st_size

    def fetch(self, places: Iterable[tuple[str, int, int]]) -> None:
        """Read ranges of remote files side by side, for the `read`s that follow; what fails is left for them to say."""
        names, offsets, sizes = zip(*places)
        paths, ends = [f"{self.path}/{name}" for name in names], [o + n for o, n in zip(offsets, sizes)]
        found = ()
        with suppress(OSError), self.asked():
            found = self.system.cat_ranges(paths, list(offsets), ends, on_error="return")
        self.fetched = {
            (name, offset): data for name, offset, data in zip(names, offsets, found) if isinstance(data, bytes)
        }

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer at the end of the file. Raises `BadImage` where it cannot be read."""
        if (name, offset) in self.fetched:
            return self.fetched[name, offset]
        try:
            with self.asked():
                if self.system:
                    return self.system.cat_file(f"{self.path}/{name}", start=offset, end=offset + size)
                return os.pread(self.files(name).fileno(), size, offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or type(error).__name__}", name) from error
