"""Drawn scenes with a class for each pixel: crossings of shape and colour, some of which training never sees."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from semantica.benchmarks.quality.scenes import COLOURS, GROUNDS, HELD_OUT, SHAPES, SIDE, masks, picture_of, scene_of
from semantica.errors import UserError
from semantica.files import written

SEEN = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS if (shape, colour) not in HELD_OUT)
UNSEEN = tuple(f"{colour} {shape}" for shape, colour in sorted(HELD_OUT))
# in training: those that are seen, and the grounds
KNOWN = (*SEEN, *GROUNDS)
EVERY = (*KNOWN, *UNSEEN)
# scenes of the training's kind that it does not draw; and the least radius, in pixels, of an object whose shape can be
# told on tokens of four
OTHERS, LEAST = 1_000_000, 5.5


def large(split: str, seed: int, first: int, count: int) -> list[int]:
    """The first scenes of a split, from a number on, all of whose objects are large."""
    found, number = [], first
    while len(found) < count:
        if min(thing.radius for thing in scene_of(split, seed, number).things) >= LEAST:
            found.append(number)
        number += 1
    return found


def labels_of(split: str, seed: int, number: int) -> np.ndarray:
    """The class of each pixel of a scene, its number in `EVERY`, uint8 `[SIDE, SIDE]`: an object's where it covers half
    of the pixel."""
    scene = scene_of(split, seed, number)
    made = np.full((SIDE, SIDE), EVERY.index(scene.ground), np.uint8)
    for thing, mask in zip(scene.things, masks(scene), strict=True):
        made[mask] = EVERY.index(f"{thing.colour} {thing.shape}")
    return made


def draw_labelled(out: Path, seed: int, pictures: int) -> None:
    """Training scenes as `semantica train-segmenter --data` reads them; a complete folder of the same arguments is left
    alone.

    Raises:
        UserError: the folder holds something else.
    """
    marker = json.dumps({"labelled": 1, "seed": seed, "pictures": pictures})
    if out.exists():
        if (out / "web.json").is_file() and (out / "web.json").read_text() == marker:
            return
        raise UserError(f"{out} exists and holds other pictures: give another folder")
    with written(out, durable=False) as aside:
        for name in ("images", "masks"):
            (aside / name).mkdir(parents=True)
        for number in large("train", seed, 0, pictures):
            name = f"{number:06d}.png"
            Image.fromarray(picture_of("train", seed, number)).save(aside / "images" / name, compress_level=1)
            Image.fromarray(labels_of("train", seed, number)).save(aside / "masks" / name, compress_level=1)
        (aside / "classes.json").write_text(json.dumps(KNOWN))
        (aside / "web.json").write_text(marker)


def held_out(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 `[2 * count, SIDE, SIDE, 3]` and classes `[2 * count, SIDE, SIDE]` that training does not see: the
    first half of its kind, each of the others with a crossing that it does not know."""
    places = [(split, n) for split, first in (("train", OTHERS), ("val", 0)) for n in large(split, seed, first, count)]
    pictures = np.stack([picture_of(split, seed, n) for split, n in places])
    return pictures, np.stack([labels_of(split, seed, n) for split, n in places])


def intersections(found: np.ndarray, right: np.ndarray, classes: int) -> np.ndarray:
    """Intersection over union of each class over all pixels, `[classes]`; NaN for one that is in neither.

    Args:
        found, right: numbers of classes, of one shape; -1 in `found` for none.
    """
    # pixels of pictures may be of 8 bits
    found, right = (part.ravel().astype(np.int64) for part in (found, right))
    pairs = np.bincount((found + 1) * classes + right, minlength=(classes + 1) * classes)
    table = pairs.reshape(classes + 1, classes)
    both = np.diagonal(table[1:])
    either = table[1:].sum(1) + table.sum(0) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)
