"""Figures for a run, or for pictures made elsewhere: do variations keep the content, and are they diverse?"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from semantica import features
from semantica.errors import UserError
from semantica.files import read_json, write_json

# options of how a model samples
SAMPLING = ("n", "steps", "guidance", "seed")
# (condition's place in the gallery or -1, group) of each evaluated picture
Picks = list[tuple[int, str]]


@dataclass(frozen=True)
class EvaluateConfig:
    """Figures for a run (--model) or for a folder of pictures made elsewhere (--images), on held-out data.

    On-topic rate: share of samples whose nearest picture in --data, the condition itself left out, is of the
    condition's group. Diversity: mean distance between variations of one condition, as a share of the mean distance
    between pictures of one group. Baselines: copying the condition, ignoring it, and other real pictures (ceiling).
    """

    data: Path
    """Held-out folder of label folders."""
    model: Path | None = None
    """Run folder."""
    images: Path | None = None
    """Folder with one folder of made pictures for each label of --data."""
    out: Path | None = None
    """Where to write the figures as JSON; by default evaluation.json in --model or beside --images."""
    attributes: Path | None = None
    """JSON {group: {attribute: value}}: also report how often the nearest picture shares each attribute."""
    features: Annotated[str, tyro.conf.arg(metavar="NAME")] = "colour-and-shape"
    """Feature space: "colour-and-shape", or a DINOv2, CLIP or SigLIP encoder by hub name or local folder."""
    conditions: int = 64
    """Condition pictures, spread over the groups."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """Variations of each condition."""
    steps: int = 20
    guidance: float = 1.5
    seed: int = 0
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"

    def check(self) -> "EvaluateConfig":
        """Raises `UserError` for impossible options."""
        if (self.model is None) == (self.images is None):
            raise UserError("give either --model or --images")
        sampling = {field.name: field.default for field in dataclasses.fields(self) if field.name in SAMPLING}
        for name, default in sampling.items() if self.images else ():
            if getattr(self, name) != default:
                raise UserError(f"--{name} says nothing to pictures that are there: leave it out with --images")
        for name in ("conditions", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        if self.n < 2:
            raise UserError(f"--n is {self.n}: diversity needs at least 2 variations")
        return self


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
        known = all(group in self.attributes for group in {*self.groups, *wanted})
        return sorted(self.attributes[wanted[0]]) if known and self.attributes else []


def describe_with(source: str, device):
    """Pictures uint8 `[N, S, S, 3]` to unit pooled vectors of a pretrained encoder `[N, C]`."""
    import torch

    from semantica.images import to_tensor
    from semantica.model.encoders import PretrainedEncoder

    encoder = PretrainedEncoder.from_source(source).to(device)

    def describe(pictures: np.ndarray) -> np.ndarray:
        parts = [encoder(to_tensor(pictures[i : i + 64]).to(device)).pooled for i in range(0, len(pictures), 64)]
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1).cpu().numpy()

    return describe


def spread(groups: dict[str, tuple[str, ...]], count: int) -> list[tuple[str, int]]:
    """`count` conditions as (group, place in it), going round the groups, so that every group has its share."""
    order = [(label, place) for place in range(max(map(len, groups.values()))) for label in groups]
    return [(label, place) for label, place in order if place < len(groups[label])][:count]


def evaluate(config: EvaluateConfig) -> dict:
    """Compute, print and write the figures.

    Raises:
        UserError: data, run or pictures that cannot be used.
    """
    from semantica.device import pick_device
    from semantica.train.data.folders import scan

    config.check()
    device = pick_device(config.device)
    data = scan(config.data, "folders")
    attributes = read_json(config.attributes) if config.attributes else {}
    paths = [(label, path) for label, members in data.groups.items() for path in members]
    place = {path: i for i, (_, path) in enumerate(paths)}
    groups = [label for label, _ in paths]
    pipeline = None
    if config.model:
        from semantica.engines.bundle import is_bundle
        from semantica.model.conditioner import Conditioner
        from semantica.pipelines.sample import load_pipeline

        if is_bundle(config.model):
            raise UserError(f"{config.model} is a bundle: give the run folder that it was exported from")
        pipeline = load_pipeline(config.model, config.device)
        if isinstance(pipeline.encoder, Conditioner):
            raise UserError(f"{config.model} has several encoders: models that pictures alone condition are judged")
    size = pipeline.unet.config.image_size if pipeline else 64
    pictures = read(data, [path for _, path in paths], size)
    describe = (
        features.colour_and_shape if config.features == "colour-and-shape" else describe_with(config.features, device)
    )
    space = Space(describe, pictures, groups, attributes)
    # the grey feature space knows objects on calm backgrounds: for drawn data with known shapes only
    grey = (
        Space(features.shape_only, pictures, groups, attributes)
        if any("shape" in a for a in attributes.values())
        else None
    )

    chosen = spread(data.groups, config.conditions)
    conditions = [(place[data.groups[label][k]], label) for label, k in chosen]
    result = {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str))}
    result |= {"groups": len(data.groups), "pictures": len(paths), "chance": 1 / len(data.groups), "figures": {}}

    def add(name: str, made: np.ndarray, picks: Picks, sets: list | None) -> None:
        row = space.figures(made, picks, sets)
        if grey is not None:
            row["same_shape_in_grey"] = grey.figures(made, picks, None)["same_shape"]
        result["figures"][name] = row

    if pipeline is not None:
        made, ignoring = sampled(pipeline, config, data, [data.groups[label][k] for label, k in chosen])
        repeated = [pick for pick in conditions for _ in range(config.n)]
        sets = [i for i in range(len(conditions)) for _ in range(config.n)]
        add("model", made, repeated, sets)
        add("ignore the condition", ignoring, repeated, sets)
        result["loss"] = losses(pipeline, config, data, device)
    else:
        made_data = scan(config.images, "reconstruct")
        unknown = sorted(set(made_data.groups) - set(data.groups))
        if unknown:
            raise UserError(
                f"--images has {unknown[0]!r}, which is no label of --data: name its folders after the labels"
            )
        listed = [(label, path) for label, members in made_data.groups.items() for path in members]
        made = read(made_data, [path for _, path in listed], size)
        add("images", made, [(-1, label) for label, _ in listed], [label for label, _ in listed])
    copies = pictures[[i for i, _ in conditions]]
    add("copy the condition", np.repeat(copies, 2, 0), [c for c in conditions for _ in range(2)], repeats(len(copies)))
    others = [(k + 1) % len(data.groups[label]) for label, k in chosen]
    real = pictures[[place[data.groups[label][o]] for (label, _), o in zip(chosen, others, strict=True)]]
    # a real picture is its own nearest: it is left out instead of the condition
    own = [(place[data.groups[label][o]], label) for (label, _), o in zip(chosen, others, strict=True)]
    add("real pictures", real, own, [label for _, label in own])
    write(config, result)
    return result


def repeats(count: int) -> list[int]:
    return [i for i in range(count) for _ in range(2)]


def read(data, paths: list[str], size: int) -> np.ndarray:
    """Pictures uint8 `[N, size, size, 3]`, centre crops. Raises `UserError` for one that cannot be decoded."""
    from semantica.images import fit, load_image

    return np.stack([fit(load_image(data.root / path, near=2 * size), size) for path in paths])


def sampled(pipeline, config: EvaluateConfig, data, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Variations of the conditions, and as many samples of the model without any condition."""
    from semantica.images import load_image
    from semantica.pipelines.sample import unconditional, variations
    from semantica.sampling.settings import Sampling

    opened = [load_image(data.root / path) for path in paths]
    settings = Sampling(config.steps, guidance=config.guidance, seed=config.seed)
    made = variations(pipeline, opened, config.n, settings)
    ignoring = unconditional(pipeline, len(opened) * config.n, dataclasses.replace(settings, seed=config.seed + 1))
    return made.reshape(-1, *made.shape[2:]), ignoring


def losses(pipeline, config: EvaluateConfig, data, device) -> dict[str, float]:
    """Denoising loss with the right condition and with one of another group."""
    from contextlib import nullcontext

    from semantica.train.data.heldout import held_out_batches
    from semantica.train.objective import Objective, held_out_loss

    unet, encoder = pipeline.unet, pipeline.encoder
    batches = held_out_batches(data, config.seed, encoder.image_size, unet.config.image_size, device)
    found = held_out_loss(Objective(unet, encoder), batches, pipeline.scheduler.schedule, nullcontext)
    return {**found, "right_below_shuffled": 1 - found["right"] / found["shuffled"]}


def write(config: EvaluateConfig, result: dict) -> None:
    """Print the table, and write the JSON aside, then rename it."""
    from rich.console import Console
    from rich.table import Table

    names = sorted({name for row in result["figures"].values() for name in row}, key=lambda n: (n != "on_topic", n))
    table = Table("", *result["figures"], title=f"{config.model or config.images} on {config.data}")
    for name in names:
        cells = [f"{row[name]:.1%}" if name in row else "" for row in result["figures"].values()]
        table.add_row(name.replace("_", " "), *cells)
    console = Console()
    console.print(table)
    if "loss" in result:
        loss = result["loss"]
        below = f"{loss['right_below_shuffled']:.1%} below"
        console.print(
            f"denoising loss {loss['right']:.5f}, {below} the {loss['shuffled']:.5f} with shuffled conditions"
        )
    folder = config.model if config.model else config.images.parent
    out = config.out or folder / "evaluation.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
