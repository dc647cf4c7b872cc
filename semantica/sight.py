"""What an encoder sees of a picture: the square that its own library would cut out of it, resized by its own filter."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from semantica.errors import UserError
from semantica.images import cut, fit

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

# longer pictures are not resized whole
LONG = 8


class Sight(NamedTuple):
    """How a picture becomes the square that an encoder is given.

    size: the square's side in pixels.
    resize: side that the picture's shorter side is resized to before the square is cut out of the middle; at least
        `size`. What lies beyond it is not seen.
    interpolation: a name in `FILTERS`, for which `resize` is given; None is `semantica.images.fit`, which sees the
        whole shorter side.
    nearest: margins of half a pixel go to the even neighbour, as in torchvision; elsewhere down, as in transformers.
    """

    size: int
    resize: int | None = None
    interpolation: str | None = None
    nearest: bool = False

    @property
    def zoom(self) -> float:
        """The square's side as a share of the picture's shorter side."""
        return self.size / (self.resize or self.size)

    def see(self, image: Image.Image) -> np.ndarray:
        """Of an RGB picture, uint8 `[size, size, 3]`: the picture resized, and the square cut out of it.

        Of pictures more than `LONG` times as long as high, and where all but a small part would be cut away, only what
        is seen is resized: a few hostile ones would fill the memory. Pillow then rounds between its two passes in
        another order.
        """
        if self.interpolation is None:
            return fit(image, self.size)
        short, kind = min(image.size), FILTERS[self.interpolation]
        resized = [self.resize if side == short else int(self.resize * side / short) for side in image.size]
        margins = [(side - self.size) / 2 for side in resized]
        left, top = (round(margin) if self.nearest else int(margin) for margin in margins)
        box = left, top, left + self.size, top + self.size
        if max(resized) <= LONG * min(self.resize, 2 * self.size):
            return np.array(image.resize(resized, kind).crop(box))
        scales = [side / whole for side, whole in zip(image.size, resized)]
        seen = tuple(min(place * scales[i % 2], image.size[i % 2]) for i, place in enumerate(box))
        return np.array(image.resize((self.size, self.size), kind, seen))

    def cut(self, pixels: np.ndarray, x: float = 0.5, y: float = 0.5, zoom: float = 1.0) -> np.ndarray:
        """The same for training, to whole pixels: see `semantica.images.cut`."""
        return cut(pixels, self.size, x=x, y=y, zoom=zoom * self.zoom, interpolation=self.interpolation or "bicubic")


def sight_in(manifest: Mapping[str, Any], name: str, size: int) -> Sight:
    """That of a named input of a bundle. Raises `UserError` for one that was not written by this package."""
    said = manifest.get("sight", {}).get(name)
    if said is None:
        return Sight(size)
    try:
        sight = Sight(**said)
        whole = isinstance(sight.size, int) and isinstance(sight.resize, int) and sight.size == size
        if not whole or sight.interpolation not in FILTERS or not size <= sight.resize:
            raise ValueError
    except (TypeError, ValueError) as error:
        raise UserError(f"the bundle says {said} of how {name} is seen: export it again") from error
    return sight
