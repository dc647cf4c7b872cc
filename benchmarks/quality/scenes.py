"""Drawn scenes with captions and exact masks: what a model must learn before its words can be steered.

A scene has one to three objects at free places and sizes on a plain ground; shape, colour, place, size and mask of each
are known. Four crossings of shape and colour are held out: training sees every shape and every colour, never these.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from semantica.benchmarks.quality.web import OUTLINES, SIDE, SUPERSAMPLING, is_missing, philox
from semantica.errors import UserError
from semantica.files import written

# raise this when the same arguments draw other pictures
VERSION = 1
SHAPES = ("square", "triangle", "cross", "ring")
PLURALS = {"cross": "crosses"}
# far from each other as seen from every ground, so that a pixel half covered still tells its object
COLOURS = {
    "red": (222, 34, 38),
    "blue": (36, 58, 214),
    "yellow": (250, 214, 36),
    "white": (250, 250, 250),
    "black": (18, 18, 22),
    "pink": (250, 120, 200),
}
GROUNDS = {
    "green": (72, 150, 70),
    "grey": (134, 134, 134),
    "purple": (122, 70, 160),
    "teal": (40, 148, 160),
}
# (shape, colour) that training never shows
HELD_OUT = frozenset(zip(SHAPES, ("red", "blue", "yellow", "white"), strict=True))
NUMBERS = {2: "two", 3: "three"}
RELATIONS = ("left of", "right of", "above", "below")
# by number of objects: smallest and largest radius in pixels
RADII = {1: (3.5, 10.0), 2: (3.5, 7.0), 3: (3.5, 5.5)}
# shares of one, two and three objects
COUNTS = (0.45, 0.4, 0.15)
# shares of scenes of two or three objects that are alike ("two red crosses"), or told apart by where they are; of all
# scenes those whose caption leaves colours open ("a cross on green")
ALIKE, RELATED, OPEN = 0.1, 0.2, 0.2


@dataclass(frozen=True)
class Thing:
    """An object: `centre` (x, y) of its outline and nominal `radius`, both in pixels."""

    shape: str
    colour: str
    centre: tuple[float, float]
    radius: float

    @property
    def reach(self) -> float:
        """The radius of the circle about `centre` that holds the outline."""
        return self.radius * float(np.linalg.norm(OUTLINES[self.shape], axis=1).max())


@dataclass(frozen=True)
class Scene:
    """Objects on a ground.

    relation: how the caption tells the first two apart, or empty. open: whether it leaves the objects' colours open.
    """

    things: tuple[Thing, ...]
    ground: str
    relation: str = ""
    open: bool = False

    @cached_property
    def caption(self) -> str:
        """One word for each attribute: "a red cross and a blue ring on green", "two red crosses on green"."""
        names = [thing.shape if self.open else f"{thing.colour} {thing.shape}" for thing in self.things]
        if len(names) > 1 and len({*names}) == 1:
            shape = self.things[0].shape
            several = names[0].removesuffix(shape) + PLURALS.get(shape, shape + "s")
            return f"{NUMBERS[len(names)]} {several} on {self.ground}"
        joints = [self.relation or "and", *["and"] * (len(names) - 2)]
        text = f"a {names[0]}" + "".join(f" {joint} a {name}" for joint, name in zip(joints, names[1:], strict=False))
        return f"{text} on {self.ground}"


def cover(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """How much of each pixel an outline covers, float `[SIDE, SIDE]` in [0, 1]."""
    mask = Image.new("L", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
    points = np.array(centre) + radius * OUTLINES[shape]
    ImageDraw.Draw(mask).polygon([tuple(p) for p in (points * SUPERSAMPLING - 0.5).tolist()], fill=255)
    return np.asarray(mask.reduce(SUPERSAMPLING), np.float64) / 255


def masks(scene: Scene) -> np.ndarray:
    """The pixels of each object, those that it covers at least half: bool `[objects, SIDE, SIDE]`."""
    return np.stack([cover(thing.shape, thing.centre, thing.radius) >= 0.5 for thing in scene.things])


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A picture of a scene, uint8 `[SIDE, SIDE, 3]`; `rng` gives each object and the ground a little other colour."""
    tints = rng.uniform(-6, 6, (4, 3))
    picture = np.ones((SIDE, SIDE, 1)) * (np.array(GROUNDS[scene.ground]) + tints[3])
    for thing, tint in zip(scene.things, tints, strict=False):
        part = cover(thing.shape, thing.centre, thing.radius)[..., None]
        picture = picture * (1 - part) + (np.array(COLOURS[thing.colour]) + tint) * part
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def placed(names: list[tuple[str, str]], rng: np.random.Generator) -> tuple[Thing, ...]:
    """Objects of these shapes and colours that lie apart and within the picture; a free choice of place and size."""
    low, high = RADII[len(names)]
    while True:
        things: list[Thing] = []
        for shape, colour in names:
            radius = float(rng.uniform(low, high))
            reach = Thing(shape, colour, (0, 0), radius).reach
            x, y = (float(value) for value in rng.uniform(min(reach, SIDE / 2), max(SIDE - reach, SIDE / 2), 2))
            things.append(Thing(shape, colour, (x, y), radius))
        pairs = [(a, b) for i, a in enumerate(things) for b in things[:i]]
        inside = all(2 * thing.reach <= SIDE for thing in things)
        if inside and all(np.hypot(*np.subtract(a.centre, b.centre)) > a.reach + b.reach for a, b in pairs):
            return tuple(things)


def related(things: tuple[Thing, ...]) -> str:
    """How the first object lies to the second, along the axis on which they are further apart."""
    x, y = np.subtract(things[0].centre, things[1].centre)
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene of one to three objects of crossings that are not held out. Different objects share neither shape nor
    colour."""
    colours, count = tuple(COLOURS), int(rng.choice((1, 2, 3), p=COUNTS))
    alike, told, unsaid = (bool(value) for value in rng.random(3) < (ALIKE, RELATED, OPEN))
    while True:
        shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:count]]
        names = list(zip(shapes, (colours[i] for i in rng.permutation(len(colours))), strict=False))
        if alike and count > 1:
            names = names[:1] * count
        if not HELD_OUT & {*names}:
            break
    ground = tuple(GROUNDS)[rng.integers(len(GROUNDS))]
    things = placed(names, rng)
    return Scene(things, ground, related(things) if told and not alike and count > 1 else "", unsaid)


def held_out_scene(number: int, count: int, rng: np.random.Generator) -> Scene:
    """A scene whose first object is the held-out crossing of that number, in turn; the others are not held out."""
    colours, first = tuple(COLOURS), sorted(HELD_OUT)[number % len(HELD_OUT)]
    while True:
        shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES)) if SHAPES[i] != first[0]]
        others = [colours[i] for i in rng.permutation(len(colours)) if colours[i] != first[1]]
        names = [first, *zip(shapes, others, strict=False)][:count]
        if not HELD_OUT & {*names[1:]}:
            return Scene(placed(names, rng), tuple(GROUNDS)[rng.integers(len(GROUNDS))])


def elsewhere(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same objects at other places and in other sizes."""
    return replace(scene, things=placed([(thing.shape, thing.colour) for thing in scene.things], rng))


def recoloured(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same shapes in colours of which none is in the scene, in no held-out crossing."""
    free = [colour for colour in COLOURS if colour not in {thing.colour for thing in scene.things}]
    while True:
        chosen = [free[i] for i in rng.permutation(len(free))]
        things = tuple(replace(t, colour=colour) for t, colour in zip(scene.things, chosen, strict=False))
        if not HELD_OUT & {(thing.shape, thing.colour) for thing in things}:
            return replace(scene, things=things)


def draw_scenes(out: Path, seed: int = 0, pictures: int = 12_000, held_out: int = 240) -> None:
    """Draw scenes as PNG files of 32x32 pixels, their captions beside them, for `semantica train --condition-on text`.

    Writes `train/<hundred>/<number>.png` and `val/...`, `captions.jsonl` in each of the two, and `web.json` (the
    arguments). Pictures of `val` show held-out crossings. A pure function of its arguments: picture n comes from Philox
    streams of (seed, n). Everything is drawn in a temporary folder beside `out` and renamed at the end; what is there
    already of the same arguments is left alone.

    Raises UserError when a number is out of range or `out` holds something that is not a web.
    """
    out = Path(out)
    if seed < 0 or pictures < 2 or held_out < 2:
        raise UserError(f"cannot draw {pictures} scenes and {held_out} held-out ones of seed {seed}: give 2 or more")
    arguments = {"scenes": VERSION, "seed": seed, "pictures": pictures, "held_out": held_out}
    marker = json.dumps(arguments)
    if not is_missing(out, marker, pictures + held_out, "train/captions.jsonl"):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with written(out, apart=True, durable=False) as web:
        for split, count in (("train", pictures), ("val", held_out)):
            lines = []
            for number in range(count):
                path = f"{number // 100:03d}/{number:05d}.png"
                (web / split / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture_of(split, seed, number)).save(web / split / path, compress_level=4)
                lines.append(json.dumps({"file": path, "text": scene_of(split, seed, number).caption}))
            (web / split / "captions.jsonl").write_text("\n".join(lines) + "\n")
        (web / "web.json").write_text(marker)


def scene_of(split: str, seed: int, number: int) -> Scene:
    """Scene `number` of a split, "train" or "val"."""
    if split == "train":
        return training_scene(philox(seed, 4, number))
    return held_out_scene(number, 1 + number // len(HELD_OUT) % 3, philox(seed, 5, number))


def picture_of(split: str, seed: int, number: int) -> np.ndarray:
    """Picture `number` of a split, uint8 `[SIDE, SIDE, 3]`."""
    return draw(scene_of(split, seed, number), philox(seed, 6 if split == "train" else 7, number))
