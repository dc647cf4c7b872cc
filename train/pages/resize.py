"""`semantica pairs --resize`: shards whose pictures have the size that training shows, so that it decodes nothing else.

Each picture whose short side is longer becomes a JPEG of that short side, upright, without metadata, by the antialiased
bicubic filter that training uses; the others stay as they are. Pages, keys, similarities, embeddings, addresses, texts
and perceptual hashes stay; sizes and hashes become those of the new files, and the old ones are kept beside them.
"""

import functools
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from semantica.errors import UserError
from semantica.files import read_json, remove, sha256
from semantica.images import BadImage, load_image, probe_image
from semantica.train.data.shards import MARK, Shard, open_shards, pair_number, read_index, read_table
from semantica.train.data.store import Store
from semantica.train.pages.config import ResizeConfig
from semantica.train.pages.mine import locked, run_phase
from semantica.train.pages.report import write_report
from semantica.train.pages.runners import Local
from semantica.train.pages.store import write_json
from semantica.train.pages.write import SIDES, ShardFile

# 40 to 43 dB against the picture before it was compressed, 28 to 44 kB for a short side of 256 pixels
QUALITY, SUBSAMPLING = 95, "4:2:0"


@dataclass(frozen=True)
class Job:
    """What a unit's work needs: where shards come from and go to, the short side, and the index' entries."""

    root: str
    out: Path
    side: int
    shards: tuple[dict, ...]


@dataclass(frozen=True)
class Stored:
    """A picture as it is written. resized: whether it is another file than before."""

    data: bytes
    suffix: str
    sha: bytes
    width: int
    height: int
    resized: bool


def resize(config: ResizeConfig) -> dict:
    """Resize the pictures of shards, or finish what an interrupted run left; returns what stats.json holds.

    Raises:
        UserError: no shards there, or none on this machine; a folder that holds something else; the disk is full.
    """
    config.check()
    root = str(config.inputs[0])
    out = config.out or Path(f"{root.rstrip('/')}-{config.resize}px")
    data, index = open_shards(root, "reconstruct"), read_index(Store(root))
    entries = tuple(entry for entry in index["shards"] if entry["name"] in data.name)
    job = Job(root, out, config.resize, entries)
    identity = {"side": config.resize, "quality": QUALITY, "subsampling": SUBSAMPLING}
    begin(out, identity | {"of": sha256(Path(root) / "index.json")})
    for name, reason in data.bad:
        tqdm.write(f"left out, {name}: {reason}")
    with ExitStack() as stack:
        stack.enter_context(locked(out))
        runner = Local(config.processes or os.cpu_count() or 1)
        stack.callback(runner.close)
        missing = [unit for unit, entry in enumerate(entries) if not marker(out, entry["name"]).exists()]
        for unit, error in run_phase(runner, "resize", functools.partial(resize_shard, job), missing).items():
            raise UserError(f"shard {entries[unit]['name']!r} failed ({error}): the same command continues")
        marks = [read_json(marker(out, entry["name"])) for entry in entries]
        stats = told(read_json(Path(root) / "stats.json"), marks)
        shards = [mark["shard"] for mark in marks if mark["shard"]]
        new = {**index, "resized": identity, "shards": shards}
        write_json(out / "stats.json", stats)
        write_report(out, stats, new)
        # last: with it, the shards are complete
        write_json(out / "index.json", new)
        remove(out / "work")
    return stats


def resize_and_show(config: ResizeConfig) -> None:
    """`resize`, then what was done, in words."""
    counts = resize(config)["resized"]
    print(
        f"{counts['resized']:,} pictures resized, {counts['kept']:,} stay as they were, "
        f"{counts['left_out']:,} could not be read; {counts['bytes'] / 2**20:,.1f} MiB"
    )


def begin(out: Path, identity: dict) -> None:
    """Make the folder, or see that it was begun with the same shards and options. Raises `UserError`."""
    path = out / "resized.json"
    if path.exists():
        if read_json(path) != identity:
            raise UserError(f"{out} was made of other shards or with another --resize: choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no resized shards: choose another --out")
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
        (out / "done").mkdir(exist_ok=True)
        write_json(path, identity)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error


def marker(out: Path, name: str) -> Path:
    return out / "done" / f"{name}.json"


def told(before: dict, marks: list[dict]) -> dict:
    """stats.json: what is known of the pages as before, what is stored as now."""
    shards = [mark["shard"] for mark in marks if mark["shard"]]
    stored = {name: sum(shard[name] for shard in shards) for name in ("pages", "images", "pairs", "bytes")}
    sides: Counter[int] = Counter()
    for mark in marks:
        sides.update({int(side): count for side, count in mark["side"].items()})
    counts = {name: sum(mark[name] for mark in marks) for name in ("resized", "kept", "left_out")}
    return before | {
        "stored": stored | {"shards": len(shards)},
        "side": {str(side): count for side, count in sorted(sides.items())},
        "resized": counts | {"bytes": stored["bytes"]},
    }


def resize_shard(job: Job, unit: int) -> None:
    """Write one shard anew, then its marker `out/done/<name>.json`."""
    entry = job.shards[unit]
    store = Store(job.root)
    table = read_table(store, entry)
    counts, sides, new = Counter(), Counter(), None
    for stale in job.out.glob(f".{entry['name']}.*"):
        remove(stale)
    with tarfile.open(Path(job.root, f"{entry['name']}.tar"), "r:") as tar:
        for key, page, cosines in pages(table):
            members = {member.name: member for member in following(tar, f"{key.hex()}.json")}
            record = json.loads(tar.extractfile(members[f"{key.hex()}.json"]).read())
            suffixes = {name.split(".")[1]: name.split(".")[2] for name in members if name.count(".") == 2}
            found = [shown(store, entry["name"], table, i, job.side, suffixes[str(n)]) for n, i in enumerate(page)]
            use = [n for n, picture in enumerate(found) if picture is not None]
            counts["left_out"] += len(found) - len(use)
            if len(use) < 2:
                continue
            embedded = members.get(f"{key.hex()}.emb.npy")
            if embedded is not None:
                vectors = np.load(io.BytesIO(tar.extractfile(embedded).read()), allow_pickle=False)[use]
                rows, columns = np.triu_indices(len(use), 1)
                cosines = cosines[pair_number(np.array(use)[rows], np.array(use)[columns], len(found))]
            new = new or ShardFile(job.out, entry["name"])
            pictures = [found[n] for n in use]
            record["images"] = [described(record["images"][n], found[n]) for n in use]
            new.add(
                key,
                [(picture.data, picture.suffix, picture.sha) for picture in pictures],
                None if embedded is None else vectors,
                None if embedded is None else cosines,
                record,
            )
            for picture in pictures:
                counts["resized" if picture.resized else "kept"] += 1
                sides[min(picture.width, picture.height) // SIDES * SIDES] += 1
    mark = {"shard": new.close() if new else None, "side": {str(side): count for side, count in sides.items()}}
    write_json(marker(job.out, entry["name"]), mark | {name: counts[name] for name in ("resized", "kept", "left_out")})


def pages(table: Shard) -> Iterator[tuple[bytes, range, np.ndarray]]:
    """Of each page its key, the numbers of its pictures, and its similarities."""
    first = start = 0
    for key, count in zip(table.key, table.count.tolist()):
        pairs = count * (count - 1) // 2
        yield key.tobytes(), range(first, first + count), table.cosine[start : start + pairs]
        first, start = first + count, start + pairs


def following(tar: tarfile.TarFile, last: str) -> Iterator[tarfile.TarInfo]:
    """The next members, up to one. Raises `ValueError` where it does not come."""
    while (member := tar.next()) is not None:
        # read once, from front to back: what was seen is not kept
        tar.members = []
        yield member
        if member.name == last:
            return
    raise ValueError(f"member {last} is missing")


def shown(store: Store, name: str, table: Shard, number: int, side: int, suffix: str) -> Stored | None:
    """One picture as it is to be stored, or None where it is damaged."""
    try:
        data = store.read(f"{name}.tar", int(table.offset[number]), int(table.size[number]))
        sha = hashlib.sha256(data).digest()
        if sha[:MARK] != table.sha[number].tobytes():
            return None
        probe = probe_image(io.BytesIO(data))
        if min(probe.width, probe.height) <= side:
            return Stored(data, suffix, sha, probe.width, probe.height, False)
        smaller = shrink(load_image(io.BytesIO(data)), side)
    except BadImage:
        return None
    buffer = io.BytesIO()
    smaller.save(buffer, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING, optimize=True)
    data = buffer.getvalue()
    return Stored(data, "jpg", hashlib.sha256(data).digest(), *smaller.size, True)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """An upright picture whose short side is `side`."""
    width, height = image.size
    short = min(width, height)
    return image.resize((round(width * side / short), round(height * side / short)), Image.Resampling.BICUBIC)


def described(before: dict, picture: Stored) -> dict:
    """What a page's record says of a picture; of one that was resized also what it was."""
    if not picture.resized:
        return before
    now = {"width": picture.width, "height": picture.height, "sha256": picture.sha.hex()}
    return before | now | {"source": {name: before.get(name) for name in now}}
