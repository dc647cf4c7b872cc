"""`semantica bench pie-bench`: edited pictures scored as PIE-Bench does, beside the pictures as they were."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from semantica.benchmarks.harness.table import Column, cells, heads, show
from semantica.benchmarks.quality.evaluate_options import FEWEST_DRAWS
from semantica.benchmarks.quality.published.figures import picture_at, shown, store, summed
from semantica.benchmarks.quality.published.pie_bench import MAPPING, PICTURES, Edit, read_edits
from semantica.benchmarks.quality.published.preservation import WINDOW, mse, outside, psnr, ssim
from semantica.errors import UserError
from semantica.progress import phase

EDITED, SOURCE = "edited", "source, unedited"
KINDS = {
    "0": "random", "1": "change object", "2": "add object", "3": "delete object", "4": "change content",
    "5": "change pose", "6": "change colour", "7": "change material", "8": "change background", "9": "change style",
}  # fmt: skip
# scales are those of the paper's tables
COLUMNS = (
    Column("", "{row}"),
    Column("edits", "{edits}"),
    Column("PSNR outside, dB", lambda row, _: shown(row.get("psnr"))),
    Column("MSE outside x 10^4", lambda row, _: shown(row.get("mse"), 1e4)),
    Column("SSIM outside x 100", lambda row, _: shown(row.get("ssim"), 100)),
    Column("CLIP whole", lambda row, _: shown(row.get("clip"))),
    Column("CLIP edited part", lambda row, _: shown(row.get("clip_edited"))),
)


@dataclass(frozen=True)
class PieConfig:
    """Score edited pictures on PIE-Bench (arXiv 2310.01506): how much they keep of what lies outside the mask (PSNR,
    MSE, SSIM), and with --clip how well they show what was asked for (100 x cosine), as the benchmark's code does. Its
    LPIPS and the structure distance of DINO are left out. Each figure has a 95 % interval over pictures.
    """

    data: Path
    """Folder of PIE-Bench, with mapping_file.json and annotation_images."""
    images: Path
    """Edited pictures, by the paths that they have in annotation_images; any ending."""
    clip: Path | None = None
    """Local folder of a CLIP model (safetensors); the benchmark's is openai/clip-vit-large-patch14."""
    types: tuple[str, ...] = ()
    """Editing types, 0 to 9; by default all."""
    out: Path | None = None
    """Where to write the figures as JSON; by default pie-bench.json beside --images."""
    bootstrap: int = 200
    """How often pictures are drawn again for the intervals."""
    seed: int = 0
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"

    def check(self) -> "PieConfig":
        """Raises `UserError` for impossible options."""
        if self.bootstrap < FEWEST_DRAWS:
            raise UserError(f"--bootstrap is {self.bootstrap}: an interval needs at least {FEWEST_DRAWS} draws")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give 0 or more")
        return self


def score(config: PieConfig) -> int:
    """Score, print and write; returns the exit code.

    Raises:
        UserError: a benchmark or a CLIP model that is none, edited pictures that are missing or of another size.
    """
    from semantica.benchmarks.quality.published.clip import Clip
    from semantica.device import pick_device

    config.check()
    edits = read_edits(config.data, config.types)
    made = located(edits, config.images)
    clip = None if config.clip is None else Clip(config.clip, pick_device(config.device))
    values: dict[str, list[dict[str, float]]] = {EDITED: [], SOURCE: []}
    with phase(f"pie-bench: {len(edits)} edits", len(edits)) as bar:
        for edit, path in zip(edits, made, strict=True):
            source, picture = pair(config.data / PICTURES / edit.path, path)
            mask = edit.region(*source.shape[:2])
            for name, one in ((EDITED, picture), (SOURCE, source)):
                values[name].append(figures(source, one, mask, edit, clip))
            bar.update()
    rows = {name: gathered(found, config) for name, found in values.items()}
    by_kind = {
        kind: gathered([value for edit, value in zip(edits, values[EDITED]) if edit.kind == kind], config)
        for kind in sorted({edit.kind for edit in edits})
    }
    lines = [{"row": name, **row} for name, row in rows.items()]
    lines += [{"row": f"{kind} {KINDS.get(kind, '')}".strip(), **row} for kind, row in by_kind.items()]
    show(heads(COLUMNS), cells(COLUMNS, lines))
    same = rows[EDITED]["identical"]
    if same:
        print(f"{same} of {len(edits)} edited pictures are the same as their source outside the mask: no PSNR")
    settings = json.loads(json.dumps(asdict(config), default=str))
    result = {"config": settings, "clip": clip and clip.identity, "rows": rows, "types": by_kind}
    store(config.out or config.images.absolute().parent / "pie-bench.json", result)
    return 0


def located(edits: list[Edit], images: Path) -> list[Path]:
    """Where the edited picture of each edit is. Raises `UserError` where any is missing."""
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder: give that of the edited pictures")
    root = images / PICTURES if (images / PICTURES).is_dir() else images
    found = {edit.path: picture_at((root / edit.path).with_suffix("")) for edit in edits}
    missing = [path for path, place in found.items() if place is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(edits)} edited pictures are not in {root}, the first is {missing[0]}: make them, "
            "or choose --types"
        )
    return [found[edit.path] for edit in edits]


def pair(source: Path, edited: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures uint8 `[H, W, 3]`. Raises `UserError` where they differ in size or are too small."""
    from semantica.images import load_pixels

    a, b = load_pixels(source), load_pixels(edited)
    if a.shape != b.shape:
        sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (b, a)]
        raise UserError(f"{edited} is {sizes[0]}, its source in {MAPPING} {sizes[1]}: resize what was edited")
    if min(a.shape[:2]) < WINDOW:
        raise UserError(f"{source} has sides of {a.shape[1]} x {a.shape[0]}: SSIM needs at least {WINDOW} pixels")
    return a, b


def figures(source: np.ndarray, made: np.ndarray, mask: np.ndarray, edit: Edit, clip) -> dict[str, float]:
    """Of one picture; nan where the mask leaves nothing outside, or has no part of its own."""
    a, b = outside(source, mask), outside(made, mask)
    nothing = float("nan")
    error = nothing if mask.all() else mse(a, b)
    found = {"mse": error, "psnr": psnr(error), "ssim": nothing if mask.all() else ssim(a, b)}
    if clip is not None:
        from PIL import Image

        # 8 bits, as there: the picture, and its edited part on black
        parts = [Image.fromarray(made), Image.fromarray(made * mask[..., None])]
        whole, part = clip.of(parts) @ clip.texts([edit.target])[0]
        found |= {"clip": 100 * max(float(whole), 0.0), "clip_edited": 100 * max(float(part), 0.0)}
    return found


def gathered(found: list[dict[str, float]], config: PieConfig) -> dict:
    """Means of some pictures' figures, how many there are, and how many of them kept every pixel."""
    values = {name: np.array([value[name] for value in found]) for name in found[0]}
    counts = {"edits": len(found), "identical": int((values["mse"] == 0).sum())}
    return counts | summed(values, np.arange(len(found)), config.bootstrap, config.seed)
