"""Stored tokens: what a frozen encoder makes of each picture, computed once and memory-mapped in training.

A stored token belongs to one view of its picture, so two views are kept: the centre square and its mirror image, which
is what sampling shows the encoder. Flips of the condition stay random, its crop is always the centre; targets are
pictures, cut as ever. The folder is written by `semantica.train.data.encode`:

    TOKENS/identity.json            the encoder (source, weights, size, kind of tokens), the views, the arithmetic
    TOKENS/encoder/                 the encoder itself, for sampling; its weights are only read there
    TOKENS/NAME.safetensors         tokens fp16 [n, 2, M, C], pooled fp16 [n, 2, C]; one per shard, or per 256 MiB
    TOKENS/NAME.table.safetensors   hashes of the pictures and of each view's tokens
    TOKENS/index.json               identity and SHA-256 of every file; written last
"""

import hashlib
import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import nn

from semantica.errors import UserError
from semantica.files import UNSAFE, read_json, sha256
from semantica.images import BadImage
from semantica.train.data.draws import Ref
from semantica.train.data.source import MARK, Source

FORMAT = 1
# the centre, and its mirror image
VIEWS = 2
# a safetensors header longer than this is none of ours
MAX_HEADER = 1 << 20


@dataclass(frozen=True)
class Table:
    """What is known of the pictures in one file of tokens, n of them.

    picture [n, 16], row [n, 2, 16]: of each picture's bytes, and of each view's tokens and pooled vector, the first
    half of the SHA-256. usable [n]: 0 where the picture could not be decoded. For pictures in folders also size, mtime
    [n] (bytes, nanoseconds) and names, their paths relative to the data folder joined by zero bytes.
    """

    picture: np.ndarray
    row: np.ndarray
    usable: np.ndarray
    size: np.ndarray | None = None
    mtime: np.ndarray | None = None
    names: np.ndarray | None = None

    def columns(self) -> tuple[np.ndarray | None, ...]:
        """What has a row for each picture."""
        return self.picture, self.row, self.usable, self.size, self.mtime

    def paths(self) -> list[str]:
        return self.names.tobytes().decode("utf-8", "surrogateescape").split("\0")


class Tokens:
    """The stored tokens of the pictures of some data. Made by `attach`.

    Args:
        root: their folder.
        identity: what identity.json holds.
        files: the files in use, (name, number of pictures), in the order in which their pictures are numbered.
        row, usable: of all pictures, see `Table`.
        numbers: reference -> number of a picture; None where they are the same.
    """

    def __init__(
        self,
        root: Path,
        identity: dict,
        files: list[tuple[str, int]],
        row: np.ndarray,
        usable: np.ndarray,
        numbers: dict[Ref, int] | None,
    ):
        self.root, self.identity, self.files = root, identity, files
        self.row, self.usable, self.numbers = row, usable, numbers
        self.ends = np.cumsum([count for _, count in files])
        self.shape = tuple(identity["shape"])
        self.maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        # a mapping would be sent to workers as bytes
        return {**self.__dict__, "maps": {}}

    def digest(self) -> str:
        """64 hex digits over the identity and the hashes of all tokens."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode() + self.row.tobytes()).hexdigest()

    def check(self, ref: Ref) -> None:
        """Raises `BadImage` for a picture without tokens."""
        if not self.usable[self._number(ref)]:
            raise BadImage("it could not be decoded when tokens were stored", str(ref))

    def read(self, ref: Ref, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens fp16 `[M, C]` and pooled vector fp16 `[C]` of a picture's centre, or of its mirror image.

        They lie in the mapped file: nothing is copied. Their hash is checked.

        Raises:
            UserError: they are not what was stored.
        """
        number = self._number(ref)
        file = int(np.searchsorted(self.ends, number, side="right"))
        if file not in self.maps:
            self.maps[file] = mapped(self.root / f"{self.files[file][0]}.safetensors", self.files[file][1], self.shape)
        place = number - int(self.ends[file]) + self.files[file][1], int(mirror)
        tokens, pooled = (array[place] for array in self.maps[file])
        if mark(tokens, pooled) != self.row[number, int(mirror)].tobytes():
            path = self.root / f"{self.files[file][0]}.safetensors"
            raise UserError(f"tokens in {path} are not what was stored: remove that file and {again(self.identity)}")
        return tokens, pooled

    def _number(self, ref: Ref) -> int:
        return ref if self.numbers is None else self.numbers[ref]


def mark(tokens: np.ndarray, pooled: np.ndarray) -> bytes:
    digest = hashlib.sha256(tokens)
    digest.update(pooled)
    return digest.digest()[:MARK]


def mapped(path: Path, count: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[n, 2, M, C]` and pooled vectors `[n, 2, C]` of a file, without reading them.

    Raises:
        UserError: the file is missing, cut short, or no safetensors file of these shapes.
    """
    wanted = {"tokens": (count, VIEWS, *shape), "pooled": (count, VIEWS, shape[1])}
    arrays = []
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= MAX_HEADER:
                raise ValueError
            header = json.loads(file.read(length))
        for name, expected in wanted.items():
            entry = header[name]
            if entry["dtype"] != "F16" or tuple(entry["shape"]) != expected:
                raise ValueError
            offset = 8 + length + int(entry["data_offsets"][0])
            arrays.append(np.memmap(path, np.float16, "r", offset, expected).view(np.ndarray))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or holds no stored tokens: remove it and store them again") from error
    return tuple(arrays)


def again(identity: dict) -> str:
    return f"run 'semantica pairs --tokens DATA --encoder {identity['encoder']['source']}' again"


def read_index(root: str | Path) -> dict:
    """index.json of stored tokens, with every file that it names in its place and whole by size.

    Raises:
        UserError: no finished tokens there, another format, a file that could execute code, or a file missing or cut.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is no folder of stored tokens: make one with 'semantica pairs --tokens DATA'")
    for path in sorted(root.iterdir()):
        if path.suffix.lower() in UNSAFE:
            raise UserError(f"{path} is refused unopened: stored tokens are safetensors and JSON; remove the file")
    if not (root / "index.json").is_file():
        raise UserError(f"{root} has no index.json: its tokens are not finished; run 'semantica pairs --tokens' again")
    index = read_json(root / "index.json")
    if index.get("format") != FORMAT:
        raise UserError(f"{root} has format {index.get('format')!r}: this version reads tokens of format {FORMAT}")
    try:
        named = {str(entry["name"]): int(entry["bytes"]) for entry in index["files"]}
        hint = again(index["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root}/index.json is not what was written: store the tokens again") from error
    for name, size in named.items():
        if posixpath.basename(name) != name or name.startswith("."):
            raise UserError(f"{root}/index.json names {name!r}, which leads out of the folder: store the tokens again")
        path = root / f"{name}.safetensors"
        there = path.stat().st_size if path.is_file() else "no"
        if there != size:
            raise UserError(f"{path} has {there} bytes instead of {size}: {hint}")
    return index


def read_table(root: Path, entry: dict) -> Table:
    """Raises `UserError` for a table that is missing or altered."""
    path = root / f"{entry['name']}.table.safetensors"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["table_sha256"]:
            raise ValueError
        return Table(**load(content))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} is missing or altered: remove it and store the tokens again") from error


def attach(data: Source, root: str | Path) -> Source:
    """The same data with its stored tokens.

    Raises:
        UserError: as `read_index`; tokens of other pictures, or a picture that is new or has changed since.
    """
    if "://" in str(root):
        raise UserError(f"--tokens {root} cannot be mapped into memory: give a folder of this machine")
    index, root = read_index(root), Path(root)
    if index["identity"]["data"] != data.kind:
        raise UserError(f"tokens in {root} belong to {index['identity']['data']}, and {data.root} holds {data.kind}")
    hint = f"tokens in {root} are not of these pictures; {again(index['identity'])}"
    entries, parts = {entry["name"]: entry for entry in index["files"]}, data.parts()
    used = list(entries if parts is None else parts)
    missing = [name for name in used if name not in entries]
    if missing:
        raise UserError(f"shard {missing[0]!r} has no stored tokens: {hint}")
    tables = [read_table(root, entries[name]) for name in used]
    numbers = None
    if parts is None:
        refs, count = data.refs(), sum(len(table.usable) for table in tables)
        # without paths, pictures were stored in their order
        named = any(table.names is not None for table in tables)
        known = [path for table in tables for path in table.paths()] if named else refs[:count]
        numbers = {ref: i for i, ref in enumerate(known)}
        missing = [ref for ref in refs if ref not in numbers]
        if missing:
            raise UserError(f"picture {missing[0]!r} has no stored tokens: {hint}")
        same = data.unchanged(refs, joined(tables), [numbers[ref] for ref in refs])
        if not same.all():
            raise UserError(f"picture {refs[same.argmin()]!r} changed since its tokens were stored: {hint}")
    else:
        for table, (name, refs) in zip(tables, parts.items(), strict=True):
            if not whole(table, refs, data):
                raise UserError(f"shard {name!r} changed since its tokens were stored: {hint}")
    files = [(name, len(table.usable)) for name, table in zip(used, tables, strict=True)]
    for name, count in files:
        mapped(root / f"{name}.safetensors", count, tuple(index["identity"]["shape"]))
    known = joined(tables)
    return data.with_tokens(Tokens(root, index["identity"], files, known.row, known.usable.astype(bool), numbers))


def joined(tables: list[Table]) -> Table:
    """The rows of all, without names."""
    columns = zip(*(table.columns() for table in tables))
    return Table(*(None if column[0] is None else np.concatenate(column) for column in columns))


def whole(table: Table, refs: Sequence[Ref], data: Source) -> bool:
    """Whether a table is of exactly these pictures, as they are now."""
    same = len(table.usable) == len(refs) if table.names is None else table.paths() == list(refs)
    return same and bool(data.unchanged(refs, table, range(len(refs))).all())


def stored_encoder(root: str | Path, source: str, size: int | None, tokens: str) -> nn.Module:
    """The encoder that tokens were made with, on the CPU: its weights are mapped, and read when they are used.

    Args:
        root: stored tokens. source, size, tokens: as `--encoder`, `--encoder-size` and `--encoder-tokens` say.

    Raises:
        UserError: as `read_index`; these are not the encoder that the tokens were made with, or its copy is damaged.
    """
    from semantica.model.encoders import frozen_encoder

    identity = read_index(root)["identity"]
    made = identity["encoder"]
    if made["origin"] != origin(source) and (made["source"] != source or Path(source).is_dir()):
        what = ", which has other weights now" if made["source"] == source else f", not {source}"
        raise UserError(
            f"tokens in {root} were made with --encoder {made['source']}{what}: give the same, or leave out --tokens"
        )
    for name, now, then in (
        ("size", size or made["default_size"], made["image_size"]),
        ("tokens", tokens, made["tokens"]),
    ):
        if now != then:
            raise UserError(f"tokens in {root} were made with --encoder-{name} {then}, not {now}: give the same")
    for name, digest in made["files"].items():
        path = Path(root) / "encoder" / posixpath.basename(name)
        if not path.is_file() or sha256(path) != digest:
            raise UserError(f"{path} is missing or altered: store the tokens again")
    return frozen_encoder(str(Path(root) / "encoder"), tokens=tokens)


def origin(source: str) -> str:
    """What tells one encoder's source from another: a hub name, or the hash of the weights in a folder."""
    from semantica.model.encoders import own_folder

    if not Path(source).is_dir():
        return source
    folder = own_folder(source) or Path(source)
    hashes = "".join(sha256(path) for path in sorted(folder.glob("*.safetensors")))
    return "sha256:" + hashlib.sha256(hashes.encode()).hexdigest()
