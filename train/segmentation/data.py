"""Pictures with a class for each pixel, from a folder; every sample is a pure function of (seed, number)."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from semantica.errors import UserError
from semantica.images import fit, load_image, to_tensor
from semantica.segmentation.windows import EMPTY
from semantica.train.data.draws import generator

# streams of random numbers: which picture, and how it is cut
ORDER, VIEW = range(2)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Labelled:
    """A folder of pictures and masks; see `semantica.train.segmentation.config.TrainSegmenterConfig.data`.

    files: (picture, mask) of each, in the order of their names. classes: their names.
    """

    files: tuple[tuple[Path, Path], ...]
    classes: tuple[str, ...]

    @classmethod
    def open(cls, root: Path) -> "Labelled":
        """Raises `UserError`: the folder lacks a part, or a picture its mask."""
        try:
            classes = json.loads((root / "classes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{root / 'classes.json'} cannot be read as JSON: give a list of the classes' names"
            ) from error
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise UserError(f"{root / 'classes.json'} is no list of names: give one for each number in the masks")
        if len(classes) > EMPTY or len(set(classes)) < len(classes):
            raise UserError(f"{root / 'classes.json'} has {len(classes)} names: give at most {EMPTY}, each once")
        pictures = sorted(p for p in (root / "images").rglob("*") if p.suffix.lower() in SUFFIXES)
        if not pictures:
            raise UserError(f"{root / 'images'} has no pictures ({', '.join(SUFFIXES)}): put them there")
        files = [(p, (root / "masks" / p.relative_to(root / "images")).with_suffix(".png")) for p in pictures]
        for picture, mask in files:
            if not mask.is_file():
                raise UserError(f"{picture} has no mask: put {mask} there, or remove the picture")
        return cls(tuple(files), tuple(classes))

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """A picture and its mask uint8 `[H, W]`. Raises `UserError` where they do not fit, or a class is unknown."""
        picture, mask = self.files[number]
        image = load_image(picture)
        load_image(mask)
        with Image.open(mask) as opened:
            if opened.mode not in ("L", "P"):
                raise UserError(f"{mask} has mode {opened.mode}: a mask is a PNG of 8 bits, grey or with a palette")
            numbers = np.array(opened)
        if numbers.shape != (image.height, image.width):
            raise UserError(
                f"{mask} is {numbers.shape[1]} x {numbers.shape[0]}, its picture {image.width} x {image.height}"
            )
        if unknown := sorted({*np.unique(numbers).tolist()} - {*range(len(self.classes)), EMPTY}):
            raise UserError(f"{mask} has class {unknown[0]}, and classes.json only {len(self.classes)} names")
        return image, numbers


class Samples(Dataset):
    """Squares cut out of pictures and masks, an endless row of them: sample n shows picture n of epoch after epoch.

    Args:
        size: of squares, in pixels. crop: smallest square, as a share of the shorter side.
        first, count: which samples of the row these are.
    """

    def __init__(self, data: Labelled, size: int, seed: int, crop: float, flip: bool, first: int, count: int):
        self.data, self.size, self.seed, self.crop, self.flip = data, size, seed, crop, flip
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    @cached_property
    def orders(self) -> dict[int, np.ndarray]:
        return {}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | UserError:
        """`[3, S, S]` in [-1, 1], and numbers of classes `[S, S]`, int64; or what is wrong with the files, as a value:
        raised in a process that loads, it would come with that process's traceback."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        number = self.first + index
        epoch, place = divmod(number, len(self.data.files))
        if epoch not in self.orders:
            self.orders.clear()
            self.orders[epoch] = generator(self.seed, ORDER, epoch).permutation(len(self.data.files))
        try:
            image, mask = self.data.read(int(self.orders[epoch][place]))
        except UserError as error:
            return error
        x, y, zoom, mirrored = generator(self.seed, VIEW, number).random(4)
        view = {"x": x, "y": y, "zoom": self.crop + (1 - self.crop) * zoom}
        picture, labels = fit(image, self.size, **view), nearest(mask, self.size, **view)
        if self.flip and mirrored < 0.5:
            picture, labels = picture[:, ::-1], labels[:, ::-1]
        return to_tensor(picture[None])[0], torch.from_numpy(labels.astype(np.int64))


def batch_of(samples: list) -> list[Tensor] | UserError:
    """Samples as a batch, or the first error among them."""
    return next((each for each in samples if isinstance(each, UserError)), None) or default_collate(samples)


def nearest(mask: np.ndarray, size: int, x: float, y: float, zoom: float) -> np.ndarray:
    """The square of a mask that `semantica.images.fit` cuts out of its picture, `[size, size]`: no values are mixed."""
    height, width = mask.shape
    side = zoom * min(width, height)
    places = (np.arange(size) + 0.5) / size * side
    rows, columns = ((start + places).astype(int) for start in (y * (height - side), x * (width - side)))
    return mask[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
