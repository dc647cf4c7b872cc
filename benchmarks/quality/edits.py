"""`semantica bench edits`: drawn pictures edited to another palette; is the layout kept, has the palette come?

The picture that an edit should give is known: `draw_image` draws the same place, shape and size in other colours.
"""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from semantica.benchmarks.harness.table import Column, Row, cells, heads, show
from semantica.benchmarks.harness.verb import check_files
from semantica.benchmarks.quality.recognise import iou
from semantica.benchmarks.quality.web import PALETTES, draw_image, held_out_groups, philox
from semantica.errors import UserError
from semantica.files import write_json

# edits that the page shows of each row
SHOWN = 8
COLUMNS = (
    Column("method", "{method}"),
    Column("w_dds", "{w_dds}"),
    Column("w_cut", "{w_cut}"),
    Column("palette matches", "{palette:.1%}"),
    Column("layout kept, IoU", "{iou:.3f} ± {iou_error:.3f}"),
    Column("palette, light stays light", "{palette_alike:.1%}"),
    Column("IoU, light stays light", "{iou_alike:.3f}"),
    Column("distance to the right picture", "{distance:.1f}"),
)


@dataclass(frozen=True)
class EditsConfig:
    """Measure SDS, DDS and CDS on a run of drawn pictures (`semantica demo`): each held-out picture is edited towards
    another picture of the same shape, count and texture in other colours. Layout: intersection over union of what is
    nearer to the target's object than to its ground, in colour, with the source's object. Palette: the two colours that
    explain the picture best are the target's. Distance: root mean square to the picture drawn again in those colours,
    of 255. Layout and palette once more for edits that do not turn light objects on dark into dark ones on light.
    """

    model: Path
    """Run folder."""
    pairs: int = 16
    """Edits, over the 16 held-out groups."""
    iterations: int = 200
    guidance: float = 4.0
    w_dds: tuple[float, ...] = (1.0,)
    """Weights of the scores, for each method."""
    w_cut: tuple[float, ...] = (3.0, 30.0, 300.0)
    """Weights of the contrastive loss, for cds."""
    seed: int = 0
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    json: Path | None = None
    """Store the rows."""
    html: Path | None = None
    """Write a page of the table and the pictures."""

    def check(self) -> "EditsConfig":
        """Raises `UserError` for impossible options."""
        if self.pairs < 2 or self.seed < 0:
            raise UserError(f"--pairs {self.pairs} --seed {self.seed}: give at least 2 pairs, and a seed of 0 or more")
        if not self.w_dds:
            raise UserError("--w-dds is empty: give at least one weight")
        check_files(self.json, self.html)
        return self


@dataclass(frozen=True, eq=False)
class Pair:
    """What is edited, towards what, and what would be right, uint8 `[32, 32, 3]`; mask: of the source's objects; alike:
    whether light objects stay lighter than their ground, and dark ones darker."""

    source: np.ndarray
    other: np.ndarray
    right: np.ndarray
    mask: np.ndarray
    palette: str
    alike: bool


def pairs_of(count: int, seed: int) -> list[Pair]:
    """Edits from each held-out group to its shape in one of the other held-out palettes, round and round."""
    groups, made = held_out_groups(), []
    names = list(dict.fromkeys(group.palette for group in groups))
    for number in range(count):
        group = groups[number % len(groups)]
        turn = 1 + number // len(groups) % (len(names) - 1)
        target = replace(group, palette=names[(names.index(group.palette) + turn) % len(names)])
        # one layout, and equal draws of what else varies: the same picture in other colours
        drawn = [draw_image(g, 0, philox(seed, 3, number)) for g in (group, target)]
        other = draw_image(target, 0, philox(seed, 4, number))
        made.append(Pair(drawn[0], other, drawn[1], mask_of(drawn[0], group.palette), target.palette,
                         lit(group.palette) == lit(target.palette)))  # fmt: skip
    return made


def lit(palette: str) -> bool:
    """Whether a palette's object is lighter than its ground."""
    ground, thing = (np.dot((0.299, 0.587, 0.114), colour) for colour in PALETTES[palette])
    return bool(thing > ground)


def mask_of(picture: np.ndarray, palette: str) -> np.ndarray:
    """Pixels that are nearer to a palette's object than to its background, bool `[32, 32]`."""
    ground, thing = (np.square(picture - np.array(colour, np.float64)).sum(-1) for colour in PALETTES[palette])
    return thing < ground


def palette_of(picture: np.ndarray) -> str:
    """The palette whose two colours explain a picture best: least mean distance of a pixel to the nearer one."""

    def rest(palette: str) -> float:
        apart = [np.square(picture - np.array(c, np.float64)).sum(-1) for c in PALETTES[palette]]
        return float(np.sqrt(np.minimum(*apart)).mean())

    return min(PALETTES, key=rest)


def figures(made: np.ndarray, pairs: list[Pair]) -> Row:
    """Of edited pictures uint8 `[B, 32, 32, 3]`; `iou_error` is the standard error of the mean."""
    overlap = [iou(mask_of(picture, pair.palette), pair.mask) for picture, pair in zip(made, pairs, strict=True)]
    off = [np.sqrt(np.square(picture - pair.right.astype(np.float64)).mean()) for picture, pair in zip(made, pairs)]
    match = [palette_of(picture) == pair.palette for picture, pair in zip(made, pairs)]
    alike = [number for number, pair in enumerate(pairs) if pair.alike]
    return {
        "palette": float(np.mean(match)),
        "iou": float(np.mean(overlap)),
        "iou_error": float(np.std(overlap, ddof=1) / len(overlap) ** 0.5),
        "palette_alike": float(np.mean([match[i] for i in alike])),
        "iou_alike": float(np.mean([overlap[i] for i in alike])),
        "distance": float(np.mean(off)),
    }


def edits(config: EditsConfig) -> int:
    """Measure, print and write: rows as they come. Raises `UserError` for a run that cannot be used."""
    from PIL import Image

    from semantica.benchmarks.harness.store import environment
    from semantica.device import pick_device
    from semantica.editing.pictures import edit_pictures
    from semantica.editing.scores import Editing
    from semantica.pipelines.sample import load_pipeline

    config.check()
    # every number is looked at before anything runs
    base = Editing("dds", config.iterations, guidance=config.guidance, seed=config.seed)
    wanted = [replace(base, method=name, w_dds=w) for name in ("sds", "dds") for w in config.w_dds]
    wanted += [replace(base, method="cds", w_dds=w, w_cut=cut) for w in config.w_dds for cut in config.w_cut]
    pipeline = load_pipeline(config.model, config.device)
    if getattr(pipeline, "side", None) != 32 or not hasattr(pipeline.encoder, "image_size"):
        raise UserError(f"{config.model} is no run of drawn pictures of 32 pixels: give the run of 'semantica demo'")
    pairs = pairs_of(config.pairs, config.seed)
    given = {name: np.stack([getattr(pair, name) for pair in pairs]) for name in ("source", "other", "right")}
    rows = [
        {"method": said, "w_dds": "", "w_cut": "", **figures(given[name], pairs)}
        for name, said in (("source", "(the source)"), ("other", "(the other picture)"), ("right", "(the right one)"))
    ]
    strips = {row["method"]: list(given[name])[:SHOWN] for row, name in zip(rows, given)}
    pictures, others = ([Image.fromarray(p) for p in given[name]] for name in ("source", "other"))
    plain = {k: v if isinstance(v, int | float) else str(v) for k, v in dataclasses.asdict(config).items()}
    content = {"environment": environment(pick_device(config.device).type), "config": plain, "rows": rows}
    for settings in wanted:
        made = edit_pictures(pipeline, pictures, [*pictures, *others], settings)
        cut = f"{settings.w_cut:g}" if settings.method == "cds" else ""
        row = {"method": settings.method, "w_dds": f"{settings.w_dds:g}", "w_cut": cut, **figures(made, pairs)}
        rows.append(row)
        strips[" ".join(filter(None, (settings.method, f"w_dds {row['w_dds']}", cut and f"w_cut {cut}")))] = list(
            made[:SHOWN]
        )
        if config.json is not None:
            # rows are stored as they come
            write_json(config.json, content)
        print(" ".join(cells(COLUMNS, [row])[0]), flush=True)
    show(heads(COLUMNS), cells(COLUMNS, rows))
    if config.html is not None:
        page(config, rows, strips)
    return 0


def page(config: EditsConfig, rows: list[Row], strips: dict[str, list[np.ndarray]]) -> None:
    """The table, and the same edits under every setting."""
    import tempfile

    from semantica.images import grid, save_png
    from semantica.report import Part, picture, write_page

    about = (
        f"{config.pairs} held-out pictures, each edited towards another picture of its shape in other colours; "
        f"{config.iterations} iterations, guidance {config.guidance:g}."
    )
    parts = [Part(text=about, note=True), Part(columns=heads(COLUMNS), rows=tuple(cells(COLUMNS, rows)))]
    with tempfile.TemporaryDirectory() as place:
        for name, strip in strips.items():
            save_png(grid([strip]), Path(place) / "strip.png")
            parts.append(Part(name, png=picture(Path(place) / "strip.png"), alt=name))
    write_page(config.html, "Edits of drawn pictures", parts, 1000)
