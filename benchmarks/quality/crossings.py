"""Drawn pictures in which a picture and a text each say something else, and what a picture shows of it.

Identity is a shape and the texture of the ground, which no text names; a text gives palette, number and place. Some
crossings of shape and palette are held out: training sees every shape and every palette, never these together.
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from semantica.benchmarks.quality.edits import palette_of
from semantica.benchmarks.quality.recognise import LEAST, centroid, shape_of
from semantica.benchmarks.quality.scenes import NUMBERS, SHAPES
from semantica.benchmarks.quality.web import OUTLINES, PALETTES, SIDE, SUPERSAMPLING, draw_texture, is_missing, philox
from semantica.errors import UserError
from semantica.features import regions
from semantica.files import written

# raise this when the same arguments draw other pictures
VERSION = 1
TEXTURES = ("plain", "stripes", "dots")
CHOSEN = tuple(PALETTES)[:6]
COUNTS = (1, 2, 3)
# the middle of the objects, in pixels: they stand in a column or in a row
PLACES = {"left": (8.0, 16.0), "right": (24.0, 16.0), "top": (16.0, 8.0), "bottom": (16.0, 24.0)}
# by number of objects: nominal radius, and how far they are apart
SIZES = {1: (5.8, 0.0), 2: (5.2, 14.5), 3: (4.4, 10.6)}
# of the texture, in steps of colour; below half of its deviation a ground is plain
AMPLITUDE, PLAIN = 22.0, 7.0
IDENTITY, TEXT = ("shape", "texture"), ("palette", "count", "place")


@dataclass(frozen=True)
class Crossing:
    """What a picture shows: shape and texture are its identity, the rest is what its text says."""

    shape: str
    texture: str
    palette: str
    count: int
    place: str

    @property
    def caption(self) -> str:
        """ "three things in poppy at the left"."""
        what = f"{NUMBERS[self.count]} things" if self.count > 1 else "one thing"
        return f"{what} in {self.palette} at the {self.place}"

    @property
    def held_out(self) -> bool:
        """Whether training never shows this shape in this palette."""
        return (SHAPES.index(self.shape) + CHOSEN.index(self.palette)) % 4 == 0


EVERY = tuple(Crossing(*parts) for parts in product(SHAPES, TEXTURES, CHOSEN, COUNTS, PLACES))


def draw(crossing: Crossing, rng: np.random.Generator) -> np.ndarray:
    """A picture uint8 `[SIDE, SIDE, 3]`; `rng` gives the texture's phase and a little of place, size, turn, colour."""
    radius, apart = SIZES[crossing.count]
    shift, scale, tilt, tint = rng.uniform(-1, 1, 2), rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(-1, 1, (2, 3))
    pattern = draw_texture(crossing.texture, 0.0, rng)
    along = np.array((0.0, 1.0) if crossing.place in ("left", "right") else (1.0, 0.0))
    angle = np.radians(5 * tilt)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mask = Image.new("L", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
    for number in range(crossing.count):
        centre = np.array(PLACES[crossing.place]) + 0.6 * shift + along * apart * (number - (crossing.count - 1) / 2)
        points = centre + radius * (1 + 0.05 * scale) * OUTLINES[crossing.shape] @ turn.T
        ImageDraw.Draw(mask).polygon([tuple(p) for p in (points * SUPERSAMPLING - 0.5).tolist()], fill=255)
    cover = np.asarray(mask.reduce(SUPERSAMPLING), np.float64)[..., None] / 255
    ground, thing = np.array(PALETTES[crossing.palette], np.float64) + 5 * tint
    picture = (ground + AMPLITUDE * pattern[..., None]) * (1 - cover) + thing * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def objects(picture: np.ndarray, palette: str) -> np.ndarray:
    """Pixels of the objects, bool `[SIDE, SIDE]`: on the line from a palette's ground to its object, those beyond the
    middle."""
    ground, thing = np.array(PALETTES[palette], np.float64)
    apart = thing - ground
    return (picture - ground) @ apart >= 0.5 * np.square(apart).sum()


def texture_of(picture: np.ndarray, mask: np.ndarray) -> str:
    """The texture that explains the ground best, by least squares over its phases."""
    # not beside objects, whose colour is mixed in
    near = mask.copy()
    for axis, step in product((0, 1), (-1, 1)):
        near |= np.roll(mask, step, axis)
    light = picture.mean(-1)[~near]
    if len(light) < LEAST:
        return TEXTURES[0]
    light = light - light.mean()
    if light.std() < PLAIN:
        return TEXTURES[0]
    y, x = (2 * np.pi * (grid / SIDE - 0.5) for grid in np.mgrid[:SIDE, :SIDE])
    waves = {
        "stripes": [f(5 * x) for f in (np.sin, np.cos)],
        # the lattice of |cos cos|, of half the period
        "dots": [f(8 * x) * g(8 * y) for f, g in product((np.sin, np.cos), repeat=2)]
        + [f(8 * axis) for f in (np.sin, np.cos) for axis in (x, y)],
    }

    def rest(name: str) -> float:
        basis = np.stack([wave[~near] for wave in waves[name]] + [np.ones(len(light))], 1)
        return float(np.square(light - basis @ np.linalg.lstsq(basis, light, rcond=None)[0]).sum())

    return min(waves, key=rest)


def recognise(picture: np.ndarray) -> Crossing:
    """What a picture uint8 `[SIDE, SIDE, 3]` shows, found without any training; the count is 0 where it shows nothing
    that is as large as an object, and 4 where there are more than three."""
    palette = palette_of(picture)
    mask = objects(picture, palette)
    labels = regions(mask[None])[0]
    parts = [part for label in np.unique(labels[labels > 0]) if (part := labels == label).sum() >= LEAST]
    whole = np.any(parts, 0) if parts else mask
    if not whole.any():
        return Crossing("", texture_of(picture, mask), palette, 0, "")
    votes = [shape_of(part) for part in parts] or [""]
    x, y = (SIDE * value for value in centroid(whole))
    place = min(PLACES, key=lambda name: np.hypot(PLACES[name][0] - x, PLACES[name][1] - y))
    shape = max(dict.fromkeys(votes), key=votes.count)
    return Crossing(shape, texture_of(picture, mask), palette, min(len(parts), 4), place)


def shares(made: list[Crossing], wanted: list[Crossing]) -> dict[str, float]:
    """How often each attribute is the wanted one, all of the text's, and all of the identity."""
    right = {}
    for name in (*IDENTITY, *TEXT):
        right[name] = np.array([getattr(a, name) == getattr(b, name) for a, b in zip(made, wanted, strict=True)])
    whole = {"identity": IDENTITY, "text": TEXT}
    right |= {name: np.all([right[part] for part in parts], 0) for name, parts in whole.items()}
    return {name: float(values.mean()) for name, values in right.items()}


def trials(count: int, seed: int) -> list[tuple[Crossing, Crossing]]:
    """(condition, target) of held-out crossings: the condition has the target's identity in a palette that training
    shows it in, and another text in all of its parts as far as there are others."""
    drawn, made = philox(seed, 5), []
    held = [crossing for crossing in EVERY if crossing.held_out]
    for number in drawn.permutation(len(held))[:count]:
        target = held[number]
        others = [
            c for c in EVERY
            if not c.held_out and (c.shape, c.texture) == (target.shape, target.texture)
            and c.palette != target.palette and c.count != target.count and c.place != target.place
        ]  # fmt: skip
        made.append((others[int(drawn.integers(len(others)))], target))
    return made


def draw_crossings(out: Path, seed: int = 0, each: int = 4) -> None:
    """Draw all crossings that are not held out, `each` pictures of every one, as PNG files under `out`.

    Writes `<shape>-<texture>/<number>.png`, so that pictures of a folder share their identity, `captions.jsonl`, and
    `web.json` (the arguments). A complete set of the same arguments is left alone.

    Raises:
        UserError: a number is out of range, or `out` holds something else.
    """
    if seed < 0 or each < 1:
        raise UserError(f"cannot draw crossings with seed={seed}, each={each}: give seed >= 0 and each >= 1")
    chosen = [crossing for crossing in EVERY if not crossing.held_out]
    marker = json.dumps({"crossings": VERSION, "seed": seed, "each": each})
    if not is_missing(out, marker, len(chosen) * each, "train/captions.jsonl"):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with written(out, apart=True, durable=False) as folder:
        lines = []
        for number, crossing in enumerate(chosen):
            for index in range(each):
                file = Path(f"{crossing.shape}-{crossing.texture}") / f"{number:04d}-{index}.png"
                (folder / "train" / file).parent.mkdir(parents=True, exist_ok=True)
                picture = draw(crossing, philox(seed, 6, number, index))
                Image.fromarray(picture).save(folder / "train" / file, compress_level=4)
                lines.append(json.dumps({"file": file.as_posix(), "text": crossing.caption}) + "\n")
        (folder / "train" / "captions.jsonl").write_text("".join(lines))
        (folder / "web.json").write_text(marker)
