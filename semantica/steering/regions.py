"""Regions of a condition picture as patch tokens: a box, a point or a mask."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from semantica.errors import UserError
from semantica.images import fit, load_image


def grey(path: Path, side: int) -> np.ndarray:
    """A picture's middle square as brightness, float32 `[side, side]` in [0, 1]."""
    return fit(load_image(path), side).mean(2, dtype=np.float32) / 255


def square(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle square of a mask bool `[H, W]`, float32 `[side, side]` in [0, 1]."""
    image = Image.fromarray(np.where(pixels, 255, 0).astype(np.uint8)).convert("RGB")
    return fit(image, side)[..., 0].astype(np.float32) / 255


@dataclass(frozen=True)
class Region:
    """A part of a picture, one of four.

    Places are shares of the square in the picture's middle, which is what encoders see: x to the right, y down, 0 to 1.

    box: left, top, right, bottom; patches whose middle lies in it. point: x, y; the patch that it lies in. mask: a
    picture, light where the object is; patches of which at least half is. pixels: the same as bool `[H, W]`, of the
    whole picture.

    Raises:
        UserError: not exactly one of them, or a place outside the picture.
    """

    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    mask: Path | None = None
    pixels: np.ndarray | None = None

    def __post_init__(self):
        if sum(part is not None for part in (self.box, self.point, self.mask, self.pixels)) != 1:
            raise UserError("a region is a box, a point or a mask: give one of them")
        for name, count in (("box", 4), ("point", 2)):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != count or not all(math.isfinite(v) and 0 <= v <= 1 for v in values):
                raise UserError(f"{name} {list(values)} lies outside the picture: give {count} shares of it, 0 to 1")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise UserError(
                f"box {list(self.box)} is empty: give left, top, right, bottom with left < right, top < bottom"
            )

    def patches(self, side: int) -> tuple[int, ...]:
        """Numbers of its patches on a grid of side x side, row by row. Raises `UserError` where there are none."""
        if self.mask is not None or self.pixels is not None:
            light = grey(self.mask, side * 8) if self.pixels is None else square(self.pixels, side * 8)
            inside = light.reshape(side, 8, side, 8).mean((1, 3)) >= 0.5
        elif self.point is not None:
            x, y = (min(int(value * side), side - 1) for value in self.point)
            return (y * side + x,)
        else:
            left, top, right, bottom = self.box
            middles = (np.arange(side) + 0.5) / side
            inside = ((middles >= top) & (middles <= bottom))[:, None] & (middles >= left) & (middles <= right)
        found = tuple(int(number) for number in np.flatnonzero(inside))
        if not found:
            what = f"box {list(self.box)}" if self.box else f"mask {self.mask}" if self.mask else "what is there"
            raise UserError(
                f"{what} holds none of the picture's {side} x {side} patches: give a larger one, or a point"
            )
        return found

    def tokens(self, patches: int, tokens: int, picture: int = 0, pictures: int = 1) -> tuple[int, ...]:
        """Its tokens in a stream.

        Args:
            patches: of one picture, a square; they come last among its tokens. tokens: of the stream.
            picture: which of the sample's `pictures`, counted from 0.

        Raises:
            UserError: there is no such picture, or no patch in the region.
        """
        if not 0 <= picture < pictures:
            raise UserError(f"picture {picture} of {pictures}: they count from 0")
        each = tokens // pictures
        start = picture * each + each - patches
        return tuple(start + number for number in self.patches(math.isqrt(patches)))
