"""`semantica bench streams`: do samples follow a picture and a text at once? By kinds of fusion, beside baselines.

Models are trained here, on drawn pictures whose identity (shape, texture) only pictures tell and whose palette, number
and place only texts do; they are scored on crossings of shape and palette that training never shows.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import tyro

from semantica.benchmarks.harness.table import Column, Row, cells, heads, show
from semantica.benchmarks.harness.verb import check_files
from semantica.benchmarks.quality.crossings import (
    EVERY,
    IDENTITY,
    TEXT,
    Crossing,
    draw,
    draw_crossings,
    recognise,
    shares,
    trials,
)
from semantica.benchmarks.quality.web import philox
from semantica.errors import UserError
from semantica.files import write_json

# what is trained, by its options; in steps, data and sizes like the others. Pictures of a pair share their identity,
# which is what the contrastive loss has their encoder tell from others' sooner
ALIGNED = {"align": 0.05}
MODELS: dict[str, dict[str, Any]] = {
    "parallel": {"condition_on": "both", **ALIGNED},
    "concatenated": {"condition_on": "both", "fusion": "concatenated", **ALIGNED},
    "added": {"condition_on": "both", "conditioning": "global", **ALIGNED},
    "picture": {"condition_on": "picture", **ALIGNED},
    "text": {"condition_on": "text"},
}
SIZES = {"preset": "tiny", "channels": (32,), "depths": (1,), "width": 96, "depth": 3, "heads": 3}
FIGURES = ("identity", "text", *IDENTITY, *TEXT)
# pictures that the page shows of each row
SHOWN = 12


def percent(head: str, name: str) -> Column:
    """A mean over seeds, with its standard deviation where there are several."""

    def cell(row: Row, rows: list[Row]) -> str:
        spread = f" ± {row[f'{name}_std']:.1%}" if f"{name}_std" in row else ""
        return f"{row[name]:.1%}{spread}"

    return Column(head, cell)


COLUMNS = (
    Column("samples of", "{model}"),
    percent("identity kept", "identity"),
    percent("text right", "text"),
    *(percent(name, name) for name in (*IDENTITY, *TEXT)),
)


@dataclass(frozen=True)
class StreamsConfig:
    """Train models on drawn pictures for some minutes each and measure, on held-out crossings, whether a sample has the
    picture's shape and texture (identity) and the text's palette, number and place (text), all of them at once. Models
    differ in what they are conditioned on and in how both meet: parallel (a softmax for each), concatenated (one for
    all tokens), added (as vectors); or the picture or the text alone. Beside them: the condition picture itself, a
    picture of another crossing, and a right one.
    """

    out: Path
    """Folder for the drawn pictures and the runs; runs that are there are not trained again, and unfinished ones go on.
    """
    only: tuple[str, ...] = tuple(MODELS)
    """Models to train: parallel, concatenated, added, picture, text."""
    steps: int = 4000
    """Of training, for each model."""
    batch: int = 32
    seeds: int = 1
    """Trainings of each model, with seeds 0, 1, ..."""
    tests: int = 96
    """Held-out crossings, of 216."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 2
    """Samples of each."""
    sample_steps: int = 20
    guidance: float = 2.0
    """Of texts where there are both, else of the one condition."""
    image_guidance: float = 2.0
    """Of pictures where there are both."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    json: Path | None = None
    """Store the rows."""
    html: Path | None = None
    """Write a page of the table and of samples."""

    def check(self) -> "StreamsConfig":
        """Raises `UserError` for impossible options."""
        # the contrastive loss compares pairs with each other
        for name, least in (("steps", 1), ("batch", 2), ("seeds", 1), ("tests", 1), ("n", 1), ("sample_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least {least}")
        if not self.only:
            raise UserError(f"--only is empty: give some of {', '.join(MODELS)}")
        for name in (name for name in self.only if name not in MODELS):
            raise UserError(f"--only {name}: choose from {', '.join(MODELS)}")
        if self.guidance == 1:
            raise UserError("--guidance 1 turns guidance off, of pictures too: give another scale")
        check_files(self.json, self.html)
        return self


def trained(config: StreamsConfig, name: str, seed: int) -> Path:
    """The run folder of a model, trained unless it is there. Raises `UserError` as the training."""
    from semantica.train.config import TrainConfig
    from semantica.train.loop import train

    # what would make another model has another folder
    out = config.out / f"{name}-{seed}-{config.steps}x{config.batch}"
    if not (out / "model_index.json").is_file():
        rest = dict(
            data=str(config.out / "web" / "train"), out=out, steps=config.steps, batch=config.batch, seed=seed,
            device=config.device, mode="folders", held_out=0.0, flip=False, crop="centre", lr=2e-3, warmup=100,
            decay=0.4, ema=0.998, reference=16, log_every=100, save_every=500, sample_every=config.steps + 1, keep=1,
            workers=0,
        )  # fmt: skip
        train(TrainConfig(**rest, **SIZES, **MODELS[name]))
    return out


def samples(config: StreamsConfig, run: Path, tests: list[tuple[Crossing, Crossing]], seed: int) -> np.ndarray:
    """uint8 `[tests, n, S, S, 3]` of held-out crossings, by whatever of picture and text the model reads."""
    from PIL import Image

    from semantica.pipelines.sample import load_pipeline, variations
    from semantica.sampling.guiders import StreamsApart
    from semantica.sampling.settings import Sampling

    pipeline = load_pipeline(run, config.device)
    conditions = [Image.fromarray(draw(condition, philox(seed, 7, i))) for i, (condition, _) in enumerate(tests)]
    read = {"image": conditions, "text": [target.caption for _, target in tests]}
    given = {name: read[name] for name in pipeline.inputs}
    guider = StreamsApart(config.image_guidance) if len(given) > 1 else None
    settings = Sampling(config.sample_steps, guidance=config.guidance, seed=seed)
    return variations(pipeline, given, config.n, settings, guider)


def figures(made: np.ndarray, tests: list[tuple[Crossing, Crossing]]) -> dict[str, float]:
    """Of samples `[tests, n, S, S, 3]`."""
    flat = [recognise(picture) for row in made for picture in row]
    return shares(flat, [target for _, target in tests for _ in range(made.shape[1])])


def baselines(tests: list[tuple[Crossing, Crossing]], seed: int) -> dict[str, np.ndarray]:
    """Real pictures in the place of samples, `[tests, 1, S, S, 3]`."""
    drawn = philox(seed, 8)
    shown = {
        "(the condition)": [condition for condition, _ in tests],
        "(another picture)": [EVERY[int(drawn.integers(len(EVERY)))] for _ in tests],
        "(a right one)": [target for _, target in tests],
    }
    return {
        name: np.stack([draw(each, philox(seed, 9, i)) for i, each in enumerate(crossings)])[:, None]
        for name, crossings in shown.items()
    }


def over_seeds(model: str, found: list[dict[str, float]]) -> Row:
    """Means, with standard deviations where there are several."""
    row: Row = {"model": model}
    for name in FIGURES:
        values = [each[name] for each in found]
        row[name] = mean(values)
        if len(values) > 1:
            row[f"{name}_std"] = stdev(values)
    return row


def streams(config: StreamsConfig) -> int:
    """Train, sample, judge, show and store; returns the exit code. Raises `UserError` for runs of no use."""
    from semantica.benchmarks.harness.store import environment
    from semantica.device import pick_device

    config.check()
    draw_crossings(config.out / "web")
    settings = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()}
    content = {"environment": environment(pick_device(config.device).type), "config": settings}
    tests = trials(config.tests, 0)
    strips = baselines(tests, 0)
    rows = [over_seeds(name, [figures(made, tests)]) for name, made in strips.items()]
    for name in config.only:
        found = []
        for seed in range(config.seeds):
            made = samples(config, trained(config, name, seed), tests, seed)
            found.append(figures(made, tests))
            strips.setdefault(name, made)
        rows.append(over_seeds(name, found))
        print(" ".join(cells(COLUMNS, [rows[-1]])[0]), flush=True)
        if config.json is not None:
            # rows are stored as they come
            write_json(config.json, content | {"rows": rows})
    show(heads(COLUMNS), cells(COLUMNS, rows))
    if config.html is not None:
        page(config, rows, strips, tests)
    return 0


def page(
    config: StreamsConfig, rows: list[Row], strips: dict[str, np.ndarray], tests: list[tuple[Crossing, Crossing]]
) -> None:
    """The table, and samples of the same crossings by every model."""
    import tempfile

    from semantica.images import grid, save_png
    from semantica.report import Part, picture, write_page

    about = (
        f"{config.steps} steps of {config.batch} each, {config.seeds} seeds; {len(tests)} held-out crossings, "
        f"{config.n} samples of each; guidance {config.guidance:g}, of pictures {config.image_guidance:g}."
    )
    said = "; ".join(target.caption for _, target in tests[:SHOWN])
    parts = [Part(text=about, note=True), Part(columns=heads(COLUMNS), rows=tuple(cells(COLUMNS, rows)))]
    parts.append(Part(text=f"Texts of the strips, from the left: {said}.", note=True))
    with tempfile.TemporaryDirectory() as place:
        for name, made in strips.items():
            save_png(grid([[row[0] for row in made[:SHOWN]]]), Path(place) / "strip.png")
            parts.append(Part(name, png=picture(Path(place) / "strip.png"), alt=name))
    write_page(config.html, "A picture and a text at once", parts, 1000)
