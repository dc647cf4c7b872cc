"""What `semantica evaluate` can be asked for."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from semantica.errors import UserError

# options of how a model samples
SAMPLING = ("n", "steps", "guidance", "seed", "ip_adapter")
# side at which pictures that were made elsewhere are judged
SIZE = 64
FEWEST_DRAWS = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """Figures for a model (--model) or for a folder of pictures made elsewhere (--images), on held-out data.

    On-topic rate: share of samples whose nearest picture in --data, the condition itself left out, is of the
    condition's group. Diversity: mean distance between variations of one condition, as a share of the mean distance
    between pictures of one group. Then Frechet and kernel distance, precision, recall, density, coverage, Vendi score,
    similarity to the condition and copies, each with its interval over conditions. Baselines: copying the condition,
    ignoring it, other real pictures (ceiling), noise. See docs/evaluation.md.
    """

    data: Path
    """Held-out pictures: a folder of label folders, or ImageNet, SUN397 or LSUN as they are distributed, see
    docs/evaluation.md."""
    model: Path | None = None
    """Run folder, or local folder of a diffusers pipeline that reads pictures: Stable Diffusion image variations,
    Versatile Diffusion, or with --ip-adapter Stable Diffusion; safetensors only."""
    images: Path | None = None
    """Folder of made pictures: with conditions.csv (file, condition, class), or one folder for each label of --data."""
    out: Path | None = None
    """Where to write the figures as JSON; by default evaluation.json in --model or beside --images."""
    attributes: Path | None = None
    """JSON {group: {attribute: value}}: also report how often the nearest picture shares each attribute."""
    features: Annotated[str, tyro.conf.arg(metavar="NAME")] = "colour-and-shape"
    """Judge: "colour-and-shape"; an encoder by hub name, folder or run folder; FID's Inception as .safetensors."""
    cache: Path | None = None
    """Folder to keep features in, by judge and picture: found again by later calls, or after an interruption."""
    keep: Path | None = None
    """New folder for what --model makes, with conditions.csv: to be judged again by --images."""
    conditions: int = 64
    """Condition pictures, spread over the groups."""
    shots: int | None = None
    """Condition pictures of each group, instead of --conditions: few-shot figures."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """Variations of each condition."""
    size: int | None = None
    """Side in pixels at which all pictures are judged; by default that of --model's own, and 64 for --images."""
    bootstrap: int = 200
    """How often conditions are drawn again for the intervals."""
    steps: int = 20
    guidance: float | None = None
    """By default 1.5 for runs, and 7.5 (SDXL: 5) for diffusers pipelines."""
    seed: int = 0
    ip_adapter: Path | None = None
    """IP-Adapter (.safetensors) for a diffusers pipeline of text; texts are empty then."""
    ip_scale: float = 1.0
    """How much the IP-Adapter's picture weighs."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"

    def check(self) -> "EvaluateConfig":
        """Raises `UserError` for impossible options."""
        if (self.model is None) == (self.images is None):
            raise UserError("give either --model or --images")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in (*SAMPLING, "keep") if self.images else ():
            if getattr(self, name) != defaults[name]:
                option = name.replace("_", "-")
                raise UserError(f"--{option} says nothing to pictures that are there: leave it out with --images")
        for name in ("guidance", "ip_scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number")
        if self.ip_adapter is None and self.ip_scale != 1:
            raise UserError("--ip-scale is nothing without --ip-adapter: give that too")
        if self.shots is not None and self.conditions != defaults["conditions"]:
            raise UserError("give either --shots or --conditions")
        for name in ("conditions", "steps", "shots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        if self.size is not None and self.size < 2:
            raise UserError(f"--size is {self.size}: give at least 2 pixels")
        if self.bootstrap < FEWEST_DRAWS:
            raise UserError(f"--bootstrap is {self.bootstrap}: an interval needs at least {FEWEST_DRAWS} draws")
        if self.n < 2:
            raise UserError(f"--n is {self.n}: diversity needs at least 2 variations")
        return self
