"""The demo's data: a drawn "web" whose pages (groups) hold pictures of the same content.

A group fixes an object's shape, a palette, how many objects there are and how they are laid out, and a faint background
texture; its pictures differ in position, scale, rotation, a little colour and the texture's phase. Sixteen held-out
groups cross four shapes with four palettes: training sees every shape and every palette, never these combinations.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from semantica.errors import UserError
from semantica.files import written

SIDE = 32
SUPERSAMPLING = 8
# raise this when the same arguments draw other pictures: an older web is then drawn again
VERSION = 7


def arc(start: float, stop: float, radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Points [P, 2] on a circle, from and to angles in degrees, clockwise on screen because y points down."""
    angle = np.radians(np.linspace(start, stop, 49))
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def plus(half: float) -> np.ndarray:
    """An upright cross [12, 2] whose arms are `half` wide on either side: three corners, turned four times."""
    arm = np.array([(-half, -half), (-half, -1), (half, -1)])
    quarter = np.array([(0, 1), (-1, 0)])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, k) for k in range(4)])


# outlines in units of the nominal radius; a hole is a second loop joined by a bridge of no width (even-odd filling)
OUTLINES: dict[str, np.ndarray] = {
    "triangle": np.array([(0, -1.0), (1.06, 0.84), (-1.06, 0.84)]),
    "square": np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]),
    "cross": plus(0.34),
    "ring": np.concatenate([arc(0, 360), arc(360, 0, 0.52)]),
    "diamond": np.array([(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)]),
    "crescent": np.concatenate([arc(50, 310), arc(300, 60, 0.82, (0.46, 0.0))]) + (0.18, 0),
    "hourglass": np.array([(-0.85, -1), (0.85, -1), (0.2, 0), (0.85, 1), (-0.85, 1), (-0.2, 0)]),
    "bar": np.array([(-1.05, -0.42), (1.05, -0.42), (1.05, 0.42), (-1.05, 0.42)]),
}
# background, object; lights have a luma near 195 and darks near 65, six palettes each way round, so that greyscale
# tells at most the polarity and colour tells nothing of the shape
PALETTES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "night": ((30, 52, 172), (252, 206, 40)),
    "poppy": ((228, 202, 164), (192, 20, 32)),
    "orchid": ((146, 224, 156), (112, 28, 144)),
    "rose": ((10, 100, 42), (255, 174, 192)),
    "bark": ((140, 205, 246), (120, 56, 14)),
    "ember": ((64, 64, 72), (255, 166, 84)),
    "lagoon": ((255, 178, 196), (0, 84, 104)),
    "neon": ((170, 0, 100), (96, 222, 216)),
    "fern": ((206, 184, 250), (16, 98, 36)),
    "cocoa": ((118, 54, 14), (150, 226, 168)),
    "lime": ((190, 222, 58), (26, 44, 140)),
    "foam": ((0, 84, 100), (224, 206, 178)),
}
TEXTURES = ("plain", "stripes", "dots", "gradient")
HELD_OUT_SHAPES = tuple(OUTLINES)[:4]
HELD_OUT_PALETTES = tuple(PALETTES)[:4]
# by number of objects: nominal radius, largest change of scale, largest shift in pixels; objects stay apart
SIZES: dict[int, tuple[float, float, float]] = {1: (10.5, 0.08, 1.2), 2: (6.3, 0.06, 0.6), 3: (5.4, 0.05, 0.5)}
# by number of objects: where their centres may lie, in pixels
LAYOUTS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    1: (((16, 16),),),
    2: (((8, 16), (24, 16)),),
    3: (((16, 8.5), (8.5, 23), (23.5, 23)),),
}


@dataclass(frozen=True)
class Attributes:
    """What a group is about; `attributes.json` holds these four fields for every group."""

    shape: str
    palette: str
    count: int
    texture: str


def philox(*key: int) -> np.random.Generator:
    """A generator that is a pure function of its integers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def draw_texture(texture: str, heading: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth pattern [SIDE, SIDE] in [-1, 1] along `heading` (radians), its phase drawn from `rng`."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    along, across = x * np.cos(heading) + y * np.sin(heading), y * np.cos(heading) - x * np.sin(heading)
    if texture == "stripes":
        return np.sin(2 * np.pi * 5 * along + phase[0])
    if texture == "dots":
        dots = np.cos(2 * np.pi * 4 * along + phase[0]) * np.cos(2 * np.pi * 4 * across + phase[1])
        return np.clip(3 * np.abs(dots) - 1.4, -1, 1)
    if texture == "gradient":
        return 1.6 * along * (1 + 0.2 * np.sin(phase[0]))
    return np.zeros((SIDE, SIDE))


def draw_image(attributes: Attributes, layout: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of a group, uint8 [32, 32, 3].

    `layout` (any integer >= 0) picks the objects' places and the texture's direction and stays the same within a group;
    `rng` gives everything that varies within it. The draws do not depend on the attributes: equal generators draw
    equal nuisances, so that a picture can be drawn again with another shape, palette or count.
    """
    radius, stretch, reach = SIZES[attributes.count]
    layouts = LAYOUTS[attributes.count]
    shift, scale, tilt = rng.uniform(-1, 1, 2), rng.uniform(-1, 1), rng.uniform(-1, 1)
    jitter, wobble = rng.uniform(-1, 1, (3, 2)), rng.uniform(-1, 1, 3)
    tint = rng.uniform(-1, 1, (2, 3))
    pattern = draw_texture(attributes.texture, np.pi / 4 * (layout % 4), rng)
    centres = np.array(layouts[layout % len(layouts)]) + reach * shift + 0.35 * jitter[: attributes.count]
    mask = Image.new("L", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
    pen = ImageDraw.Draw(mask)
    for centre, extra in zip(centres, wobble, strict=False):
        angle = np.radians(6 * tilt + 2 * extra)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = centre + radius * (1 + stretch * scale) * OUTLINES[attributes.shape] @ turn.T
        pen.polygon([tuple(p) for p in (points * SUPERSAMPLING - 0.5).tolist()], fill=255)
    cover = np.asarray(mask.reduce(SUPERSAMPLING), np.float64)[..., None] / 255
    colours = np.array(PALETTES[attributes.palette], np.float64) + 7 * tint
    picture = (colours[0] + 6 * pattern[..., None]) * (1 - cover) + colours[1] * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def held_out_groups() -> list[Attributes]:
    """The 16 held-out groups: every held-out shape with every held-out palette.

    Counts (1, 1, 2, 3) and textures follow two orthogonal Latin squares over GF(4): every shape and every palette has
    the same four counts and the same four textures, so neither says anything about the shape or the palette.
    """
    double = (0, 2, 3, 1)
    return [
        Attributes(HELD_OUT_SHAPES[s], HELD_OUT_PALETTES[p], (1, 1, 2, 3)[s ^ p], TEXTURES[double[s] ^ p])
        for s in range(4)
        for p in range(4)
    ]


def training_groups(seed: int, groups: int) -> list[Attributes]:
    """`groups` training groups: passes over all combinations of shape and palette that are not held out (80).

    A pass takes the combinations in a random order, the last one only some of them. Within a pass the count goes with
    (shape + palette) mod 3 and the texture with (shape - palette) mod 4: no pair of count and texture occurs twice
    across the palettes of a shape, or across the shapes of a palette. Each pass moves both on by one, so a combination
    that comes again has another count and texture; over three passes it has had every count.
    """
    shapes, palettes = tuple(OUTLINES), tuple(PALETTES)
    free = [(s, p) for s in range(len(shapes)) for p in range(len(palettes)) if s >= 4 or p >= 4]
    chosen: list[Attributes] = []
    for turn in range(-(-groups // len(free))):
        for index in philox(seed, 0, turn).permutation(len(free))[: groups - len(chosen)]:
            s, p = free[index]
            count, texture = (s + p + turn) % 3 + 1, TEXTURES[(s - p + turn) % 4]
            chosen.append(Attributes(shapes[s], palettes[p], count, texture))
    return chosen


def is_missing(out: Path, marker: str, pictures: int, beside: str = "attributes.json") -> bool:
    """Whether `out` has yet to be drawn: it is no web with this text in `web.json`, or lacks a picture or the table
    `beside` them.

    Raises `UserError` where it holds something that is not a web.
    """
    if not (out / "web.json").is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not a drawn web: give another folder, or remove it first")
        return True
    complete = (out / "web.json").read_text() == marker and (out / beside).is_file()
    return not complete or sum(1 for _ in out.glob("*/*/*.png")) != pictures


def draw_web(out: Path, seed: int = 0, groups: int = 240, images_per_group: int = 32) -> None:
    """Draw `groups` training groups and the 16 held-out ones as PNG files of 32x32 pixels under `out`.

    Writes `train/<group>/<nn>.png`, `val/<group>/<nn>.png`, `attributes.json` (`{group: {shape, palette, count,
    texture}}`) and `web.json` (the arguments). A pure function of its arguments: picture n of group g comes from the
    Philox stream of (seed, g, n). Everything is drawn in a temporary folder beside `out` and renamed at the end. A
    complete web of the same arguments is left alone, another web is replaced; 80 groups cover every combination.

    Raises UserError when a number is out of range or `out` holds something that is not a web.
    """
    out = Path(out)
    if seed < 0 or groups < 1 or images_per_group < 2:
        raise UserError(
            f"cannot draw a web with seed={seed}, groups={groups}, images_per_group={images_per_group}: "
            "give seed >= 0, groups >= 1 and images_per_group >= 2"
        )
    chosen = [("val", group) for group in held_out_groups()] + [("train", g) for g in training_groups(seed, groups)]
    arguments = {"version": VERSION, "seed": seed, "groups": groups, "images_per_group": images_per_group}
    marker = json.dumps(arguments)
    if not is_missing(out, marker, len(chosen) * images_per_group):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with written(out, apart=True, durable=False) as web:
        table = {}
        for number, (split, group) in enumerate(chosen):
            name = f"{number:03d}-{group.count}-{group.shape}-{group.palette}"
            table[name] = asdict(group)
            folder = web / split / name
            folder.mkdir(parents=True)
            layout = int(philox(seed, 1, number).integers(12))
            for index in range(images_per_group):
                picture = draw_image(group, layout, philox(seed, 2, number, index))
                Image.fromarray(picture).save(folder / f"{index:02d}.png", compress_level=4)
        (web / "attributes.json").write_text(json.dumps(table, indent=1))
        (web / "web.json").write_text(marker)
