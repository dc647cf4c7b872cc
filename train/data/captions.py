"""Texts of pictures: `captions.jsonl` beside them, a line {"file": path, "text": text} for each text of a picture.

Of shards these are the alternative texts that pages gave their pictures, see `semantica.train.data.alts`.
"""

import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from semantica.errors import UserError
from semantica.train.data.draws import CAPTION, Ref, generator

FILE = "captions.jsonl"
# characters that one text may have
LONGEST = 10_000


@dataclass(frozen=True)
class Captions:
    """Texts of each picture, in the order of their lines, as the data refers to it: by its path, or its number."""

    texts: Mapping[Ref, tuple[str, ...]]

    def draw(self, ref: Ref, seed: int, index: int) -> str:
        """The text of a picture in global sample `index`: a pure function of its arguments."""
        texts = self.texts[ref]
        return texts[int(generator(seed, CAPTION, index).integers(len(texts)))] if len(texts) > 1 else texts[0]

    def keep(self, refs: Iterable[Ref]) -> "Captions":
        """Those of some pictures."""
        return Captions({ref: self.texts[ref] for ref in refs})

    def __iter__(self) -> Iterator[str]:
        """All texts."""
        return (text for texts in self.texts.values() for text in texts)

    def digest(self) -> str:
        """16 hex digits over pictures and texts."""
        listing = hashlib.sha256()
        for ref in sorted(self.texts):
            listing.update(json.dumps([ref, *self.texts[ref]]).encode() + b"\n")
        return listing.hexdigest()[:16]


def read_captions(root: Path, used: Iterable[str]) -> Captions:
    """The texts of pictures in a folder; those of pictures that are there but not used are left out.

    Args:
        used: paths from `root`, each of which must have a text.

    Raises:
        UserError: there is no such file, a line that is none, an empty text, a text of a picture that is not there, or
            pictures without text.
    """
    path, used = root / FILE, list(used)
    if not path.is_file():
        raise UserError(f'{path} does not exist: write a line {{"file": ..., "text": ...}} for each picture there')
    texts: dict[str, list[str]] = {ref: [] for ref in used}
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        ref, text = entry(line, where)
        if ref in texts:
            texts[ref].append(text)
        elif not os.path.isfile(root / ref):
            raise UserError(f"{where}: there is no picture {ref!r} in {root}; leave the line out or correct its path")
    without = [ref for ref, found in texts.items() if not found]
    if without:
        raise UserError(
            f"{len(without)} of {len(used)} pictures have no text in {path}, the first is {without[0]!r}: add theirs"
        )
    return Captions({ref: tuple(found) for ref, found in texts.items()})


def lines(path: Path) -> Iterator[str]:
    try:
        # with the mark that some editors begin a file with, or without
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8: restore it") from error


def entry(line: str, where: str) -> tuple[str, str]:
    """The picture's path and the text of a line. Raises `UserError`, which begins with `where`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is no JSON: expected {{"file": path, "text": text}}') from error
    ref, text = (row.get(name) if isinstance(row, dict) else None for name in ("file", "text"))
    if not isinstance(ref, str) or not isinstance(text, str):
        raise UserError(f'{where} lacks a file or a text: expected {{"file": path, "text": text}}')
    text = " ".join(text.split())
    if not text:
        raise UserError(f"{where}: the text of {ref!r} is empty; write one or leave the line out")
    if halved(text):
        raise UserError(f"{where}: the text of {ref!r} holds half a character, {text!r}: write it again")
    if len(text) > LONGEST:
        raise UserError(f"{where}: the text of {ref!r} has {len(text)} characters; at most {LONGEST} are read")
    return posixpath.normpath(ref), text


def halved(text: str) -> bool:
    """Whether it holds half a character, which no encoder can read."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def said(text: object) -> str:
    """A text that others wrote, which may be anything: "" where it says nothing."""
    text = " ".join(text.split()) if isinstance(text, str) else ""
    return text if any(map(str.isalnum, text)) and not halved(text) else ""
