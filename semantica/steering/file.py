"""What `semantica sample --steer FILE.json` reads: objects, energies or recipes, and where targets come from.

The file is an object with these members; those marked * must be there, and others are refused.

    objects*     {name: what}, each of {"words": "red ball"} (of the prompt), {"box": [left, top, right, bottom]},
                 {"point": [x, y]}, {"mask": "mask.png"} (of the condition picture; shares of its middle square, 0 to 1;
                 "picture": number, where a sample has several), or {"tokens": [numbers]}, or {"subject": "red circle"},
                 what a segmenter finds by that name in the condition picture.
    terms        a list of energies, each {"energy"*: "position" | "size" | "shape" | "appearance",
                 "objects": [names] (all by default), "weight": number (1), "distance": "l1" | "l2"} and a target:
                 {"to": [x, y]} of a position, {"to": share of the picture} of a size, {"to": "mask.png"} of a shape;
                 or {"source": name ("original"), "source_objects": [names], "shift": [right, down], "factor": of the
                 area, "angle": degrees anticlockwise}, what a source shows, changed.
    recipes      a list of {"recipe"*: name, ..., "weights": {energy: number}}:
                 "move" {"objects"*, "shift" or "to", "others"}, "resize" {"objects"*, "factor"*, "others"},
                 "copy_layout" and "copy_appearance" {"source"*, "objects"},
                 "compose" {"layout"*: {object: source}, "appearance"*: {object: source}}.
    sources      {name: {"image"*: "photo.png", "prompt": "what it shows", "condition": "picture.png",
                 "objects": as above}}: real pictures, noised to the level of each step. Prompt and objects are by
                 default the sample's own, the condition is by default the picture. "original" is always there: the
                 run without steering, from the same noise.
    weight       of all energies (1).     factor   "sigma" (by default) | "variance" | "one" | "velocity"
    steps        "paper" | "all" | [numbers of steps]
    segmenter    folder of `semantica train-segmenter`, for subjects.
    layers       [names of cross-attentions].     activations   name of a module.     stream   name of a stream

Files are looked for beside the steering file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from semantica.errors import UserError
from semantica.files import read_json
from semantica.steering import recipes
from semantica.steering.checks import (
    choice,
    listed,
    members,
    named,
    number,
    optional,
    pair,
    positive,
    share,
    table,
    text,
    texts,
    whole,
)
from semantica.steering.checks import numbers as many
from semantica.steering.energies import DISTANCES
from semantica.steering.guider import ALL_STEPS, FACTORS, PAPER, Pattern
from semantica.steering.regions import Region, grey
from semantica.steering.taps import Taps
from semantica.steering.terms import ORIGINAL, PROPERTIES, Change, Fixed, Term

STEPS = {"paper": PAPER, "all": ALL_STEPS}
# what a recipe takes, those that it must have first; and what makes it
RECIPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[..., tuple[Term, ...]]]] = {
    "move": (("objects",), ("shift", "to", "others"), recipes.move),
    "resize": (("objects", "factor"), ("others",), recipes.resize),
    "copy_layout": (("source",), ("objects",), recipes.copy_layout),
    "copy_appearance": (("source",), ("objects",), recipes.copy_appearance),
    "compose": (("layout", "appearance"), (), recipes.compose),
}
# the side of masks
FINE = 256


@dataclass(frozen=True)
class Chosen:
    """Tokens of an object: words of the prompt, a region or a name in a condition picture, or their numbers."""

    words: str | None = None
    region: Region | None = None
    subject: str | None = None
    picture: int = 0
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Photo:
    """A source: a real picture, what it is read beside, and its objects if they are others than the sample's."""

    image: Path
    prompt: str | None
    condition: Path | None
    objects: Mapping[str, Chosen] | None


@dataclass(frozen=True)
class SteerFile:
    """A steering file that was read; see this module for its members."""

    path: Path
    objects: Mapping[str, Chosen]
    terms: tuple[Term, ...]
    photos: Mapping[str, Photo]
    weight: float
    factor: str
    pattern: Pattern
    taps: Taps
    segmenter: Path | None = None

    @property
    def sources(self) -> dict[str, set[str]]:
        """The sources that its terms name, and which statistics each of them is asked for."""
        asked: dict[str, set[str]] = {}
        for term in self.terms:
            if isinstance(term.target, Change):
                asked.setdefault(term.target.source, set()).update(term.asks)
        return asked


def read_steering(path: Path) -> SteerFile:
    """Read and check a steering file.

    Raises:
        UserError: it is not there, no JSON, or not as this module says; the line names the file and the member.
    """
    given = read_json(path)
    try:
        return Parser(path.parent).file(path, given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class Parser:
    """From JSON to values; files are beside `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, path: Path, given: Any) -> SteerFile:
        settings = ("weight", "factor", "steps", "layers", "activations", "stream", "segmenter")
        given = members(given, "the file", ("objects",), ("terms", "recipes", "sources", *settings))
        objects = self.objects(given["objects"], "objects")
        terms = [t for i, each in enumerate(listed(given, "terms")) for t in (self.term(each, f"terms[{i}]"),)]
        for i, each in enumerate(listed(given, "recipes")):
            terms += self.recipe(each, f"recipes[{i}]")
        if not terms:
            raise UserError("it has neither terms nor recipes: give at least one")
        photos = {name: self.photo(each, f"sources.{name}") for name, each in table(given, "sources").items()}
        if ORIGINAL in photos:
            raise UserError(f"sources.{ORIGINAL}: this name is the run without steering: choose another")
        layers = tuple(texts(given["layers"], "layers")) if "layers" in given else None
        taps = Taps(layers, optional(given, "activations", text), optional(given, "stream", text))
        factor = choice(given.get("factor", "sigma"), "factor", FACTORS)
        weight = number(given.get("weight", 1.0), "weight")
        segmenter = self.folder / text(given["segmenter"], "segmenter") if "segmenter" in given else None
        steps = pattern(given.get("steps", "paper"))
        read = SteerFile(path, objects, tuple(terms), photos, weight, factor, steps, taps, segmenter)
        self.check(read)
        return read

    def check(self, read: SteerFile) -> None:
        """Raises `UserError` where a term names an object or a source that is not there."""
        every = (read.objects, *(photo.objects for photo in read.photos.values() if photo.objects))
        if read.segmenter is None and any(each.subject for objects in every for each in objects.values()):
            raise UserError("a subject is looked for by a segmenter, and none is named: give 'segmenter', its folder")
        for name in sorted(set(read.sources) - {ORIGINAL, *read.photos}):
            raise UserError(f"no source is called {name!r}: there are {', '.join((ORIGINAL, *read.photos))}")
        for term in read.terms:
            for name in term.objects:
                if name not in read.objects:
                    raise UserError(f"no object is called {name!r}: there are {', '.join(read.objects)}")
            if not isinstance(term.target, Change):
                continue
            photo = read.photos.get(term.target.source)
            theirs = read.objects if photo is None or photo.objects is None else photo.objects
            for name in term.target.objects or term.objects:
                if name not in theirs:
                    source = term.target.source
                    raise UserError(f"source {source!r} has no object {name!r}: there are {', '.join(theirs)}")

    def objects(self, given: Any, where: str) -> dict[str, Chosen]:
        found = members(given, where, (), None)
        if not found:
            raise UserError(f"{where} is empty: name at least one object")
        return {name: self.chosen(each, f"{where}.{name}") for name, each in found.items()}

    def chosen(self, given: Any, where: str) -> Chosen:
        kinds = ("words", "box", "point", "mask", "tokens", "subject")
        given = members(given, where, (), (*kinds, "picture"))
        if sum(kind in given for kind in kinds) != 1:
            raise UserError(f"{where}: give one of {', '.join(kinds)}")
        picture = whole(given.get("picture", 0), f"{where}.picture")
        if "words" in given:
            return Chosen(words=text(given["words"], f"{where}.words"))
        if "tokens" in given:
            found = tuple(whole(each, f"{where}.tokens") for each in listed(given, "tokens"))
            return Chosen(tokens=found)
        if "subject" in given:
            return Chosen(subject=text(given["subject"], f"{where}.subject"), picture=picture)
        box, point = (
            tuple(many(given[kind], f"{where}.{kind}")) if kind in given else None for kind in ("box", "point")
        )
        mask = self.place(given["mask"], f"{where}.mask") if "mask" in given else None
        return Chosen(region=Region(box, point, mask), picture=picture)

    def term(self, given: Any, where: str) -> Term:
        changes = ("source", "source_objects", "shift", "factor", "angle")
        given = members(given, where, ("energy",), ("objects", "weight", "distance", "to", *changes))
        energy = choice(given["energy"], f"{where}.energy", PROPERTIES)
        asked = [name for name in changes if name in given]
        if ("to" in given) == bool(asked):
            raise UserError(
                f"{where}: the energy {energy!r} has no target, or two: give 'to', or 'source' and a change"
            )
        target = Fixed(self.goal(energy, given["to"], f"{where}.to")) if "to" in given else change(given, where)
        objects = tuple(named(given["objects"], f"{where}.objects")) if "objects" in given else ()
        weight = number(given.get("weight", 1.0), f"{where}.weight")
        distance = choice(given.get("distance", "l1"), where, DISTANCES)
        try:
            return Term(energy, weight, objects, target, distance)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def goal(self, energy: str, given: Any, where: str) -> Any:
        if energy == "shape":
            return torch.from_numpy(grey(self.place(given, where), FINE))
        if energy == "size":
            return share(given, where)
        if energy == "position":
            return tuple(share(each, where) for each in pair(given, where))
        raise UserError(f"{where}: an appearance has no value that could be given: name a source")

    def recipe(self, given: Any, where: str) -> tuple[Term, ...]:
        if not isinstance(given, Mapping) or given.get("recipe") not in RECIPES:
            raise UserError(f"{where}: expected a 'recipe', one of {', '.join(RECIPES)}")
        must, may, make = RECIPES[given["recipe"]]
        given = members(given, where, ("recipe", *must), (*may, "weights"))
        weights = {
            choice(name, f"{where}.weights", PROPERTIES): number(each, f"{where}.weights.{name}")
            for name, each in table(given, "weights").items()
        }
        read: dict[str, Any] = {"weights": {**recipes.WEIGHTS, **weights}}
        for name in (*must, *may):
            if name not in given:
                continue
            at = f"{where}.{name}"
            if name in ("objects", "others"):
                read[name] = tuple((named if name == "objects" else texts)(given[name], at))
            elif name in ("layout", "appearance"):
                read[name] = {key: text(each, at) for key, each in table(given, name).items()}
            elif name == "source":
                read[name] = text(given[name], at)
            elif name == "factor":
                read[name] = positive(given[name], at)
            else:
                read[name] = tuple((share if name == "to" else number)(each, at) for each in pair(given[name], at))
        try:
            return make(**read)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def photo(self, given: Any, where: str) -> Photo:
        given = members(given, where, ("image",), ("prompt", "condition", "objects"))
        condition = self.place(given["condition"], f"{where}.condition") if "condition" in given else None
        objects = self.objects(given["objects"], f"{where}.objects") if "objects" in given else None
        prompt = optional(given, "prompt", text)
        return Photo(self.place(given["image"], f"{where}.image"), prompt, condition, objects)

    def place(self, given: Any, where: str) -> Path:
        found = self.folder / text(given, where)
        if not found.is_file():
            raise UserError(f"{where}: {found} is not there")
        return found


def change(given: Mapping[str, Any], where: str) -> Change:
    return Change(
        text(given.get("source", ORIGINAL), f"{where}.source"),
        tuple(texts(given.get("source_objects", []), f"{where}.source_objects")),
        pair(given.get("shift", (0.0, 0.0)), f"{where}.shift"),
        positive(given.get("factor", 1.0), f"{where}.factor"),
        number(given.get("angle", 0.0), f"{where}.angle"),
    )


def pattern(given: Any) -> Pattern:
    if isinstance(given, list):
        return Pattern(numbers=tuple(whole(each, "steps") for each in given))
    return STEPS[choice(given, "steps", STEPS)]
