"""`semantica bench segment`: CAT-Seg on drawn scenes with exact masks, with crossings that training never sees.

Small towers are trained whole first, in the place of published weights; then the aggregator, and of the towers the
projections to queries and values, as the paper does. Beside it stands what cosines alone find.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantica.benchmarks.harness.table import Column, Row, cells, heads, show
from semantica.benchmarks.harness.verb import check_files, need
from semantica.errors import UserError
from semantica.files import write_json

TEMPLATE = "a {}"
# pictures at a time, and of the page
MANY, SHOWN = 32, 12
COLUMNS = (
    Column("method", "{method}"),
    Column("mIoU, seen crossings", "{seen:.3f}"),
    Column("mIoU, unseen crossings", "{unseen:.3f}"),
    Column("unseen / seen", "{ratio:.2f}"),
    Column("mIoU, grounds", "{grounds:.3f}"),
    Column("pixels right", "{right:.1%}"),
)


@dataclass(frozen=True)
class SegmentBenchConfig:
    """Train CAT-Seg on drawn scenes with masks and measure it on scenes that it has not seen, half of them with a
    crossing of shape and colour that neither the towers nor the aggregator were ever shown. All classes are offered for
    every picture. mIoU: intersection over union of each class over all pixels of all pictures, then the mean over
    classes. Cosines: the class whose text is nearest to the dense tokens of a place, of the towers before and after.
    """

    out: Path
    """Folder of the data, the towers and the run; what is finished there is used again."""
    pictures: int = 3000
    """Drawn to train on."""
    held_out: int = 120
    """To measure on, of each kind."""
    tower_steps: int = 800
    steps: int = 300
    batch: int = 8
    rate: float = 2e-3
    """Of the aggregator; queries and values of the towers take a tenth."""
    seed: int = 0
    json: Path | None = None
    """Store the rows."""
    html: Path | None = None
    """Write a page of the table and some pictures."""

    def check(self) -> "SegmentBenchConfig":
        """Raises `UserError` for impossible options."""
        for name in ("pictures", "held_out", "tower_steps", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 1 or more")
        if self.seed < 0 or not self.rate > 0:
            raise UserError(f"--seed {self.seed} --rate {self.rate}: give a seed of 0 or more, and a rate above 0")
        check_files(self.json, self.html)
        if self.html is not None:
            need("jinja2")
        return self


def figures(found: np.ndarray, right: np.ndarray) -> Row:
    """Of classes found and right, `[N, S, S]` each, in the numbers of `EVERY`."""
    from semantica.benchmarks.quality.labelled import EVERY, KNOWN, SEEN, UNSEEN, intersections

    each = intersections(found, right, len(EVERY))
    seen, grounds = float(np.nanmean(each[: len(SEEN)])), float(np.nanmean(each[len(SEEN) : len(KNOWN)]))
    unseen = float(np.nanmean(each[len(KNOWN) :]))
    return {
        "seen": seen,
        "unseen": unseen,
        "ratio": unseen / seen if seen else 0.0,
        "grounds": grounds,
        "right": float((found == right).mean()),
        "each_unseen": {name: float(value) for name, value in zip(UNSEEN, each[len(KNOWN) :], strict=True)},
    }


def found_by(model, pictures: np.ndarray, cosines: bool) -> np.ndarray:
    """The class of each pixel among `EVERY`, `[N, S, S]`: by the whole model, or by its towers' cosines alone."""
    import torch
    import torch.nn.functional as F

    from semantica.benchmarks.quality.labelled import EVERY
    from semantica.images import to_tensor
    from semantica.segmentation.aggregator import cost_volume

    made = []
    with torch.no_grad():
        text = model.embed(model.numbers(EVERY))
        for begin in range(0, len(pictures), MANY):
            some = to_tensor(pictures[begin : begin + MANY])
            seen = model.dense(some)
            likely = cost_volume(seen.tokens, text[None])[:, :, 0] if cosines else model(some, text)
            likely = F.interpolate(likely, some.shape[-2:], mode="bilinear", align_corners=False)
            made.append(likely.argmax(1).numpy())
    return np.concatenate(made)


def segment(config: SegmentBenchConfig) -> int:
    """Draw, train, measure, print and write. Raises `UserError` for a folder that holds something else."""
    import torch

    from semantica.benchmarks.harness.store import environment
    from semantica.benchmarks.quality.labelled import KNOWN, draw_labelled, held_out
    from semantica.benchmarks.quality.small_clip import SIZES, train_places, write_clip
    from semantica.images import to_tensor
    from semantica.segmentation.segmenter import Segmenter, load_segmenter
    from semantica.train.segmentation.config import TrainSegmenterConfig
    from semantica.train.segmentation.data import Labelled
    from semantica.train.segmentation.loop import train_segmenter

    config.check()
    config.out.mkdir(parents=True, exist_ok=True)
    data, fresh, clip, run = (config.out / name for name in ("data", "fresh", "clip", "run"))
    draw_labelled(data, config.seed, config.pictures)
    seconds = {}
    if not clip.is_dir():
        write_clip(fresh, config.seed)
        read = [Labelled.open(data).read(number) for number in range(config.pictures)]
        pictures = to_tensor(np.stack([np.asarray(picture) for picture, _ in read]))
        labels = torch.from_numpy(np.stack([mask for _, mask in read]).astype(np.int64))
        began = time.process_time()
        train_places(fresh, clip, pictures, labels, KNOWN, TEMPLATE, config.seed, config.tower_steps)
        seconds["towers"] = round(time.process_time() - began)
    began = time.process_time()
    train_segmenter(
        TrainSegmenterConfig(
            data, str(clip), run, config.steps, config.batch, config.rate, clip_rate=0.1, clip_norm=1.0, warmup=50,
            template=(TEMPLATE,), sizes=SIZES, seed=config.seed, workers=0, save_every=200, device="cpu",
        )
    )  # fmt: skip
    seconds["segmenter"] = round(time.process_time() - began)
    pictures, right = held_out(config.seed, config.held_out)
    model, before = load_segmenter(run), Segmenter.from_clip(clip, templates=(TEMPLATE,), sizes=SIZES).eval()
    found = {
        "cosines, towers as they were": found_by(before, pictures, True),
        "cosines, towers of CAT-Seg": found_by(model, pictures, True),
        "CAT-Seg": found_by(model, pictures, False),
    }
    rows = [{"method": name, **figures(each, right)} for name, each in found.items()]
    show(heads(COLUMNS), cells(COLUMNS, rows))
    if config.json is not None:
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()}
        write_json(
            config.json,
            {"environment": environment("cpu"), "config": plain, "processor_seconds": seconds, "rows": rows},
        )
    if config.html is not None:
        page(config, rows, pictures, {"exact": right, **found})
    return 0


def page(config: SegmentBenchConfig, rows: list[Row], pictures: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """The table, and the classes of some pictures as each method sees them."""
    import tempfile

    from semantica.benchmarks.quality.labelled import EVERY
    from semantica.images import grid, save_png
    from semantica.report import Part, picture, write_page
    from semantica.segmentation.shown import colour

    about = (
        f"{config.pictures} drawn scenes to train on; measured on {config.held_out} others of their kind and "
        f"{config.held_out} with a crossing of shape and colour that training never shows, all {len(EVERY)} classes "
        f"offered for each. Towers: {config.tower_steps} steps whole; CAT-Seg: {config.steps} steps of the aggregator, "
        "queries and values."
    )
    each = tuple((name, *(f"{row['each_unseen'][name]:.3f}" for row in rows)) for name in rows[0]["each_unseen"])
    parts = [
        Part(text=about, note=True),
        Part(columns=heads(COLUMNS), rows=tuple(cells(COLUMNS, rows))),
        Part("Unseen crossings, IoU", columns=("class", *(row["method"] for row in rows)), rows=each),
    ]
    palette = np.array([colour(number) for number in range(len(EVERY))], np.uint8)
    for title, first in (("Scenes of the training's kind", 0), ("Scenes with an unseen crossing", len(pictures) // 2)):
        some = slice(first, first + SHOWN)
        lines = [list(pictures[some]), *(list(palette[each[some]]) for each in found.values())]
        with tempfile.TemporaryDirectory() as place:
            save_png(grid(lines), Path(place) / "some.png")
            rest = ", ".join(found)
            parts.append(Part(title, f"Rows: the picture, {rest}; a colour for each class.",
                              png=picture(Path(place) / "some.png"), alt=title))  # fmt: skip
    write_page(config.html, "Segmentation of drawn scenes", parts, 1000)
