"""Alternative texts of the pictures in shards: what pages said of them, from the record beside each page's pictures."""

import io
import json
import tarfile
from typing import TYPE_CHECKING

from semantica.errors import first_line
from semantica.images import BadImage
from semantica.train.data.captions import Captions, said
from semantica.train.data.source import MARK

if TYPE_CHECKING:
    from semantica.train.data.shards import ShardData

# records that are asked for together, where each request takes its time
TOGETHER = 64

# what reading a damaged record raises
BROKEN = BadImage, ValueError, KeyError, TypeError, AttributeError, RecursionError, tarfile.TarError

# a file, and the place and size of bytes in it
Span = tuple[str, int, int]


def read_alts(data: "ShardData") -> tuple[Captions, list[tuple[str, str]]]:
    """Texts of the targets that have one, by their number; and (page, reason) of records that cannot be used."""
    texts: dict[int, tuple[str, ...]] = {}
    bad: list[tuple[str, str]] = []
    sizes = [data.store.size(f"{name}.tar") for name in data.name]
    for start in range(0, len(data.page), TOGETHER):
        pages = data.page[start : start + TOGETHER].tolist()
        spans = [span(data, page, sizes) for page in pages]
        if data.remote:
            data.store.fetch(spans)
        for page, place in zip(pages, spans):
            first, last = int(data.first[page]), int(data.first[page] + data.count[page])
            try:
                alts = read_record(data.store.read(*place), [sha.tobytes() for sha in data.sha[first:last]])
            except BROKEN as error:
                why = error.reason if isinstance(error, BadImage) else first_line(error)
                bad.append((f"{place[0]}:{data.key[page].tobytes().hex()}.json", f"no texts of its page: {why}"))
                continue
            for ref, alt in enumerate(alts, first):
                if alt and data.targets[ref]:
                    texts[ref] = (alt,)
    return Captions(texts), bad


def span(data: "ShardData", page: int, sizes: list[int]) -> Span:
    """Where what follows a page's pictures lies: from the last of them to the first of the next page, or the end."""
    shard, last = int(data.shard[page]), int(data.first[page] + data.count[page]) - 1
    begin = int(data.offset[last]) + padded(int(data.size[last]))
    following = page + 1 < len(data.shard) and data.shard[page + 1] == shard
    end = int(data.offset[data.first[page + 1]]) - tarfile.BLOCKSIZE if following else sizes[shard]
    return f"{data.name[shard]}.tar", begin, end - begin


def padded(size: int) -> int:
    return size + -size % tarfile.BLOCKSIZE


def read_record(members: bytes, marks: list[bytes]) -> list[str]:
    """The texts of a page's pictures, "" for none.

    Args:
        members: of the tar file, the page's record among them. marks: of each picture's SHA-256.

    Raises:
        one of `BROKEN`: there is no such record.
    """
    with tarfile.open(fileobj=io.BytesIO(members), mode="r:") as tar:
        record = next((member for member in tar if member.name.endswith(".json")), None)
        if record is None:
            raise ValueError("none there")
        images = json.loads(tar.extractfile(record).read())["images"]
    if [bytes.fromhex(image["sha256"])[:MARK] for image in images] != marks:
        raise ValueError("of other pictures")
    return [said(image.get("alt")) for image in images]
