"""WARC files -> captures. Requests are never looked at; broken records are named, and reading goes on behind them."""

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from semantica.train.pages.body import HTML_TYPES, BadBody, decode
from semantica.train.pages.config import MAX_BODY, MAX_HTML
from semantica.train.pages.links import canonical, is_image_url
from semantica.train.pages.stream import BrokenMember, Bytes

# after so many broken places a file is given up
PATIENCE = 100
KINDS = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.revisit
PLAIN_TYPES = {"", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded", "unk"}

Say = Callable[[str, str], None]


@dataclass(frozen=True)
class Capture:
    """What a crawl holds for one URL at one time.

    kind: "html", "picture" (a body that may be one), "redirect", "revisit", "other" (a body that is neither) or
        "error".
    body: decoded, for "html" and "picture".
    charset: of HTML, as the server said it.
    digest: of the payload, in WARC's notation; what revisits refer to.
    target: URL of a redirect, or the one a revisit refers to; reason of an error.
    target_time: of what a revisit refers to, 0 where it does not say.
    """

    url: str
    time: int
    kind: str
    body: bytes = b""
    charset: str = ""
    digest: str = ""
    target: str = ""
    target_time: int = 0


def captures(file: BinaryIO, say: Say) -> Iterator[Capture]:
    """All captures of a WARC file, in order.

    Args:
        file: a seekable binary file, gzipped or plain.
        say: is told (place, what is wrong) of all that is broken.
    """
    stream = Bytes(file)
    for _ in range(PATIENCE):
        last = end = stream.position
        try:
            # our own stream decompresses, since it can go on behind a broken member
            for record in ArchiveIterator(stream, KINDS, parse_http=False, stream_detect=False, fsspec_args=False):
                last = record.stream_pos
                end = last + record.content_length
                found = capture(record, lambda what, at=last: say(f"byte {at}", what))
                if found is not None:
                    yield found
            # a record that nobody read and that claims more than there is hides those behind it
            if end <= stream.position:
                break
            raise OSError("longer than the file")
        except BrokenMember as error:
            say(f"byte {last}", str(error))
            going = stream.next_member()
        except OSError as error:
            say(f"byte {last}", f"record: {error}")
            going = stream.next_record(last + 1)
        if not going:
            break
    else:
        say("file", f"given up after {PATIENCE} broken places")
    if stream.cut:
        say("file", "gzip: ends in the middle of a record")


def capture(record: WarcRecord, say: Callable[[str], None]) -> Capture | None:
    """One record as a capture, or None for what is of no use here. Raises `OSError` where the file is broken."""
    headers = record.headers
    url = canonical((headers.get("WARC-Target-URI") or "").strip().strip("<>"))
    if url is None:
        return None
    time = seconds(headers.get("WARC-Date"))
    kind = record.record_type
    if kind == WarcRecordType.revisit:
        target = canonical(headers.get("WARC-Refers-To-Target-URI") or "") or ""
        digest = headers.get("WARC-Payload-Digest") or ""
        return Capture(url, time, "revisit", digest=digest, target=target, target_time=seconds(
            headers.get("WARC-Refers-To-Date")))  # fmt: skip
    status, mime, charset, transfer, content = 200, headers.get("Content-Type") or "", "", "", ""
    if kind == WarcRecordType.response:
        if not record.is_http:
            return None
        try:
            record.parse_http()
        except OSError:
            raise
        except Exception as error:
            say(f"HTTP header: {str(error)[:80] or type(error).__name__}")
            return None
        http = record.http_headers
        if http is None:
            say("HTTP header: none")
            return None
        status, mime = http.status_code or 0, http.get("Content-Type") or ""
        transfer, content = http.get("Transfer-Encoding") or "", http.get("Content-Encoding") or ""
        if 300 <= status < 400:
            target = canonical(http.get("Location") or "", url)
            return Capture(url, time, "redirect", target=target) if target else None
    digest = headers.get("WARC-Payload-Digest") or ""
    if not 200 <= status < 300:
        return Capture(url, time, "error", digest=digest, target="http_error")
    mime, _, parameters = mime.partition(";")
    mime = mime.strip().lower()
    found = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters, re.IGNORECASE)
    charset = found[1] if found else ""
    html = mime in HTML_TYPES
    if not (html or mime.startswith("image/") or mime in PLAIN_TYPES or is_image_url(url)):
        return Capture(url, time, "other", digest=digest)
    limit = MAX_HTML if html else MAX_BODY
    length = record.content_length
    stored = record.reader.read(limit + 1)
    if len(stored) < min(length, limit + 1):
        raise OSError(f"ends after {len(stored)} of {length} bytes")
    if not digest:
        digest = "sha1:" + base64.b32encode(hashlib.sha1(stored, usedforsecurity=False).digest()).decode()
    try:
        if len(stored) > limit:
            raise BadBody(f"longer than {limit >> 20} MiB")
        body = decode(stored, transfer, content, limit)
    except BadBody as error:
        say(f"body: {error}")
        reason = "too_long" if "longer" in str(error) else "encoding"
        return Capture(url, time, "error", target=reason, digest=digest)
    return Capture(url, time, "html" if html else "picture", body, charset, digest)


def seconds(date: str | None) -> int:
    """A WARC date as seconds since 1970; 0 if it cannot be read."""
    try:
        return int(datetime.strptime((date or "")[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC).timestamp())
    except ValueError:
        return 0
