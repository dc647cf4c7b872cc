"""What a sweep is of: SWEEP.json, checked as a whole before anything runs, as cells and what they are evaluated at."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantica.benchmarks.quality.evaluate import EvaluateConfig
from semantica.benchmarks.quality.sweep.typed import built, known, option, required
from semantica.errors import UserError
from semantica.sampling.settings import Sampling
from semantica.train.config import TrainConfig

PARTS = ("train", "axes", "seeds", "evaluate")
# options that are the sweep's own
OWN = {
    ("train", "out"): "each cell has a folder of its own in --out",
    ("train", "seed"): 'give a list "seeds" beside "train"',
    ("evaluate", "model"): "it is each cell's run",
    ("evaluate", "images"): "it is each cell's run that is evaluated",
    ("evaluate", "out"): "the sweep keeps all figures in --out",
    ("evaluate", "keep"): "cells would write over each other's pictures",
}
# a folder of a cell is called after all its settings
LONGEST = 200
Options = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A run of the sweep.

    settings: of each axis the name of its point. train: as `TrainConfig.record`.
    """

    name: str
    settings: dict[str, str]
    seed: int
    train: Options


@dataclass(frozen=True)
class Sweep:
    """description: as it was read. axes: of each its points, as options of training. evaluate: options of
    `EvaluateConfig`, without the guidance."""

    description: Options
    axes: Mapping[str, Mapping[str, Options]]
    cells: tuple[Cell, ...]
    evaluate: Options
    guidance: tuple[float, ...]


def read_sweep(path: Path, out: Path) -> Sweep:
    """The sweep that a file describes, with its runs in `out`.

    Paths in it are as on the command line: relative to the working folder.

    Raises:
        UserError: no such file, no JSON, an option that there is not or of another type, an empty axis, equal names,
            options that no run takes. Nothing was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=no_number)
        if not isinstance(content, dict):
            raise UserError('it holds no JSON object: give {"train": {...}, "axes": {...}, "evaluate": {...}}')
        return sweep_of(content, out)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file that describes a sweep") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): mend it") from error


def once(pairs: list[tuple[str, Any]]) -> Options:
    """An object of JSON, whose names are all different."""
    found: Options = {}
    for name, value in pairs:
        if name in found:
            raise UserError(f"{name!r} is there twice in one object: give each name once")
        found[name] = value
    return found


def no_number(text: str) -> float:
    raise UserError(f"{text} is no number of JSON: give a finite one")


def sweep_of(content: Options, out: Path) -> Sweep:
    """As `read_sweep`, of what the file holds."""
    for name in content:
        known(name, PARTS, repr(name), f"part of a sweep ({', '.join(PARTS)})")
    for name in ("train", "evaluate"):
        if name not in content:
            raise UserError(f'"{name}" is missing: give its options as an object')
    shared = options(content["train"], "train", TrainConfig)
    axes = read_axes(content.get("axes"), shared) if "axes" in content else {}
    seeds = [option(TrainConfig, "seed", seed, f"seeds[{i}]") for i, seed in enumerate(filled(content, "seeds", [0]))]
    apart(map(str, seeds), "seeds")
    judged = dict(content["evaluate"]) if isinstance(content["evaluate"], dict) else content["evaluate"]
    guidance = guidances(judged)
    evaluate = options(judged, "evaluate", EvaluateConfig)
    # seeds outermost: a whole grid of the first stands before the second begins
    cells = [cell(shared, axes, points, seed, out) for seed in seeds for points in itertools.product(*axes.values())]
    apart((one.name for one in cells), "cells")
    for scale in guidance:
        check_evaluation(evaluate, scale, out)
    return Sweep(content, axes, tuple(cells), evaluate, guidance)


def options(given: Any, place: str, config: type) -> Options:
    """Options that a verb has, each of its type."""
    if not isinstance(given, dict):
        raise UserError(f"{place} is {given!r}: give an object of options")
    verb = "train" if config is TrainConfig else "evaluate"
    for name, value in given.items():
        if reason := OWN.get((verb, name)):
            raise UserError(f"{place}.{name} is the sweep's own: {reason}")
        names = [field.name for field in dataclasses.fields(config) if (verb, field.name) not in OWN]
        known(name, names, f"{place}.{name}", f"option of 'semantica {verb}'")
        option(config, name, value, f"{place}.{name}")
    return given


def filled(content: Options, name: str, default: list) -> list:
    found = content.get(name, default)
    if not isinstance(found, list) or not found:
        raise UserError(f"{name} is {found!r}: give a list with at least one value")
    return found


def apart(names: Iterable[str], place: str) -> None:
    """Raises `UserError` for two names that are alike, also where a file system tells no small letters from large."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.get(name.casefold())) is not None:
            raise UserError(f"{place}: two are called alike, {other!r} and {name!r}: give each a name of its own")
        seen[name.casefold()] = name


def read_axes(given: Any, shared: Options) -> dict[str, dict[str, Options]]:
    """Points of each axis by the name that folders have of them."""
    if not isinstance(given, dict) or not given:
        raise UserError(f"axes is {given!r}: give an object of options and their values, or leave it out")
    axes, taken = {}, dict.fromkeys(shared, "train")
    for axis, values in given.items():
        place = f"axes.{axis}"
        if not isinstance(values, (list, dict)) or not values:
            raise UserError(f"{place} is {values!r}: give a list of values, or an object of named points")
        if isinstance(values, list):
            points = [(label(value), options({axis: value}, "axes", TrainConfig)) for value in values]
        else:
            points = [(label(name), options(point, f"{place}.{name}", TrainConfig)) for name, point in values.items()]
        apart((name for name, _ in points), f"{place}, as points of an axis are called in folders")
        for name in dict.fromkeys(name for _, point in points for name in point):
            if name in taken:
                raise UserError(f"{name!r} is given by {taken[name]} and by {place}: give it in one place")
            taken[name] = place
        same = [(a, b) for (a, p), (b, q) in itertools.combinations(points, 2) if p == q]
        if same:
            raise UserError(f"{place}: {same[0][0]!r} and {same[0][1]!r} are the same options: leave one out")
        axes[axis] = dict(points)
    return axes


def label(value: Any) -> str:
    """What a value is called in the name of a folder: of a path its last part."""
    if isinstance(value, str):
        name = re.sub("[^A-Za-z0-9.]+", "-", Path(value).name).strip("-.")
    else:
        name = "x".join(map(label, value)) if isinstance(value, list) else json.dumps(value)
    if not name:
        raise UserError(f'{value!r} cannot name a folder: give it a name, as in {{"NAME": {{OPTION: {value!r}}}}}')
    return name


def cell(shared: Options, axes: Mapping, points: tuple[str, ...], seed: int, out: Path) -> Cell:
    """A cell, whose options go together. Raises `UserError` where they do not."""
    parts = [f"{label(axis)}-{point}" for axis, point in zip(axes, points)]
    name = "_".join([*parts, f"seed-{seed}"])
    if len(name) > LONGEST:
        raise UserError(f"a cell is called {name!r}: name the points of axes, in less than {LONGEST} letters in all")
    given = dict(shared)
    for axis, point in zip(axes, points):
        given |= axes[axis][point]
    given |= {"seed": seed, "out": str(out / "runs" / name)}
    for needed in required(TrainConfig):
        if needed not in given:
            raise UserError(f"train.{needed} is missing: give it, or an axis of it")
    try:
        config = built(TrainConfig, given).check()
    except UserError as error:
        raise UserError(f"cell {name}: {error}") from error
    # what evaluations would refuse once all is trained
    if config.condition_on != "picture" or config.conditioning == "none":
        raise UserError(f"cell {name}: runs are evaluated that pictures alone condition: change what conditions it")
    for kind in ("data", "val", "tokens"):
        there(getattr(config, kind), f"cell {name}: {kind}")
    return Cell(name, dict(zip(axes, points)), seed, config.record())


def there(path: str | None, place: str) -> None:
    """Raises `UserError` for a path, and no URL, where nothing is."""
    if path is not None and "://" not in path and not Path(path).exists():
        raise UserError(f"{place} {path} does not exist: mend the path, which is relative to the working folder")


def guidances(judged: Any) -> tuple[float, ...]:
    """The scales, taken out of the options of evaluating."""
    if not isinstance(judged, dict):
        raise UserError(f"evaluate is {judged!r}: give an object of options")
    # that of runs, which `evaluate` leaves to the model
    given = judged.pop("guidance", Sampling.guidance)
    given = filled({"evaluate.guidance": given}, "evaluate.guidance", []) if isinstance(given, list) else [given]
    scales = tuple(option(EvaluateConfig, "guidance", g, f"evaluate.guidance[{i}]") for i, g in enumerate(given))
    apart((f"{scale:g}" for scale in scales), "evaluate.guidance")
    return scales


def check_evaluation(evaluate: Options, guidance: float, out: Path) -> None:
    for needed in required(EvaluateConfig):
        if needed not in evaluate:
            raise UserError(f"evaluate.{needed} is missing: give it")
    for name in ("data", "attributes"):
        there(evaluate.get(name), f"evaluate.{name}")
    try:
        built(EvaluateConfig, evaluate | {"model": str(out), "guidance": guidance}).check()
    except UserError as error:
        raise UserError(f"evaluate: {error}") from error
