"""The decompressed bytes of a WARC file, readable past broken gzip members and lying records."""

import zlib
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO

CHUNK, OUT = 1 << 16, 1 << 20
# stored bytes of a member that hold the first of its record, whatever names and codes come before
HEAD = 1 << 12
MAGIC = b"\x1f\x8b\x08"
START = b"WARC/1."
# members between the last record and where reading stopped: far more than a reader looks ahead
MARKS = 4096


class BrokenMember(OSError):
    """A gzip member that cannot be decompressed further."""


class Bytes:
    """A forward-only view with two ways to go on after an error.

    `position` is the offset, in decompressed bytes, of what `read` gives next; `cut` tells that the file ended within
    a gzip member.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.gzip = file.read(3) == MAGIC
        file.seek(0)
        self.cut = False
        # (decompressed, stored) offsets at which reading can start
        self.marks: deque[tuple[int, int]] = deque(maxlen=MARKS)
        self._start(0, 0)

    def _start(self, position: int, stored: int) -> None:
        self.file.seek(stored)
        self.position, self.stored = position, stored
        self.ready, self.raw = b"", b""
        self.inflate = None
        self.member = stored
        if not self.gzip:
            self.marks.append((position, stored))

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; none at the end. Raises `BrokenMember`."""
        if size < 0:
            return b"".join(iter(lambda: self.read(OUT), b""))
        while not self.ready and self._fill():
            pass
        out, self.ready = self.ready[:size], self.ready[size:]
        self.position += len(out)
        return out

    def tell(self) -> int:
        return self.position

    def _fill(self) -> bool:
        if not self.gzip:
            self.ready = self.file.read(CHUNK)
            return bool(self.ready)
        if not self.raw:
            self.raw = self.file.read(CHUNK)
            self.stored += len(self.raw)
        if not self.raw:
            self.cut |= self.inflate is not None
            return False
        if self.inflate is None:
            # zeros between members are padding
            self.raw = self.raw.lstrip(b"\0")
            if not self.raw:
                return True
            self.member = self.stored - len(self.raw)
            self.marks.append((self.position, self.member))
            self.inflate = zlib.decompressobj(31)
        try:
            self.ready = self.inflate.decompress(self.raw, OUT)
        except zlib.error as error:
            raise BrokenMember(f"gzip: {error}") from error
        self.raw = self.inflate.unconsumed_tail
        if self.inflate.eof:
            self.raw, self.inflate = self.inflate.unused_data, None
        return True

    def next_member(self) -> bool:
        """After `BrokenMember`: go to the next gzip member that begins a record."""
        for at, stored in self._candidates(self.member + 1):
            try:
                head = zlib.decompressobj(31).decompress(stored, len(START))
            except zlib.error:
                continue
            if head == START:
                self._start(self.position, at)
                return True
        return False

    def _candidates(self, at: int) -> Iterator[tuple[int, bytes]]:
        """Places from one on that may begin a member, and its first bytes. The file is read once, however many."""
        self.file.seek(at)
        held, more = b"", True
        while more:
            more = self.file.read(OUT)
            held += more
            # those at the end are looked at when their bytes are there
            end = len(held) - HEAD if more else len(held)
            found = held.find(MAGIC)
            while 0 <= found < end:
                yield at + found, held[found : found + HEAD]
                found = held.find(MAGIC, found + 1)
            seen = found if found >= 0 else max(0, len(held) - len(MAGIC) + 1)
            at, held = at + seen, held[seen:]

    def next_record(self, after: int) -> bool:
        """Go to the first line that begins a record, at or beyond a decompressed offset; False if there is none."""
        position, stored = max((mark for mark in self.marks if mark[0] <= after), default=(None, None))
        if position is None:
            return False
        if not self.gzip:
            position, stored = after, stored + after - position
        # later marks are found again
        while self.marks and self.marks[-1][0] >= position:
            self.marks.pop()
        self._start(position, stored)
        tail = b"\n"
        while True:
            try:
                block = self.read(OUT)
            except BrokenMember:
                return self.next_member()
            if not block:
                return False
            if self.position <= after:
                continue
            skipped = max(0, after - (self.position - len(block)))
            text = tail + block[skipped:]
            found = text.find(b"\n" + START)
            if found >= 0:
                rest = text[found + 1 :]
                self.ready = rest + self.ready
                self.position -= len(rest)
                return True
            tail = text[-len(START) :]
