"""Third phase, for each input: its pages as WebDataset shards, each with the table that the trainer reads."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from semantica.files import aside_of, move_in, remove, sync, write_bytes
from semantica.train.data.store import Places
from semantica.train.pages.config import FURNITURE_CEILING, MAX_PER_PAGE, NEAR_BITS, Rules
from semantica.train.pages.links import site
from semantica.train.pages.picture import by_name
from semantica.train.pages.sources import Input
from semantica.train.pages.store import connect, write_json

# bins of the similarity histogram, from -1 to 1
BINS = 100
# pixels of a bin of shorter sides
SIDES = 32
# bytes of a picture's SHA-256 that the table keeps, to tell a damaged one
MARK = 16


@dataclass(frozen=True)
class Found:
    """A picture that a page shows."""

    url: str
    alt: str
    unit: int
    raw: bytes
    sha: bytes
    offset: int
    size: int
    suffix: str
    width: int
    height: int
    phash: int
    emb: np.ndarray | None


class Pictures:
    """Reads what the first phase spooled, of any unit."""

    def __init__(self, folders: list[Path]):
        self.table = lru_cache(maxsize=32)(lambda unit: connect(folders[unit] / "unit.sqlite"))
        self.spool = lru_cache(maxsize=32)(lambda unit: Places(folders[unit] / "pictures.bin"))

    def found(self, url: str, alt: str, unit: int, picture: int) -> Found:
        query = "SELECT raw, sha, offset, size, suffix, width, height, phash, emb FROM pictures WHERE id = ?"
        *plain, phash, emb = self.table(unit).execute(query, (picture,)).fetchone()
        row = np.frombuffer(emb, np.float16) if emb else None
        return Found(url, alt, unit, *plain, int.from_bytes(phash, "big"), row)

    def data(self, found: Found) -> bytes:
        spool = self.spool(found.unit).file
        spool.seek(found.offset)
        return spool.read(found.size)


def write_unit(unit: int, source: Input, folders: list[Path], furniture: Path, out: Path, rules: Rules) -> None:
    """Write the shards of one unit, then its marker `out/done/<input hash>.json`."""
    marker = out / "done" / f"{source.digest}.json"
    if marker.exists():
        return
    reasons: Counter[str] = Counter()
    histograms = {name: Counter() for name in ("images_per_page", "side")}
    pictures, shards = Pictures(folders), Shards(out, unit, rules.shard_mb << 20)
    similar = np.zeros(BINS, np.int64)
    with closing(connect(folders[unit] / "joined.sqlite")) as joined, closing(connect(furniture)) as counts:
        limit = lru_cache(maxsize=1024)(lambda place: furniture_limit(count(counts, place, b""), rules))
        for page, url, time in joined.execute("SELECT id, url, time FROM pages ORDER BY id"):
            kept: list[Found] = []
            place = site(url)
            query = "SELECT url, alt, reason, unit, picture FROM found WHERE page = ? ORDER BY rowid"
            for link, alt, reason, owner, picture in joined.execute(query, (page,)):
                if reason is None:
                    found = pictures.found(link, alt, owner, picture)
                    reason = by_name(link, found.width, found.height)
                    if reason is None and count(counts, place, found.raw) >= limit(place):
                        reason = "furniture"
                    reason = reason or add(kept, found)
                if reason:
                    reasons[reason] += 1
            if len(kept) < 2:
                histograms["images_per_page"][len(kept)] += 1
                if kept:
                    reasons["alone"] += 1
                continue
            reasons["kept"] += len(kept)
            histograms["images_per_page"][len(kept)] += 1
            for found in kept:
                histograms["side"][min(found.width, found.height) // SIDES * SIDES] += 1
            cosines = shards.add(page, url, time, kept, pictures)
            if cosines is not None:
                similar += np.histogram(cosines, BINS, (-1, 1))[0]
    shards.close()
    record = {"input": {"name": Path(source.path).name, "kind": source.kind, "sha256": source.digest}, "unit": unit}
    record |= json.loads((folders[unit] / "read.json").read_text())
    record |= {"pages": json.loads((folders[unit] / "joined.json").read_text()), "pictures": dict(reasons)}
    record |= {"shards": shards.closed, "similarity": similar.tolist()}
    record |= {name: {str(k): v for k, v in sorted(c.items())} for name, c in histograms.items()}
    (out / "done").mkdir(exist_ok=True)
    write_json(marker, record)


def count(table, place: str, raw: bytes) -> int:
    found = table.execute("SELECT n FROM counts WHERE site = ? AND raw = ?", (place, raw)).fetchone()
    return found[0] if found else 0


def furniture_limit(pages: int, rules: Rules) -> float:
    """From how many pages of a site a picture is furniture: a share of its pages, within two bounds."""
    return max(rules.furniture_pages, min(rules.furniture_share * pages, FURNITURE_CEILING))


def add(kept: list[Found], new: Found) -> str | None:
    """Append a picture, or put it in the place of a smaller version of itself; the reason if one is dropped."""
    for i, old in enumerate(kept):
        if old.raw == new.raw or old.sha == new.sha:
            return "same_bytes"
        if (old.phash ^ new.phash).bit_count() <= NEAR_BITS:
            if new.width * new.height > old.width * old.height:
                kept[i] = new
            return "same_look"
    if len(kept) == MAX_PER_PAGE:
        return "over_limit"
    kept.append(new)
    return None


class Shards:
    """The shards of one unit: written aside one after the other, renamed when full."""

    def __init__(self, out: Path, unit: int, limit: int):
        self.out, self.unit, self.limit = out, unit, limit
        self.closed: list[dict] = []
        # what an interrupted attempt left
        for stale in out.glob(f".pages-{unit:05d}-*"):
            remove(stale)
        self.file: ShardFile | None = None

    def add(self, page: int, url: str, time: int, kept: list[Found], pictures: Pictures) -> np.ndarray | None:
        """Write one page; the similarities of its pairs (i, j), i < j, row by row, where it has embeddings."""
        if self.file is None:
            self.file = ShardFile(self.out, f"pages-{self.unit:05d}-{len(self.closed):05d}")
        key = hashlib.sha256(f"{self.unit} {page} {url}".encode()).digest()[:8]
        table, cosines = None, None
        if kept[0].emb is not None:
            table = np.stack([found.emb for found in kept])
            wide = table.astype(np.float64)
            cosines = (wide @ wide.T)[np.triu_indices(len(kept), 1)].astype(np.float32)
        images = [
            {
                "url": f.url, "alt": f.alt, "width": f.width, "height": f.height, "sha256": f.sha.hex(),
                "phash": f"{f.phash:016x}",
            }
            for f in kept
        ]  # fmt: skip
        self.file.add(
            key,
            ((pictures.data(found), found.suffix, found.sha) for found in kept),
            table,
            cosines,
            {"url": url, "time": time, "images": images},
        )
        if self.file.hashing.size >= self.limit:
            self.close()
        return cosines

    def close(self) -> None:
        if self.file is not None:
            self.closed.append(self.file.close())
            self.file = None


class ShardFile:
    """One shard and its table: written aside, renamed when it is closed, gone where it never is."""

    def __init__(self, out: Path, name: str):
        self.out, self.name = out, name
        self.aside = aside_of(out / f"{name}.tar", f"{os.getpid()}.incomplete")
        self.hashing = Hashing(open(self.aside, "wb"))
        self.tar = tarfile.open(fileobj=self.hashing, mode="w", format=tarfile.USTAR_FORMAT)
        self.rows = {"key": [], "count": [], "offset": [], "size": [], "sha": [], "cosine": []}

    def add(
        self,
        key: bytes,
        pictures: Iterable[tuple[bytes, str, bytes]],
        table: np.ndarray | None,
        cosines: np.ndarray | None,
        record: dict,
    ) -> None:
        """Write one page.

        Args:
            key: 8 bytes. pictures: each one's file, suffix and SHA-256. record: what `KEY.json` holds.
            table: embeddings `[n, D]`. cosines: of the pairs (i, j), i < j, row by row.
        """
        count = 0
        for data, suffix, sha in pictures:
            self.rows["offset"].append(self._member(f"{key.hex()}.{count}.{suffix}", data))
            self.rows["size"].append(len(data))
            self.rows["sha"].append(np.frombuffer(sha[:MARK], np.uint8))
            count += 1
        if table is not None:
            buffer = io.BytesIO()
            np.save(buffer, table, allow_pickle=False)
            self._member(f"{key.hex()}.emb.npy", buffer.getvalue())
        if cosines is not None:
            self.rows["cosine"].append(cosines)
        self._member(f"{key.hex()}.json", json.dumps(record, sort_keys=True).encode())
        self.rows["key"].append(np.frombuffer(key, np.uint8))
        self.rows["count"].append(count)

    def _member(self, name: str, data: bytes) -> int:
        """Append a member; the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self.tar.addfile(info, io.BytesIO(data))
        return self.hashing.size - len(data) - (-len(data)) % tarfile.BLOCKSIZE

    def close(self) -> dict:
        """Put it in its place; what index.json says of it."""
        self.tar.close()
        self.hashing.close()
        self.tar = None
        table = save(table_of(self.rows))
        counts = self.rows["count"]
        write_bytes(self.out / f"{self.name}.safetensors", table, apart=True)
        sync(self.aside)
        move_in(self.aside, self.out / f"{self.name}.tar")
        return {
            "name": self.name, "bytes": self.hashing.size, "sha256": self.hashing.sha.hexdigest(),
            "table_sha256": hashlib.sha256(table).hexdigest(), "pages": len(counts), "images": sum(counts),
            "pairs": sum(n * (n - 1) for n in counts),
        }  # fmt: skip

    def __del__(self):
        with suppress(AttributeError, OSError):
            if self.tar is not None:
                self.hashing.close()
                self.aside.unlink()


def table_of(rows: dict[str, list]) -> dict[str, np.ndarray]:
    """The trainer's table: `key [P, 8]`, `count [P]` pictures of each page; `offset`, `size [N]` of each picture's
    bytes in the shard, `sha [N, 16]`; `cosine` of each page's pairs (i, j), i < j, one page after the other."""
    return {
        "key": np.stack(rows["key"]),
        "count": np.array(rows["count"], np.int32),
        "offset": np.array(rows["offset"], np.int64),
        "size": np.array(rows["size"], np.int64),
        "sha": np.stack(rows["sha"]),
        "cosine": np.concatenate([*rows["cosine"], np.zeros(0, np.float32)]).astype(np.float32),
    }


class Hashing:
    """A file that knows its size and SHA-256 when it is closed."""

    def __init__(self, file):
        self.file, self.size, self.sha = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        self.file.close()
