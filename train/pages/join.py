"""Second phase, for each input against the table of all: links to pictures, over redirects and revisits."""

import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from semantica.files import written
from semantica.train.pages.config import MAX_HOPS, MAX_LINKS
from semantica.train.pages.links import canonical, site
from semantica.train.pages.store import JOINED, connect, finish, url_number, write_json

COLUMNS = "time, unit, id, kind, target, target_time, digest, item"
# captures of one URL that are looked at, nearest in time first; and look-ups in all for one link
CAPTURES, LOOKUPS = 8, 64
# captures are tried in this order: of the wanted kind or leading on, then errors, then payloads of another kind
RANK = {"redirect": 0, "revisit": 0, "error": 1}


@dataclass(frozen=True)
class Row:
    """A capture in the table of all."""

    time: int
    unit: int
    id: int
    kind: str
    target: str
    target_time: int
    digest: int
    item: int


class Captures:
    """Look-ups in the merged table."""

    def __init__(self, path: Path):
        self.table = connect(path)

    def of(self, url: str) -> list[Row]:
        return self._rows("key = ?", url_number(url))

    def with_digest(self, digest: int) -> list[Row]:
        return self._rows("digest = ? AND kind IN ('html', 'picture', 'other', 'error')", digest) if digest else []

    def _rows(self, where: str, value: int) -> list[Row]:
        query = f"SELECT {COLUMNS} FROM captures WHERE {where} ORDER BY unit, id LIMIT 10000"
        return [Row(*row) for row in self.table.execute(query, (value,))]

    def resolve(self, url: str, time: int, kind: str) -> Row | str:
        """The payload of a URL: of the capture nearest in time that leads to one of this kind, else the reason."""
        # of one link: look-ups that are left, and URLs that were met; crawls can lead round in circles
        self.left, self.seen = LOOKUPS, set()
        return self._follow(url, time, kind, MAX_HOPS)

    def original(self, row: Row, kind: str) -> Row | None:
        """The payload that a revisit refers to: by URL and date, else by digest."""
        if row.target:
            found = self._best(self.of(row.target), row.target_time or row.time, kind)
            same = [r for r in found if r.kind == kind and (not row.digest or r.digest == row.digest)]
            if same:
                return same[0]
        found = self._best(self.with_digest(row.digest), row.time, kind)
        return found[0] if found and found[0].kind in (kind, "error") else None

    def _best(self, rows: list[Row], time: int, kind: str) -> list[Row]:
        rank = {**RANK, kind: 0}
        return sorted(rows, key=lambda r: (rank.get(r.kind, 2), abs(r.time - time), r.unit, r.id))[:CAPTURES]

    def _follow(self, url: str, time: int, kind: str, hops: int) -> Row | str:
        if url in self.seen or not hops or not self.left:
            return "redirect_loop"
        self.seen.add(url)
        self.left -= 1
        first = ""
        for row in self._best(self.of(url), time, kind):
            if row.kind == kind:
                return row
            if row.kind == "redirect":
                result = self._follow(row.target, row.time, kind, hops - 1)
            elif row.kind == "revisit":
                result = self.original(row, kind) or "revisit_unresolved"
                if isinstance(result, Row) and result.kind == "error":
                    result = result.target
            else:
                result = row.target if row.kind == "error" else f"not_a_{kind}"
            if isinstance(result, Row):
                return result
            # where none leads there, the reason is that of the best one
            first = first or result
        return first or "not_captured"


class Units:
    """The tables of the other units, a few open at a time."""

    def __init__(self, folders: list[Path]):
        self.table = lru_cache(maxsize=32)(lambda unit: connect(folders[unit] / "unit.sqlite"))

    def document(self, row: Row) -> tuple[str, list]:
        query = "SELECT base, links FROM documents WHERE id = ?"
        base, links = self.table(row.unit).execute(query, (row.item,)).fetchone()
        return base, json.loads(links)

    def raw(self, row: Row) -> bytes:
        return self.table(row.unit).execute("SELECT raw FROM pictures WHERE id = ?", (row.item,)).fetchone()[0]


def join_unit(unit: int, folders: list[Path], merged: Path) -> None:
    """Write `joined.sqlite` and `joined.json` into the folder of one unit: the pages that are its own, what each of
    their links leads to, and on how many of them each picture is."""
    folder = folders[unit]
    if (folder / "joined.json").exists():
        return
    captures, units = Captures(merged), Units(folders)
    counts: Counter[str] = Counter()
    with written(folder / "joined.sqlite", apart=True) as aside, closing(connect(folder / "unit.sqlite")) as own:
        out = connect(aside, JOINED)
        columns = COLUMNS.replace("unit", "?")
        query = f"SELECT url, {columns} FROM captures WHERE kind IN ('html', 'revisit') ORDER BY id"
        for url, *fields in own.execute(query, (unit,)):
            row = Row(*fields)
            documents = page_documents(url, row, captures, counts)
            if documents:
                links = page_links(url, documents, units)
                add_page(out, url, row, links, captures, units, counts)
        finish(out)
    write_json(folder / "joined.json", dict(counts))


def page_documents(url: str, row: Row, captures: Captures, counts: Counter) -> list[Row]:
    """The documents of a page, or none where this capture is no page of its own."""
    document = row
    if row.kind == "revisit":
        found = captures.original(row, "html")
        known = found or captures.original(row, "picture") or captures.original(row, "other")
        counts["revisits_resolved" if known else "revisits_unresolved"] += 1
        if found is None or found.kind != "html":
            return []
        document = found
    # captures of one URL with the same bytes are one page; a page that only a table tells of has no bytes (digest 0):
    # all captures of its URL are one page then, and each brings one link
    same = [r for r in captures.of(url) if r.kind in ("html", "revisit") and r.digest == document.digest]
    first = min(same, key=lambda r: (r.kind != "html", r.unit, r.id), default=row)
    if (first.unit, first.id) != (row.unit, row.id):
        counts["pages_repeated"] += bool(document.digest)
        return []
    return [document] if document.digest else same[:MAX_LINKS]


def page_links(url: str, documents: list[Row], units: Units) -> dict[str, str]:
    """Absolute address -> alternative text; addresses that cannot be used keep their order under names of their own."""
    links: dict[str, str] = {}
    for row in documents:
        base, written_links = units.document(row)
        base = (canonical(base, url) if base else None) or url
        for link, alt in written_links:
            address = canonical(link, base) or f"!{link[:80]}"
            links[address] = links.get(address) or alt
    return links


def add_page(out, url: str, row: Row, links: dict, captures: Captures, units: Units, counts: Counter) -> None:
    page = out.execute("INSERT INTO pages VALUES(NULL,?,?)", (url, row.time)).lastrowid
    counts["pages"] += 1
    counts["linked"] += len(links)
    # pages of the site are counted too, under no picture
    shown: set[bytes] = {b""}
    for address, alt in links.items():
        found = "bad_url" if address[0] == "!" else captures.resolve(address, row.time, "picture")
        if isinstance(found, Row):
            shown.add(units.raw(found))
            place = (None, found.unit, found.item)
        else:
            place = (found, None, None)
        out.execute("INSERT INTO found VALUES(?,?,?,?,?,?)", (page, address, alt, *place))
    upsert = "INSERT INTO counts VALUES(?,?,1) ON CONFLICT DO UPDATE SET n = n + 1"
    out.executemany(upsert, [(site(url), raw) for raw in sorted(shown)])
