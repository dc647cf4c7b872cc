"""What a drawn or sampled scene shows, found without any training: objects by colour, then place, area and shape.

A pixel is a mixture of its ground and one colour; the colour that explains it best claims it, if it covers half of it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from semantica.benchmarks.quality.scenes import COLOURS, GROUNDS, SHAPES, SIDE, Scene, cover
from semantica.features import neighbours, regions

# fewer pixels are no object
LEAST = 6
# radii at which templates of shapes are drawn, in pixels
STEP = 0.25


@dataclass(frozen=True, eq=False)
class Found:
    """An object in a picture.

    cover: how much of each pixel it covers, float `[SIDE, SIDE]` in [0, 1]. centroid: (x, y) in [0, 1], as attention
    maps have it. area: share of the picture.
    """

    colour: str
    shape: str
    cover: np.ndarray
    centroid: tuple[float, float]
    area: float


def ground_of(picture: np.ndarray) -> tuple[str, np.ndarray]:
    """The ground of a picture uint8 `[SIDE, SIDE, 3]`: its name, and its colour as it is here."""
    pixels, palette = picture.reshape(-1, 3).astype(np.float64), np.array(list(GROUNDS.values()), np.float64)
    nearest = np.square(pixels[:, None] - palette).sum(-1).argmin(1)
    every = np.concatenate([palette, np.array(list(COLOURS.values()), np.float64)])
    plain = np.square(pixels[:, None] - every).sum(-1).argmin(1) < len(palette)
    votes = np.bincount(nearest[plain], minlength=len(palette))
    place = int(votes.argmax())
    chosen = pixels[plain & (nearest == place)]
    return tuple(GROUNDS)[place], np.median(chosen, axis=0) if len(chosen) else palette[place]


def colour_covers(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel every colour of objects would cover, float `[colours, SIDE, SIDE]` in [0, 1], and the
    number `[SIDE, SIDE]` of the one that explains the pixel best."""
    ground = ground_of(picture)[1]
    pixels = picture.reshape(-1, 1, 3).astype(np.float64) - ground
    rays = np.array(list(COLOURS.values()), np.float64) - ground
    share = ((pixels * rays).sum(-1) / np.square(rays).sum(-1)).clip(0, 1)
    best = np.square(pixels - share[..., None] * rays).sum(-1).argmin(1)
    return share.T.reshape(-1, SIDE, SIDE), best.reshape(SIDE, SIDE)


def centroid(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) in [0, 1] of the middle of a mask `[SIDE, SIDE]`, hard or soft."""
    places = (np.arange(SIDE) + 0.5) / SIDE
    mass = mask.sum()
    return float((mask.sum(0) * places).sum() / mass), float((mask.sum(1) * places).sum() / mass)


@lru_cache(maxsize=4096)
def unit_area(shape: str) -> tuple[float, float, float]:
    """Of an outline of radius 1: its area, and its centroid relative to its centre."""
    drawn = cover(shape, (SIDE / 2, SIDE / 2), 8.0)
    x, y = centroid(drawn)
    return float(drawn.sum() / 64), (x - 0.5) * SIDE / 8, (y - 0.5) * SIDE / 8


def shape_of(mask: np.ndarray) -> str:
    """The shape whose outline of the same area and centroid overlaps a mask most."""
    x, y = centroid(mask)
    overlap = []
    for shape in SHAPES:
        area, dx, dy = unit_area(shape)
        radius = float(np.sqrt(mask.sum() / area))
        drawn = cover(shape, (x * SIDE - radius * dx, y * SIDE - radius * dy), radius) >= 0.5
        overlap.append(iou(mask, drawn))
    return SHAPES[int(np.argmax(overlap))]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks, hard or soft; 0 for two empty ones."""
    union = np.maximum(a, b).sum()
    return float(np.minimum(a, b).sum() / union) if union else 0.0


def find(picture: np.ndarray, shapes: bool = True) -> list[Found]:
    """Every object of at least `LEAST` pixels in a picture uint8 `[SIDE, SIDE, 3]`; without `shapes` they are ""."""
    made, (shares, best) = [], colour_covers(picture)
    owner = np.where(np.take_along_axis(shares, best[None], 0)[0] >= 0.5, best, -1)
    for number, colour in enumerate(COLOURS):
        labels = regions((owner == number)[None])[0]
        for label in np.unique(labels[labels > 0]):
            part = labels == label
            if part.sum() < LEAST:
                continue
            # its edge: pixels beside it that no object owns
            edge = neighbours(part[None].astype(np.int64))[0].astype(bool) & ((owner < 0) | part)
            cover = np.where(edge, shares[number], 0)
            made.append(Found(colour, shape_of(part) if shapes else "", cover, centroid(cover), float(cover.mean())))
    return made


def largest(found: list[Found], colour: str) -> Found | None:
    """The largest object of a colour, if there is one."""
    return max((each for each in found if each.colour == colour), key=lambda each: each.area, default=None)


def on_topic(found: list[Found], ground: str, scene: Scene) -> bool:
    """Whether a picture shows the objects of a scene, each by colour and shape, nothing else, on its ground."""
    shown = sorted((each.colour, each.shape) for each in found)
    return ground == scene.ground and shown == sorted((thing.colour, thing.shape) for thing in scene.things)
