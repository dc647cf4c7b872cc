"""What `semantica evaluate` can be asked for."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from semantica.errors import UserError

# options of how a model samples
SAMPLING = ("n", "steps", "guidance", "seed")
# side at which pictures that were made elsewhere are judged
SIZE = 64
FEWEST_DRAWS = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """Figures for a run (--model) or for a folder of pictures made elsewhere (--images), on held-out data.

    On-topic rate: share of samples whose nearest picture in --data, the condition itself left out, is of the
    condition's group. Diversity: mean distance between variations of one condition, as a share of the mean distance
    between pictures of one group. Then Frechet and kernel distance, precision, recall, density, coverage, Vendi score,
    similarity to the condition and copies, each with its interval over conditions. Baselines: copying the condition,
    ignoring it, other real pictures (ceiling), noise. See docs/evaluation.md.
    """

    data: Path
    """Held-out folder of label folders."""
    model: Path | None = None
    """Run folder."""
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
    """Side in pixels at which --images and --data are judged (default 64); a run's is its own."""
    bootstrap: int = 200
    """How often conditions are drawn again for the intervals."""
    steps: int = 20
    guidance: float = 1.5
    seed: int = 0
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"

    def check(self) -> "EvaluateConfig":
        """Raises `UserError` for impossible options."""
        if (self.model is None) == (self.images is None):
            raise UserError("give either --model or --images")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in (*SAMPLING, "keep") if self.images else ():
            if getattr(self, name) != defaults[name]:
                raise UserError(f"--{name} says nothing to pictures that are there: leave it out with --images")
        if self.model and self.size is not None:
            raise UserError("--size is for --images: a run's pictures have a size of their own")
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
