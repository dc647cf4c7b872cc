"""What training asks of a source of pictures: folders and shards are two, `semantica.train.data.open` knows which."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
from PIL import Image

from semantica.errors import UserError
from semantica.train.data.draws import SPLIT, Pair, Ref, generator

if TYPE_CHECKING:
    from semantica.train.data.captions import Captions
    from semantica.train.data.tokens import Table, Tokens

# bytes of a SHA-256 that a picture is known again by
MARK = 16


@dataclass(frozen=True)
class Stamp:
    """What a picture is known again by.

    sha: first `MARK` bytes of the SHA-256 of its bytes, zeros where they cannot be read. size, mtime: bytes and
    nanoseconds of its file, 0 where it has none of its own.
    """

    sha: bytes
    size: int = 0
    mtime: int = 0


class Source(Protocol):
    """Pictures in groups, from which pairs are drawn. A subclass is a frozen dataclass with these fields.

    root: where the pictures are. mode: what a pair is; in "reconstruct" a picture and itself.
    bad: (name, reason) of what cannot be used. tokens: what a frozen encoder made of the pictures, where it was stored.
    kind: the name that the source is registered by. remote: whether pictures are worth fetching ahead.
    captions: texts of the pictures, where `captioned` read them. alone: groups left out for they have one picture.
    """

    root: str | Path
    mode: str
    bad: tuple[tuple[str, str], ...]
    tokens: "Tokens | None"
    kind: ClassVar[str]
    remote: bool = False
    captions: "Captions | None" = None
    alone: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Samples of an epoch; at least 1."""
        ...

    def describe(self) -> str:
        """In words, for the log."""
        ...

    def digest(self) -> str:
        """16 hex digits over all that decides what is drawn, so that a resumed run can refuse other data."""
        ...

    def split(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Part the data into (training, held out), by `parted`; a fraction of 0 holds out none. Raises `UserError`."""
        ...

    def draw(self, seed: int, index: int, conditions: int = 1) -> Pair:
        """The pair of global sample `index`: a pure function of its arguments."""
        ...

    def target_candidates(self, group: Ref, start: Ref) -> Iterator[Ref]:
        """The possible targets of a group from one on and around, for when it proves broken."""
        ...

    def condition_candidates(self, group: Ref, target: Ref, start: Ref) -> Iterator[Ref]:
        """The possible conditions of a target from one on and around."""
        ...

    def load(self, ref: Ref, near: int | None) -> Image.Image:
        """A picture, as `semantica.images.load_image`: `near` is the shortest side, in pixels, that is still of use,
        None for the whole picture.

        Raises `BadImage`.
        """
        ...

    def pixels(self, ref: Ref, near: int) -> np.ndarray:
        """`load` as uint8 `[H, W, 3]`. Raises `BadImage`."""
        return np.array(self.load(ref, near))

    def name_of(self, ref: Ref) -> str:
        """A picture's name in messages."""
        return str(ref)

    def prefetch(self, refs: set[Ref]) -> None:
        """Fetch these pictures together, where the source is remote."""

    def captioned(self) -> Self:
        """With the texts of its pictures. Raises `UserError` where it has none."""
        raise UserError(
            f"{str(self.root)!r} holds {self.kind}, which have no texts: give a folder of pictures that has"
        )

    # what stored tokens ask

    def refs(self) -> Sequence[Ref]:
        """All pictures, in an order that stays."""
        ...

    def parts(self) -> dict[str, range] | None:
        """The files that pictures lie in, and the numbers of their pictures, which count on from file to file; None
        where each lies by itself."""
        return None

    def picture_bytes(self) -> int:
        """Of all pictures."""
        ...

    def stamp(self, ref: Ref) -> Stamp:
        """What a picture is known again by, also one that cannot be read."""
        ...

    def unchanged(self, refs: Sequence[Ref], table: "Table", rows: Sequence[int]) -> np.ndarray:
        """Which of the pictures `[n]` are still as the `n` rows of a table say: bool `[n]`."""
        return np.array([self.stamp(ref).sha == table.picture[row].tobytes() for ref, row in zip(refs, rows)], bool)

    def with_tokens(self, tokens: "Tokens") -> Self:
        return replace(self, tokens=tokens)


def parted(count: int, fraction: float, seed: int, what: str, advice: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the units to train on and of those held out: a fraction of them, at least one; none for 0.

    Args:
        count: units. what: they are, in the plural. advice: what else to do where they are too few.

    Raises:
        UserError: fraction outside [0, 1), or too few units to leave any for training.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"held-out fraction {fraction} is out of range: give at least 0 and less than 1")
    held = max(1, round(fraction * count)) if fraction else 0
    if held >= count:
        raise UserError(f"cannot hold out {held} of {count} {what}: add {what} or hold out a fraction of 0{advice}")
    order = generator(seed, SPLIT).permutation(count)
    return order[held:], order[:held]


def around(refs: Sequence[Ref], start: Ref) -> Iterator[Ref]:
    """From one on to the end, then from the first; `start` comes without a search, which only a broken one is worth."""
    yield start
    place = refs.index(start)
    yield from refs[place + 1 :]
    yield from refs[:place]
