"""`semantica bench guiders`: what each way of guidance does to variations and to unconditional samples, by seeds."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from semantica import features
from semantica.benchmarks.harness.table import Column, Row, cells, heads, show
from semantica.benchmarks.harness.verb import check_files
from semantica.benchmarks.quality.evaluate import Picks, Space, read_attributes, spread
from semantica.benchmarks.quality.made import read
from semantica.benchmarks.quality.metrics.gaussians import frechet
from semantica.benchmarks.quality.metrics.manifolds import precision_recall
from semantica.benchmarks.quality.systems import judged
from semantica.errors import UserError
from semantica.files import write_json
from semantica.sampling.guiders import Guider, IndependentCondition, TimeStep, WeakModel
from semantica.sampling.settings import Sampling

if TYPE_CHECKING:
    from semantica.pipelines.networks import NetworkPipeline

FIGURES = ("on_topic", "same_shape_in_grey", "same_palette", "diversity")
LONELY = ("frechet", "precision", "recall")
# pictures that the page shows of each guider
SHOWN = 8


def percent(head: str, name: str) -> Column:
    """A mean over the seeds, with its standard deviation."""
    return Column(head, lambda row, rows: f"{row[name]:.1%} ± {row[f'{name}_std']:.1%}" if name in row else "")


VARIATIONS = (
    Column("model", "{model}"),
    Column("guider", "{guider}"),
    Column("guidance", "{guidance:g}"),
    percent("on topic", "on_topic"),
    Column("above none", lambda row, rows: difference(row, rows, "on_topic", "none")),
    percent("same shape in grey", "same_shape_in_grey"),
    percent("same palette", "same_palette"),
    percent("diversity", "diversity"),
)
UNCONDITIONAL = (
    Column("model", "{model}"),
    Column("guider", "{guider}"),
    Column("guidance", "{guidance:g}"),
    Column("Frechet distance", "{frechet:.4f} ± {frechet_std:.4f}"),
    Column("above none", lambda row, rows: difference(row, rows, "frechet", "none", "{:+.4f} ± {:.4f}")),
    percent("precision", "precision"),
    percent("recall", "recall"),
)


@dataclass(frozen=True)
class GuidersConfig:
    """Measure ways of guidance on runs of drawn pictures: on-topic rate, shape, palette and diversity of variations of
    held-out pictures, as `semantica evaluate` has them; of unconditional samples the Frechet distance, precision and
    recall to training pictures, in the same feature space. Mean and standard deviation over seeds; the same noise for
    all ways.
    """

    model: tuple[Path, ...]
    """Run folders."""
    data: Path
    """Held-out folder of label folders."""
    train: Path | None = None
    """Training folder, which unconditional samples are compared with; without, they are left out."""
    attributes: Path | None = None
    """JSON {group: {attribute: value}} of the drawn web."""
    weak: tuple[Path, ...] = ()
    """A bad version of each run, in order, for autoguidance."""
    only: tuple[str, ...] = ()
    """Ways by their names; all by default."""
    guidance: tuple[float, ...] = (2.0, 4.0)
    """Scales of each way."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Part of the run in which guidance is on, for ways that have none of their own."""
    conditions: int = 48
    """Condition pictures, spread over the groups."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """Variations of each."""
    samples: int = 512
    """Unconditional samples, and as many training pictures."""
    steps: int = 20
    seeds: int = 3
    """Runs of each way, with seeds 0, 1, ..."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    json: Path | None = None
    """Store the rows."""
    html: Path | None = None
    """Write a page of tables and pictures."""

    def check(self) -> "GuidersConfig":
        """Raises `UserError` for impossible options."""
        for name, least in (("conditions", 2), ("n", 2), ("samples", 8), ("steps", 1), ("seeds", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least {least}")
        if not self.model or not self.guidance:
            raise UserError("--model and --guidance: give at least one of each")
        if self.weak and len(self.weak) != len(self.model):
            raise UserError(f"--weak has {len(self.weak)} runs for {len(self.model)} of --model: give one for each")
        if len({path.name for path in self.model}) < len(self.model):
            raise UserError("--model: two runs are called alike, and so would be their rows")
        for name in (name for name in self.only if name not in WAYS):
            raise UserError(f"--only {name}: choose from {', '.join(WAYS)}")
        if "auto" in self.only and not self.weak:
            raise UserError("--only auto needs a bad version of each run: give --weak")
        check_files(self.json, self.html)
        return self


@dataclass(frozen=True)
class Way:
    """A way of guidance: `make` its guider, of the pipeline of the bad version; `lonely`: it needs no condition;
    `interval`: its own part of the run, None for --interval."""

    make: Callable[["NetworkPipeline | None"], Guider | None]
    lonely: bool = False
    interval: tuple[float, float] | None = None


# of time-step guidance the paper's settings of DiT-XL/2, conditional and unconditional, and in a part of the blocks
WAYS = {
    "none": Way(lambda weak: None, True),
    "cfg": Way(lambda weak: None),
    "icg": Way(lambda weak: IndependentCondition()),
    # a condition that z does not show yet is as good as independent of it
    "icg-early": Way(lambda weak: IndependentCondition(), interval=(0.0, 0.25)),
    "icg-noise": Way(lambda weak: IndependentCondition(noise=True)),
    "tsg": Way(lambda weak: TimeStep(2.0, 1.0), True),
    "tsg-constant": Way(lambda weak: TimeStep(1.0, 0.0), True, (0.2, 0.8)),
    "tsg-blocks": Way(lambda weak: TimeStep(2.0, 1.0, blocks=1), True),
    "auto": Way(WeakModel),
}


@dataclass(frozen=True)
class Judge:
    """Held-out pictures and the spaces that variations of some of them are judged in."""

    opened: list
    picks: Picks
    space: Space
    grey: Space

    @classmethod
    def of(cls, config: GuidersConfig, size: int) -> "Judge":
        from semantica.images import load_image
        from semantica.train.data.folders import scan

        data = scan(config.data, "folders")
        listed = [(label, path) for label, members in data.groups.items() for path in members]
        place = {path: i for i, (_, path) in enumerate(listed)}
        pictures, groups = read(data, [path for _, path in listed], size), [label for label, _ in listed]
        attributes = read_attributes(config.attributes)
        spaces = (Space(f, pictures, groups, attributes) for f in (features.colour_and_shape, features.shape_only))
        chosen = [(label, data.groups[label][k]) for label, k in spread(data.groups, config.conditions)]
        opened = [load_image(data.root / path) for _, path in chosen]
        return cls(opened, [(place[path], label) for label, path in chosen], *spaces)

    def figures(self, made: np.ndarray) -> dict[str, float]:
        """Of variations uint8 `[conditions, n, S, S, 3]`."""
        n, flat = made.shape[1], made.reshape(-1, *made.shape[2:])
        picks, sets = [pick for pick in self.picks for _ in range(n)], np.repeat(np.arange(len(made)), n).tolist()
        found = self.space.figures(flat, picks, sets)
        # shapes are known from --attributes alone
        if "same_shape" in (grey := self.grey.figures(flat, picks, None)):
            found["same_shape_in_grey"] = grey["same_shape"]
        return {name: found[name] for name in FIGURES if name in found}


def training_features(config: GuidersConfig, size: int) -> np.ndarray | None:
    """Of as many training pictures as samples, spread over the groups. Raises `UserError` where there are fewer."""
    from semantica.train.data.folders import scan

    if config.train is None:
        return None
    data = scan(config.train, "folders")
    chosen = spread(data.groups, config.samples)
    if len(chosen) < config.samples:
        raise UserError(
            f"--samples {config.samples} are compared with as many training pictures, and {config.train} holds "
            f"{len(chosen)}: give fewer"
        )
    return features.colour_and_shape(read(data, [data.groups[label][k] for label, k in chosen], size))


def guiders(config: GuidersConfig) -> int:
    """Sample, judge, show and store; returns the exit code. Raises `UserError` for data and runs of no use."""
    from semantica.benchmarks.harness.store import environment
    from semantica.device import pick_device

    config.check()
    rows: list[Row] = []
    lonely: list[Row] = []
    strips = {}
    settings = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()}
    content = {"environment": environment(pick_device(config.device).type), "config": settings}
    for number, model in enumerate(config.model):
        pipeline = judged(model, config.device)
        weak = judged(config.weak[number], config.device) if config.weak else None
        size = pipeline.unet.config.image_size
        judge, real = Judge.of(config, size), training_features(config, size)
        for name, way in WAYS.items():
            if (config.only and name not in config.only) or (name == "auto" and weak is None):
                continue
            for scale in (1.0,) if name == "none" else config.guidance:
                which = {"model": model.name, "guider": name, "guidance": scale}
                row, strip = vary(config, pipeline, judge, way, weak, scale)
                rows.append(which | row)
                strips[f"{model.name}, {name}, {scale:g}"] = strip
                print(" ".join(cells(VARIATIONS, [rows[-1]], rows)[0]), flush=True)
                if real is not None and way.lonely:
                    lonely.append(which | alone(config, pipeline, real, way, weak, scale))
                    print(" ".join(cells(UNCONDITIONAL, [lonely[-1]], lonely)[0]), flush=True)
                if config.json is not None:
                    # rows are stored as they come
                    write_json(config.json, content | {"variations": rows, "unconditional": lonely})
    for columns, body in ((VARIATIONS, rows), (UNCONDITIONAL, lonely)):
        if body:
            show(heads(columns), cells(columns, body))
    if config.html is not None:
        page(config, rows, lonely, strips)
    return 0


def settings_of(config: GuidersConfig, way: Way, scale: float, seed: int) -> Sampling:
    return Sampling(config.steps, guidance=scale, interval=way.interval or config.interval, seed=seed)


def vary(config, pipeline, judge: Judge, way: Way, weak, scale: float) -> tuple[Row, list[np.ndarray]]:
    """A row of figures over the seeds, and the first variation of some conditions."""
    from semantica.pipelines.sample import variations

    found, shown = [], []
    for seed in range(config.seeds):
        settings = settings_of(config, way, scale, seed)
        made = variations(pipeline, judge.opened, config.n, settings, way.make(weak))
        found.append(judge.figures(made))
        shown = shown or [row[0] for row in made[:SHOWN]]
    return over_seeds(found), shown


def alone(config, pipeline, real: np.ndarray, way: Way, weak, scale: float) -> Row:
    """A row of unconditional samples' figures over the seeds."""
    from semantica.pipelines.sample import unconditional

    found = []
    for seed in range(config.seeds):
        settings = settings_of(config, way, scale, seed)
        made = features.colour_and_shape(unconditional(pipeline, config.samples, settings, way.make(weak)))
        found.append(dict(zip(LONELY, (frechet(made, real), *precision_recall(made, real)))))
    return over_seeds(found)


def over_seeds(found: list[dict[str, float]]) -> Row:
    """Mean, standard deviation and the values themselves of each figure."""
    row: Row = {"seeds": {name: [one[name] for one in found] for name in found[0]}}
    for name, values in row["seeds"].items():
        row |= {name: mean(values), f"{name}_std": stdev(values)}
    return row


def difference(row: Row, rows: list[Row], name: str, other: str, written: str = "{:+.1%} ± {:.1%}") -> str:
    """To another way of the same model, seed by seed: mean and standard error."""
    base = [r for r in rows if r["guider"] == other and r["model"] == row["model"]]
    if not base or row["guider"] == other:
        return ""
    apart = [a - b for a, b in zip(row["seeds"][name], base[0]["seeds"][name])]
    return written.format(mean(apart), stdev(apart) / len(apart) ** 0.5)


def page(config: GuidersConfig, rows: list[Row], lonely: list[Row], strips: dict[str, list[np.ndarray]]) -> None:
    """Tables, and the same noise under every way."""
    import tempfile

    from semantica.images import grid, save_png
    from semantica.report import Part, picture, write_page

    about = (
        f"{config.conditions} held-out pictures, {config.n} variations of each, {config.steps} steps, {config.seeds} "
        "seeds: mean and standard deviation over the seeds; the same noise for all ways."
    )
    parts = [Part(text=about, note=True)]
    parts.append(Part("Variations", columns=heads(VARIATIONS), rows=tuple(cells(VARIATIONS, rows))))
    if lonely:
        note = f"{config.samples} samples to as many training pictures."
        parts.append(
            Part("Unconditional samples", note, True, heads(UNCONDITIONAL), tuple(cells(UNCONDITIONAL, lonely)))
        )
    with tempfile.TemporaryDirectory() as place:
        for name, strip in strips.items():
            save_png(grid([strip]), Path(place) / "strip.png")
            parts.append(Part(name, png=picture(Path(place) / "strip.png"), alt=name))
    write_page(config.html, "Ways of guidance", parts, 1000)
