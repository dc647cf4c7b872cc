"""Inputs of every kind -> captures: WARC, WACZ, folders of saved pages, img2dataset's output."""

import hashlib
import json
import mimetypes
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from semantica.errors import UserError
from semantica.files import sha256
from semantica.train.pages.config import MAX_BODY, MAX_HTML
from semantica.train.pages.links import Link, canonical, is_image_url, whole_characters
from semantica.train.pages.warc import Capture, Say, captures

WARC_SUFFIXES = (".warc", ".warc.gz")
PAGE_SUFFIXES = (".html", ".htm", ".xhtml")
PAGE_COLUMN = "page"
BLOCK = 1 << 20
# of the JSON beside a picture in img2dataset's tar files
MAX_JSON = 1 << 20


@dataclass(frozen=True)
class Input:
    """One unit of work. kind: warc, wacz, folder or img2dataset; digest: SHA-256 of its content."""

    path: str
    kind: str
    digest: str = ""


@dataclass(frozen=True)
class LinkedPicture:
    """A page's link to a picture, told by a table instead of by the page itself."""

    page: str
    link: Link


def find_inputs(paths: tuple[Path, ...]) -> list[Input]:
    """What the paths hold, in order: files by their suffix, folders by what lies in them.

    Raises:
        UserError: a path that is missing or holds nothing that can be read.
    """
    found: list[Input] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"input {str(path)!r} does not exist: give a WARC or WACZ file, or a folder")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [Input(str(file), kind) for file in inside if file.is_file() and (kind := kind_of(file.name))]
        if not files and path.is_dir() and next(listed(path, PAGE_SUFFIXES), None):
            files = [Input(str(path), "folder")]
        if not files:
            raise UserError(
                f"input {str(path)!r} is none that can be read: give .warc, .warc.gz or .wacz files, img2dataset's "
                ".tar files, or a folder with saved .html pages"
            )
        found += files
    return found


def kind_of(name: str) -> str | None:
    name = name.lower()
    if name.endswith(WARC_SUFFIXES):
        return "warc"
    return {".wacz": "wacz", ".tar": "img2dataset"}.get(Path(name).suffix)


def listed(folder: Path, suffixes: tuple[str, ...] | None = None) -> Iterator[str]:
    """Relative paths of the files below a folder, sorted; links are not followed."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(where, name)
            if not name.startswith(".") and (suffixes is None or name.lower().endswith(suffixes)):
                if not path.is_symlink() and path.is_file():
                    yield path.relative_to(folder).as_posix()


def digest(source: Input) -> str:
    """SHA-256 of an input's content: of a folder, of its files' names and contents."""
    whole = hashlib.sha256(source.kind.encode())
    if source.kind == "folder":
        for name in listed(Path(source.path)):
            whole.update(os.fsencode(name) + b"\0" + bytes.fromhex(sha256(Path(source.path, name))))
    else:
        whole.update(bytes.fromhex(sha256(Path(source.path))))
    return whole.hexdigest()


def events(source: Input, say: Say) -> Iterator[Capture | LinkedPicture]:
    """All captures of one input, in order; `say(place, what)` is told what is broken."""
    path = Path(source.path)
    try:
        if source.kind == "warc":
            with open(path, "rb") as file:
                yield from captures(file, say)
        elif source.kind == "wacz":
            yield from from_wacz(path, say)
        elif source.kind == "folder":
            yield from from_folder(path, say)
        else:
            yield from from_img2dataset(path, say)
    except OSError as error:
        say("file", f"cannot be read: {error.strerror or error}")


def from_wacz(path: Path, say: Say) -> Iterator[Capture]:
    """WACZ 1.1.1: a ZIP file with WARC files in `archive/`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.lower().endswith(WARC_SUFFIXES))
            if not names:
                say("file", "wacz: holds no WARC file")
            for name in names:
                with archive.open(name) as file:
                    yield from captures(file, lambda place, what, name=name: say(f"{name[:200]}, {place}", what))
    # broken ZIP files fail in many ways
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        say("file", f"wacz: {str(error)[:100]}")


def from_folder(folder: Path, say: Say) -> Iterator[Capture]:
    """Saved pages as captures of `file:` addresses relative to the folder, so that no link leads outside it."""
    for name in listed(folder):
        page = name.lower().endswith(PAGE_SUFFIXES)
        guess = mimetypes.guess_type(name)[0] or ""
        if not (page or is_image_url(name) or guess.startswith("image/") or "." not in Path(name).name):
            continue
        # names are bytes, and need not be text
        url = canonical("file:///" + quote(os.fsencode(name)))
        if url is None:
            say(name[:200], "name too long")
            continue
        limit = MAX_HTML if page else MAX_BODY
        with open(folder / name, "rb") as file:
            body = file.read(limit + 1)
        if len(body) > limit:
            say(name, f"longer than {limit >> 20} MiB")
            yield Capture(url, 0, "error", target="too_long")
            continue
        mark = "sha256:" + hashlib.sha256(body).hexdigest()
        yield Capture(url, 0, "html" if page else "picture", body, digest=mark)


def from_img2dataset(path: Path, say: Say) -> Iterator[Capture | LinkedPicture]:
    """Samples `<key>.<image suffix>` + `<key>.json` of a tar file; the JSON holds `url` and `page`."""
    waiting: dict[str, dict] = {}
    nameless = 0
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}"
                if not member.isreg() or suffix not in ("json", "jpg", "jpeg", "png", "webp"):
                    continue
                if member.size > (MAX_JSON if suffix == "json" else MAX_BODY):
                    say(member.name[:200], "too large")
                    continue
                data = tar.extractfile(member).read()
                # one sample's members stand together
                sample = waiting.setdefault(key, {})
                sample["json" if suffix == "json" else "body"] = data
                if len(sample) < 2:
                    waiting = {key: sample}
                    continue
                waiting = {}
                found = sample_events(sample, member.name, say)
                nameless += found is None
                yield from found or ()
    except (tarfile.TarError, EOFError) as error:
        say("file", f"tar: {str(error)[:100]}")
    if nameless:
        say("file", f"{nameless} samples without page: run img2dataset with --save_additional_columns "
            f"'[\"{PAGE_COLUMN}\"]'")  # fmt: skip


def sample_events(sample: dict, name: str, say: Say) -> list[Capture | LinkedPicture] | None:
    try:
        record = json.loads(sample["json"])
        url, page = canonical(str(record["url"])), record.get(PAGE_COLUMN)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        say(name[:200], "no JSON of img2dataset")
        return []
    page = canonical(str(page)) if page else None
    if page is None:
        return None
    if url is None:
        say(name[:200], "no usable url")
        return []
    link = Link(url, whole_characters(str(record.get("caption") or ""))[:500], "table", 0)
    return [Capture(url, 0, "picture", sample["body"]), LinkedPicture(page, link)]
