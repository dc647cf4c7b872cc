"""What the phases of mining leave for one another: SQLite files, so that memory stays flat and look-ups cross files."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from semantica.files import write_text, written

# pages of SQLite's cache, in KiB
CACHE = 16 << 10
UNIT = """
CREATE TABLE captures(id INTEGER PRIMARY KEY, url TEXT, key INTEGER, time INTEGER, kind TEXT, target TEXT,
    target_time INTEGER, digest INTEGER, item INTEGER);
CREATE TABLE pictures(id INTEGER PRIMARY KEY, raw BLOB UNIQUE, reason TEXT, sha BLOB, offset INTEGER, size INTEGER,
    suffix TEXT, width INTEGER, height INTEGER, phash BLOB, emb BLOB);
CREATE TABLE documents(id INTEGER PRIMARY KEY, base TEXT, links TEXT);
"""
MERGED = """
CREATE TABLE captures(key INTEGER, time INTEGER, unit INTEGER, id INTEGER, kind TEXT, target TEXT,
    target_time INTEGER, digest INTEGER, item INTEGER);
"""
COUNTS = "CREATE TABLE counts(site TEXT, raw BLOB, n INTEGER, PRIMARY KEY(site, raw)) WITHOUT ROWID;"
JOINED = (
    """
CREATE TABLE pages(id INTEGER PRIMARY KEY, url TEXT, time INTEGER);
CREATE TABLE found(page INTEGER, url TEXT, alt TEXT, reason TEXT, unit INTEGER, picture INTEGER);
CREATE INDEX by_page ON found(page);
"""
    + COUNTS
)


def number(text: str) -> int:
    """A 64-bit key of a URL or digest, as SQLite's signed integers hold it; 0 for no text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True) if text else 0


def url_number(url: str) -> int:
    """The key of a URL without its scheme: pages and crawlers mix http and https, as CDX indexes do."""
    return number(url.removeprefix("https:").removeprefix("http:"))


def connect(path: Path, schema: str = "") -> sqlite3.Connection:
    """Open for reading, or make anew. No journal: a file counts only once it was renamed."""
    if schema:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA temp_store=FILE;")
        connection.executescript(schema + "BEGIN;")
    else:
        # quoted: a name may hold what ends a path in an address
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    connection.execute(f"PRAGMA cache_size=-{CACHE}")
    return connection


def finish(connection: sqlite3.Connection) -> None:
    connection.execute("COMMIT")
    connection.close()


def write_json(path: Path, value: dict) -> None:
    """Sorted keys, so that equal values are equal bytes; workers that outlived their run may write the same."""
    write_text(path, json.dumps(value, sort_keys=True, indent=1) + "\n", apart=True)


def once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder, unless it is there."""
    if not path.exists():
        with written(path, apart=True) as aside:
            make(aside)


def merge_captures(units: list[Path], out: Path) -> None:
    """One table of all captures of all units, in the order of the units, indexed by URL and by payload digest."""

    def make(aside: Path) -> None:
        merged = connect(aside, MERGED)
        for unit, folder in enumerate(units):
            with closing(connect(folder / "unit.sqlite")) as part:
                rows = part.execute(
                    "SELECT key, time, ?, id, kind, target, target_time, digest, item FROM captures ORDER BY id",
                    (unit,),
                )
                merged.executemany("INSERT INTO captures VALUES(?,?,?,?,?,?,?,?,?)", rows)
        merged.execute("CREATE INDEX by_key ON captures(key)")
        merged.execute("CREATE INDEX by_digest ON captures(digest) WHERE kind IN ('html', 'picture', 'other', 'error')")
        finish(merged)

    once(out, make)


def merge_counts(units: list[Path], out: Path) -> None:
    """How many pages of each site show each picture, over all units; a site's own number of pages under b""."""

    def make(aside: Path) -> None:
        merged = connect(aside, COUNTS)
        for folder in units:
            with closing(connect(folder / "joined.sqlite")) as part:
                merged.executemany(
                    "INSERT INTO counts VALUES(?,?,?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
                    part.execute("SELECT site, raw, n FROM counts ORDER BY site, raw"),
                )
        finish(merged)

    once(out, make)
