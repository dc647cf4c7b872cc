"""A picture larger than a segmenter looks at, in windows that overlap: probabilities, then the class of each pixel."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from semantica.errors import UserError
from semantica.images import to_tensor
from semantica.segmentation.segmenter import Segmenter

# where no class is likely enough; as the field's data sets mark what is ignored
EMPTY = 255
# longer pictures have too many windows
LONG = 8


@dataclass(frozen=True)
class Windows:
    """Windows over a picture, and the whole of it squeezed into one.

    scale: the picture's shorter side, as a multiple of a window's. overlap: of neighbouring windows, as a share of one.
    The defaults are the authors' for square pictures (640 pixels in windows of 384).

    Raises:
        UserError: a scale below 1 or above 8, or an overlap outside [0, 1).
    """

    scale: float = 5 / 3
    overlap: float = 1 / 3

    def __post_init__(self):
        if not 1 <= self.scale <= 8 or not 0 <= self.overlap < 1:
            raise UserError(f"windows of scale {self.scale:g}, overlap {self.overlap:g}: give 1 to 8, and 0 to below 1")


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin on a line: as few as cover it with at least this overlap, at equal distances."""
    most = max(1, int(window * (1 - overlap)))
    count = 1 + math.ceil((length - window) / most)
    return [round(i * (length - window) / max(count - 1, 1)) for i in range(count)]


def squeezed(picture: Image.Image, width: int, height: int) -> Tensor:
    """An RGB picture of any shape resized to `[1, 3, height, width]` in [-1, 1]."""
    resized = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return to_tensor(np.asarray(resized)[None])


def probabilities(
    segmenter: Segmenter, picture: Image.Image, classes: Tensor, windows: Windows | None = None, batch: int = 4
) -> Tensor:
    """How likely each place of a picture belongs to each class.

    Without windows the picture is squeezed into the square that the segmenter looks at. With them it is cut into
    squares at its own shape; where several lie over each other their mean counts, and the mean with the squeezed one
    is returned.

    Args:
        picture: RGB. classes: `[T, P, width]`, see `Segmenter.embed`. batch: windows at a time.

    Returns:
        `[T, h, w]` in [0, 1]: four times the grid of tokens, or that of the picture in windows.
    """
    side, device = segmenter.image_size, segmenter.device

    def logits(pixels: Tensor) -> Tensor:
        return segmenter(pixels.to(device), classes).sigmoid()

    with torch.no_grad():
        whole = logits(squeezed(picture, side, side))[0]
        if windows is None:
            return whole
        short = min(picture.size)
        if max(picture.size) > LONG * short:
            size = f"{picture.width} x {picture.height}"
            raise UserError(f"a picture of {size} is too long for windows: cut it, or leave them out")
        width, height = (max(side, round(side * windows.scale * length / short)) for length in picture.size)
        pixels = squeezed(picture, width, height)
        places = [(y, x) for y in starts(height, side, windows.overlap) for x in starts(width, side, windows.overlap)]
        made = whole.new_zeros(len(whole), height, width)
        cover = whole.new_zeros(height, width)
        for begin in range(0, len(places), batch):
            some = places[begin : begin + batch]
            parts = logits(torch.cat([pixels[..., y : y + side, x : x + side] for y, x in some]))
            parts = F.interpolate(parts, (side, side), mode="bilinear", align_corners=False)
            for (y, x), part in zip(some, parts, strict=True):
                made[:, y : y + side, x : x + side] += part
                cover[y : y + side, x : x + side] += 1
        whole = F.interpolate(whole[None], (height, width), mode="bilinear", align_corners=False)[0]
        return (made / cover + whole) / 2


def upsampled(likely: Tensor, picture: Image.Image) -> Iterator[Tensor]:
    """Probabilities `[T, h, w]` at the picture's own size, a class `[H, W]` at a time: all of them may not fit."""
    for one in likely:
        size = picture.height, picture.width
        yield F.interpolate(one[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def segment(
    segmenter: Segmenter,
    picture: Image.Image,
    names: Sequence[str],
    windows: Windows | None = None,
    threshold: float = 0.0,
) -> np.ndarray:
    """The likeliest class of each pixel.

    Args:
        picture: RGB, of any size. names: of classes. threshold: pixels whose likeliest class is not at least as likely
            stay empty.

    Returns:
        int `[H, W]`, numbers of classes in the order of names; -1 where it is empty.

    Raises:
        UserError: no names, one of them without words, or a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold:g}: give a probability, 0 to 1")
    numbers = segmenter.numbers(names).to(segmenter.device)
    with torch.no_grad():
        likely = probabilities(segmenter, picture, segmenter.embed(numbers), windows)
        best = likely.new_full((picture.height, picture.width), -1.0)
        owner = torch.full(best.shape, -1, dtype=torch.int32, device=best.device)
        for number, one in enumerate(upsampled(likely, picture)):
            owner = owner.masked_fill(one > best, number)
            best = best.maximum(one)
    return owner.masked_fill(best < threshold, -1).cpu().numpy()


def locate(segmenter: Segmenter, picture: Image.Image, phrase: str, threshold: float = 0.5) -> np.ndarray:
    """Where in a picture a phrase is: bool `[H, W]`, pixels at least as likely as the threshold.

    Raises:
        UserError: the phrase has no words, or is nowhere in the picture.
    """
    found = segment(segmenter, picture, [phrase], threshold=threshold) == 0
    if not found.any():
        raise UserError(f"{phrase!r} is nowhere in the picture: name something that it shows")
    return found
