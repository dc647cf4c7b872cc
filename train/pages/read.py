"""First phase, for each input by itself: every capture into a table, every picture judged, described and spooled."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

from semantica.files import written
from semantica.train.pages.config import Rules
from semantica.train.pages.describe import Batcher, Describe, Encoder
from semantica.train.pages.links import BadPage, page_links
from semantica.train.pages.picture import Rejected, examine
from semantica.train.pages.sources import Input, LinkedPicture, events
from semantica.train.pages.store import UNIT, connect, finish, number, url_number, write_json
from semantica.train.pages.warc import Capture

# problems of one input that are named; all are counted
NAMED = 100


def readable(text: str) -> str:
    """A text that can be printed: names of files need not be any, and those in archives may steer a terminal."""
    whole = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


class Problems:
    """What is broken in one input: all counted, the first named."""

    def __init__(self):
        self.count = 0
        self.named: list[list[str]] = []

    def __call__(self, place: str, what: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append([readable(place), readable(" ".join(what.split())[:300])])


def read_unit(source: Input, out: Path, rules: Rules, encoder: Encoder, describe: Describe | None) -> None:
    """Write `out/unit.sqlite`, `out/pictures.bin` and `out/read.json`."""
    with written(out, "keep", apart=True) as aside:
        aside.mkdir(parents=True)
        problems = Problems()
        reader = Reader(aside, rules, encoder, describe, problems)
        for event in events(source, problems):
            reader.take(event)
        counts = reader.close()
        if not counts:
            problems("file", "holds no page and no picture")
        write_json(
            aside / "read.json", {"captures": counts, "problems": problems.count, "problems_named": problems.named}
        )


def read_nothing(out: Path, error: str) -> None:
    """An empty unit in the place of one whose reading failed."""
    with written(out, "keep", apart=True) as aside:
        aside.mkdir(parents=True)
        finish(connect(aside / "unit.sqlite", UNIT))
        (aside / "pictures.bin").touch()
        write_json(aside / "read.json", {"captures": {}, "problems": 1, "problems_named": [["file", error]]})


class Reader:
    """The tables of one unit while they grow."""

    def __init__(self, folder: Path, rules: Rules, encoder: Encoder, describe: Describe | None, say: Problems):
        self.rules, self.say, self.side = rules, say, encoder.side
        self.table = connect(folder / "unit.sqlite", UNIT)
        self.spool = open(folder / "pictures.bin", "wb")
        self.counts: Counter[str] = Counter()
        self.batcher = Batcher(describe, self._described) if describe else None

    def take(self, event: Capture | LinkedPicture) -> None:
        if isinstance(event, LinkedPicture):
            item = self._document("", [[event.link.url, event.link.alt]])
            self._capture(Capture(event.page, 0, "html"), item)
        elif event.kind == "html":
            self._page(event)
        elif event.kind == "picture":
            self._picture(event)
        else:
            self._capture(event)

    def _capture(self, c: Capture, item: int = 0) -> None:
        self.counts[c.kind] += 1
        row = (c.url, url_number(c.url), c.time, c.kind, c.target, c.target_time, number(c.digest), item)
        self.table.execute("INSERT INTO captures VALUES(NULL,?,?,?,?,?,?,?,?)", row)

    def _document(self, base: str, links: list) -> int:
        text = json.dumps(links, ensure_ascii=True)
        return self.table.execute("INSERT INTO documents VALUES(NULL,?,?)", (base, text)).lastrowid

    def _page(self, c: Capture) -> None:
        try:
            base, links = page_links(c.body, c.charset)
        except BadPage as error:
            self.say(c.url[:200], str(error))
            self._capture(Capture(c.url, c.time, "error", digest=c.digest, target="bad_page"))
            return
        self._capture(c, self._document(base, [[link.url, link.alt] for link in links]))

    def _picture(self, c: Capture) -> None:
        raw = hashlib.sha256(c.body).digest()
        known = self.table.execute("SELECT id, reason FROM pictures WHERE raw = ?", (raw,)).fetchone()
        item, reason = known or self._new_picture(c, raw)
        if reason:
            c = Capture(c.url, c.time, "error", digest=c.digest, target=reason)
        self._capture(c, item)

    def _new_picture(self, c: Capture, raw: bytes) -> tuple[int, str | None]:
        insert = "INSERT INTO pictures VALUES(NULL,?,?,?,?,?,?,?,?,?,?)"
        try:
            picture = examine(c.body, self.rules, self.side if self.batcher else None)
        except Rejected as error:
            reason = str(error)
            # text that is served for a picture, and the like; small pictures are no news
            if reason in ("format", "broken", "bomb"):
                self.say(c.url[:200], f"picture: {error.__cause__.reason if error.__cause__ else reason}")
            row = self.table.execute(insert, (raw, reason, None, None, None, None, None, None, None, None))
            return row.lastrowid, reason
        phash = picture.phash.to_bytes(8, "big")
        sha = raw if picture.data is c.body else hashlib.sha256(picture.data).digest()
        place, size = self.spool.tell(), (picture.width, picture.height)
        self.spool.write(picture.data)
        row = self.table.execute(insert, (raw, None, sha, place, len(picture.data), picture.suffix, *size, phash, None))
        if self.batcher:
            self.batcher.add(row.lastrowid, picture.view)
        return row.lastrowid, None

    def _described(self, picture: int, row) -> None:
        self.table.execute("UPDATE pictures SET emb = ? WHERE id = ?", (row.tobytes(), picture))

    def close(self) -> dict[str, int]:
        if self.batcher:
            self.batcher.flush()
        finish(self.table)
        self.spool.flush()
        os.fsync(self.spool.fileno())
        self.spool.close()
        return dict(self.counts)
