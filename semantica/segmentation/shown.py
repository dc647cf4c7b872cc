"""Masks as files: a PNG of class numbers in colours, a legend, and the picture with its classes drawn over it."""

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from semantica.errors import UserError
from semantica.files import write_text
from semantica.images import save_png
from semantica.segmentation.windows import EMPTY

# of an overlay: how much of a pixel is its class's colour, and the height of a line of the legend
SHARE, LINE = 0.55, 22
# shorter sides are enlarged by whole numbers, so that the legend can be read
LEAST = 384


def colour(number: int) -> tuple[int, int, int]:
    """Of a class: hues a golden angle apart, so that neighbours in number differ most, in three lightnesses."""
    hue, light = number * 0.381966 % 1, (0.5, 0.35, 0.68)[number // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def write_masks(owner: np.ndarray, names: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Write class numbers as an 8-bit PNG with a palette, and the legend beside it as JSON.

    Args:
        owner: int `[H, W]`, see `semantica.segmentation.windows.segment`. path: of the PNG.

    Returns:
        The legend: number, name, colour and share of the pixels of each class.

    Raises:
        UserError: more classes than 8 bits hold, or the place takes no files.
    """
    if len(names) > EMPTY:
        raise UserError(f"{len(names)} classes are more than the {EMPTY} that a mask of 8 bits holds: name fewer")
    legend = [
        {"number": i, "name": name, "colour": list(colour(i)), "share": round(float((owner == i).mean()), 6)}
        for i, name in enumerate(names)
    ]
    image = Image.fromarray(np.where(owner < 0, EMPTY, owner).astype(np.uint8))
    palette = [channel for i in range(EMPTY) for channel in colour(i)]
    image.putpalette([*palette, 0, 0, 0])
    save_png(image, path)
    write_text(path.with_suffix(".json"), json.dumps({"empty": EMPTY, "classes": legend}, indent=1), apart=True)
    return legend


def overlay(picture: Image.Image, owner: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The picture with its classes in colours, their borders, and a legend of those that are there, largest first."""
    factor = -(-LEAST // min(picture.size)) if min(picture.size) < LEAST else 1
    owner = owner.repeat(factor, 0).repeat(factor, 1)
    size = picture.width * factor, picture.height * factor
    pixels = np.asarray(picture.resize(size, Image.Resampling.NEAREST), np.float32)
    table = np.array([*(colour(i) for i in range(len(names))), (0, 0, 0)], np.float32)
    share = np.where(owner < 0, 0, SHARE)[..., None]
    mixed = pixels * (1 - share) + table[owner] * share
    edge = np.zeros(owner.shape, bool)
    edge[1:] |= owner[1:] != owner[:-1]
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    mixed[edge] = 255
    shown = np.bincount(owner[owner >= 0], minlength=len(names))
    order = [i for i in np.argsort(-shown, kind="stable").tolist() if shown[i]]
    made = Image.new("RGB", (size[0], size[1] + LINE * len(order)), "white")
    made.paste(Image.fromarray(np.rint(mixed).astype(np.uint8)))
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(14)
    for line, number in enumerate(order):
        top = size[1] + line * LINE
        pen.rectangle((6, top + 5, 30, top + LINE - 5), colour(number), (0, 0, 0))
        pen.text((38, top + 3), f"{names[number]}  {shown[number] / owner.size:.1%}", (0, 0, 0), font)
    return made
