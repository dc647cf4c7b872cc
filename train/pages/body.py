"""The body of an HTTP response as its browser saw it: chunks joined, content encodings undone, sizes bounded."""

import zlib

import brotli

HTML_TYPES = {"text/html", "application/xhtml+xml", "application/vnd.wap.xhtml+xml"}


class BadBody(ValueError):
    """A body that cannot be decoded, or that would be too large."""


def decode(body: bytes, transfer: str, content: str, limit: int) -> bytes:
    """Undo Transfer-Encoding and Content-Encoding.

    Archives often store a body that was decoded already beside the header that says otherwise: what is plainly not
    encoded is taken as it is.

    Args:
        body: as stored.
        transfer, content: the two headers' values.
        limit: largest size of the result in bytes; never much more is allocated.

    Raises:
        BadBody: an unknown encoding, broken data, or a result above the limit.
    """
    if "chunked" in transfer.lower():
        body = dechunk(body)
    for name in reversed([part.strip().lower() for part in content.split(",")]):
        if name in ("gzip", "x-gzip"):
            body = inflate(body, 31, limit) if body[:2] == b"\x1f\x8b" else body
        elif name == "deflate":
            # some servers send it with zlib's frame, some without
            framed = len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
            body = inflate(body, 15 if framed else -15, limit)
        elif name == "br":
            body = unbrotli(body, limit)
        elif name not in ("", "identity", "none", "utf-8"):
            raise BadBody(f"unknown content encoding {name[:20]!r}")
    if len(body) > limit:
        raise BadBody(f"longer than {limit >> 20} MiB")
    return body


def dechunk(body: bytes) -> bytes:
    """Join the chunks; a body that does not begin with a chunk is returned as it is, one that ends early as far as
    it goes."""
    parts, at = [], 0
    while True:
        end = body.find(b"\r\n", at, at + 64)
        size = body[at:end].split(b";")[0].strip() if end > 0 else b""
        try:
            count = int(size, 16)
        except ValueError:
            return b"".join(parts) if parts else body
        if count <= 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + count])
        at = end + 2 + count + 2


def inflate(body: bytes, window: int, limit: int) -> bytes:
    machine = zlib.decompressobj(window)
    try:
        out = machine.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadBody(f"content encoding: {error}") from error
    if len(out) > limit:
        raise BadBody(f"content encoding: longer than {limit >> 20} MiB")
    return out


def unbrotli(body: bytes, limit: int) -> bytes:
    machine, parts, size = brotli.Decompressor(), [], 0
    try:
        piece = machine.process(body, output_buffer_limit=1 << 20)
        while True:
            parts.append(piece)
            size += len(piece)
            if size > limit:
                raise BadBody(f"content encoding: longer than {limit >> 20} MiB")
            if machine.is_finished() or machine.can_accept_more_data():
                return b"".join(parts)
            piece = machine.process(b"", output_buffer_limit=1 << 20)
    except brotli.error as error:
        raise BadBody("content encoding: broken brotli data") from error
