"""Drawn photographs: JPEGs of any size whose spectrum, edges, grain and bytes per pixel are those of photos."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# a web photo's: about 0.2 bytes a pixel at this quality
QUALITY, GRAIN = 85, 5.0


def draw_photo(seed: int, width: int, height: int) -> Image.Image:
    """Value noise whose amplitude falls as 1 / f (Field 1987), some opaque shapes, grain; the same for a seed."""
    rng = np.random.Generator(np.random.Philox(seed))
    total = np.zeros((height, width, 3), np.float32)
    cells = 4
    while cells < max(width, height) // 2:
        rows, columns = max(2, cells * height // max(width, height)), max(2, cells * width // max(width, height))
        for channel in range(3):
            values = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
            layer = np.asarray(values.resize((width, height), Image.Resampling.BICUBIC))
            total[..., channel] += layer * (160.0 / cells)
            # most of what changes is brightness
            total += layer[..., None] * (320.0 / cells) / 3
        cells *= 2
    image = Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.random(2) * (width, height)
        a, b = (0.05 + 0.2 * rng.random(2)) * (width, height)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - a, y - b, x + a, y + b), fill=tuple(rng.integers(0, 256, 3).tolist()))
    grain = rng.standard_normal((height, width, 1), np.float32) * GRAIN
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def draw_photos(folder: Path, count: int, width: int, height: int, per_group: int = 4) -> None:
    """`folder/<group>/<nn>.jpg`, 4:2:0."""
    for number in range(count):
        place = folder / f"{number // per_group:03d}"
        place.mkdir(parents=True, exist_ok=True)
        draw_photo(number, width, height).save(place / f"{number % per_group:02d}.jpg", quality=QUALITY)
