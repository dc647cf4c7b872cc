"""Figures for a run, or for pictures made elsewhere: do variations keep the content, and are they diverse?"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from semantica import features
from semantica.benchmarks.quality.evaluate_options import SIZE, EvaluateConfig
from semantica.benchmarks.quality.made import classed, keep, read, read_files, read_labelled, resized
from semantica.benchmarks.quality.metrics.baselines import Asked, noise
from semantica.benchmarks.quality.metrics.judges import judge
from semantica.benchmarks.quality.metrics.jury import REAL, Jury, Row
from semantica.benchmarks.quality.metrics.listing import NAME, Listed, read_listing
from semantica.benchmarks.quality.metrics.shown import show
from semantica.benchmarks.quality.metrics.store import Store
from semantica.benchmarks.quality.systems import evaluated, losses, record, sampled
from semantica.editing.command import writable
from semantica.errors import UserError
from semantica.files import read_json, write_json
from semantica.pipelines.kinds import foreign
from semantica.progress import phase

# (condition's place in the gallery or -1, group) of each evaluated picture
Picks = list[tuple[int, str]]
IGNORE, COPY, NOISE = "ignore the condition", "copy the condition", "noise"


class Space:
    """A feature space with the gallery of real pictures in it."""

    def __init__(self, describe, pictures: np.ndarray, groups: list[str], attributes: dict[str, dict]):
        self.describe, self.groups, self.attributes = describe, np.array(groups), attributes
        self.gallery = describe(pictures)
        self.real_diversity = features.pairwise_mean_distance(self.gallery, self.groups)

    def figures(self, made: np.ndarray, picks: Picks, sets: list | None) -> dict[str, float]:
        """Figures of pictures uint8 `[N, S, S, 3]`; `sets [N]` says which ones are variations of one another."""
        described = self.describe(made)
        found = self.groups[features.nearest(described, self.gallery, np.array([place for place, _ in picks]))]
        wanted = [group for _, group in picks]
        result = {"on_topic": float(np.mean(found == np.array(wanted)))}
        for name in self._names(wanted):
            same = [
                self.attributes[a].get(name) == self.attributes[b].get(name) for a, b in zip(found, wanted, strict=True)
            ]
            result[f"same_{name}"] = float(np.mean(same))
        if sets is not None and len(set(sets)) < len(sets):
            result["diversity"] = features.pairwise_mean_distance(described, sets) / self.real_diversity
        return result

    def _names(self, wanted: list[str]) -> list[str]:
        """Attributes that are known of every group."""
        return sorted(set.intersection(*({*self.attributes.get(group, ())} for group in {*self.groups, *wanted})))


def spread(groups: dict[str, tuple[str, ...]], count: int) -> list[tuple[str, int]]:
    """`count` conditions as (group, place in it), going round the groups, so that every group has its share."""
    order = [(label, place) for place in range(max(map(len, groups.values()))) for label in groups]
    return [(label, place) for label, place in order if place < len(groups[label])][:count]


def evaluate(config: EvaluateConfig) -> dict:
    """Compute, print and write the figures.

    Raises:
        UserError: data, run, judge, attributes or pictures that cannot be used, or a file that cannot be written.
    """
    from semantica.device import pick_device

    config.check()
    if config.keep and os.path.lexists(config.keep):
        raise UserError(f"--keep {config.keep} exists: give a new folder")
    if config.model and config.model.exists():
        # sampling may take hours, and others' folders may be for reading alone
        writable("--out", place_of(config).parent)
    device = pick_device(config.device)
    data = classed(config.data)
    attributes = read_attributes(config.attributes)
    paths = [(label, path) for label, members in data.groups.items() for path in members]
    place = {path: i for i, (_, path) in enumerate(paths)}
    groups = [label for label, _ in paths]
    judging = judge(config.features, device)
    store = Store(judging, config.cache)
    listed = read_listing(config.images, data.groups) if config.images and (config.images / NAME).exists() else None
    pipeline = evaluated(config) if config.model else None
    if pipeline is not None and config.guidance is None:
        config = dataclasses.replace(config, guidance=pipeline.guidance)
    size = config.size or (pipeline.side if pipeline else SIZE)
    pictures = read(data, [path for _, path in paths], size)
    with phase(f"evaluate: {config.features} of {len(pictures)} pictures"):
        space = Space(lambda made: judging.compared(store.describe(made)), pictures, groups, attributes)
    # the grey feature space knows objects on calm backgrounds: for drawn data with known shapes only
    grey = (
        Space(features.shape_only, pictures, groups, attributes)
        if all("shape" in attributes.get(label, ()) for label in data.groups)
        else None
    )

    chosen, of = asked_for(config, data.groups, listed)
    conditions = [(place[data.groups[label][k]], label) for label, k in chosen]
    asked = Asked(np.array([i for i, _ in conditions]), np.array([label for _, label in conditions]), of)
    result = {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str))}
    if data.names:
        result["names"] = {label: ", ".join(data.names[label]) for label in data.groups if label in data.names}
    result |= {"groups": len(data.groups), "pictures": len(paths), "chance": 1 / len(data.groups), "figures": {}}

    def add(name: str, made: np.ndarray, picks: Picks, sets: list | None) -> None:
        row = space.figures(made, picks, sets)
        if grey is not None:
            row["same_shape_in_grey"] = grey.figures(made, picks, None)["same_shape"]
        result["figures"][name] = row

    gallery, names = store.describe(pictures), np.array(groups)
    repeated, sets = [conditions[i] for i in of], of.tolist()
    if pipeline is not None:
        sources = [data.groups[label][k] for label, k in chosen]
        result["system"] = record(config, pipeline, size)
        made, ignoring = sampled(pipeline, config, data, sources)
        if config.keep:
            keep(config.keep, made, config.n, sources, [label for label, _ in chosen])
        made, ignoring = resized(made, size), resized(ignoring, size)
        add("model", made, repeated, sets)
        add(IGNORE, ignoring, repeated, sets)
        if not foreign(config.model):
            with phase("evaluate: denoising loss of right and shuffled conditions"):
                result["loss"] = losses(pipeline, config, data, device)
        # samples without a condition are independent of one another
        alone = dataclasses.replace(asked.row(store.describe(ignoring)), units=np.arange(len(ignoring)))
        rows = {"model": asked.row(store.describe(made)), IGNORE: alone}
    elif listed:
        made = read_files(config.images, listed.files, size)
        add("images", made, repeated, sets)
        rows = {"images": asked.row(store.describe(made)), IGNORE: asked.any(gallery, config.seed)}
    else:
        made, labels = read_labelled(config.images, data.groups, size)
        add("images", made, [(-1, label) for label in labels], labels)
        rows = {"images": unasked(store.describe(made), labels), IGNORE: asked.any(gallery, config.seed)}
    copies = pictures[[i for i, _ in conditions]]
    add(COPY, np.repeat(copies, 2, 0), [c for c in conditions for _ in range(2)], repeats(len(copies)))
    others = [(k + 1) % len(data.groups[label]) for label, k in chosen]
    real = pictures[[place[data.groups[label][o]] for (label, _), o in zip(chosen, others, strict=True)]]
    # a real picture is its own nearest: it is left out instead of the condition
    own = [(place[data.groups[label][o]], label) for (label, _), o in zip(chosen, others, strict=True)]
    add(REAL, real, own, [label for _, label in own])

    rows |= {COPY: asked.copies(gallery), REAL: asked.others(gallery, names, config.seed)}
    unseen = asked.row(store.describe(noise(len(of), size, config.seed)))
    rows[NOISE] = dataclasses.replace(unseen, units=np.arange(len(of)))
    jury = Jury(judging, gallery, names, config.bootstrap, config.seed)
    result["metrics"] = jury.table({name: row for name, row in rows.items() if row is not None})
    known = listed is not None or pipeline is not None
    result["metrics"] |= {"conditions": len(chosen), "units": "conditions" if known else "pictures"}
    write(config, result)
    return result


def asked_for(
    config: EvaluateConfig, groups: dict[str, tuple[str, ...]], listed: Listed | None
) -> tuple[list[tuple[str, int]], np.ndarray]:
    """The conditions as (group, place in it), and for each made picture the number of its condition.

    Raises:
        UserError: conditions are asked for that a list of pictures has fixed.
    """
    if listed is None:
        count = sum(map(len, groups.values())) if config.shots else config.conditions
        chosen = [(label, k) for label, k in spread(groups, count) if config.shots is None or k < config.shots]
        return chosen, np.repeat(np.arange(len(chosen)), config.n)
    default = next(field.default for field in dataclasses.fields(config) if field.name == "conditions")
    if config.shots is not None or config.conditions != default:
        raise UserError(f"{config.images / NAME} says what the conditions are: leave --shots and --conditions out")
    number = {pair: i for i, pair in enumerate(dict.fromkeys(zip(listed.classes, listed.conditions, strict=True)))}
    chosen = [(label, groups[label].index(path)) for label, path in number]
    return chosen, np.array([number[pair] for pair in zip(listed.classes, listed.conditions, strict=True)])


def unasked(described: np.ndarray, labels: list[str]) -> Row:
    """Pictures of which the class alone is known: nothing says that any two of them have a condition in common."""
    count = len(described)
    return Row(described, np.array(labels), np.arange(count), np.array(labels), np.full(count, -1))


def read_attributes(path: Path | None) -> dict[str, dict]:
    """What is said of each group; nothing without a file. Raises `UserError` for another file than that."""
    attributes = read_json(path) if path else {}
    for group, known in attributes.items():
        if not isinstance(known, dict):
            kind = type(known).__name__
            raise UserError(f"{path} says a {kind} of group {group!r}: expected {{group: {{attribute: value}}}}")
    return attributes


def repeats(count: int) -> list[int]:
    return [i for i in range(count) for _ in range(2)]


def place_of(config: EvaluateConfig) -> Path:
    """Where the figures go."""
    folder = config.model if config.model else config.images.parent
    return config.out or folder / "evaluation.json"


def write(config: EvaluateConfig, result: dict) -> None:
    """Write the JSON aside, then rename it; and print the table, also where the one or the other cannot be done."""
    out = place_of(config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another file") from error
    finally:
        printed(config, result)


def printed(config: EvaluateConfig, result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    names = sorted({name for row in result["figures"].values() for name in row}, key=lambda n: (n != "on_topic", n))
    table = Table("", *result["figures"], title=f"{config.model or config.images} on {config.data}")
    for name in names:
        cells = [f"{row[name]:.1%}" if name in row else "" for row in result["figures"].values()]
        table.add_row(name.replace("_", " "), *cells)
    # names of folders are no markup
    console = Console(markup=False)
    console.print(table)
    if "loss" in result:
        loss = result["loss"]
        below = f"{loss['right_below_shuffled']:.1%} below"
        console.print(
            f"denoising loss {loss['right']:.5f}, {below} the {loss['shuffled']:.5f} with shuffled conditions"
        )
    show(console, result["metrics"], "model" if config.model else "images")
