"""Everything that `semantica train-segmenter` can be told; light, so that `--help` imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from semantica.errors import UserError
from semantica.segmentation.sizes import Sizes


@dataclass(frozen=True)
class TrainSegmenterConfig:
    """Train CAT-Seg (arXiv 2303.11797) on pictures with a class for each pixel: per-class binary cross-entropy, AdamW,
    a rate that falls as a cosine. The same command continues a run that was interrupted.
    """

    data: Path
    """Folder with `images/`, `masks/` (for each picture a PNG of its name whose 8-bit values are numbers of classes,
    255 for none) and `classes.json`, a list of their names."""
    clip: str
    """A CLIP: a folder with safetensors and its tokenizer, or a name on the hub, as "openai/clip-vit-base-patch16"."""
    out: Path
    """Folder of the run, which `semantica segment --model` reads."""
    steps: int = 80_000
    batch: int = 4
    rate: float = 2e-4
    """Learning rate of the aggregator."""
    clip_rate: float = 0.01
    """That of CLIP's weights, as a multiple of it."""
    decay: float = 1e-4
    """Weight decay of matrices and convolutions."""
    clip_norm: float = 0.01
    """Longest gradient of all weights together."""
    warmup: int = 10
    """Steps in which the rate rises."""
    tune: Literal["attention", "all", "none"] = "attention"
    """What of CLIP is trained along: the projections to queries and values of both towers, all of it, or nothing."""
    template: tuple[str, ...] = ("A photo of a {} in the scene",)
    """Texts with {} for a class, each a channel of the cost volume."""
    image_size: int | None = None
    """Side in pixels of the squares that are looked at; by default 24 of CLIP's patches, or CLIP's own if below 224."""
    crop: float = 1.0
    """Smallest square that is cut out of a picture, as a share of its shorter side."""
    flip: bool = True
    """Mirror every other picture."""
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    workers: int = 2
    """Processes that load pictures; 0 for none."""
    log_every: int = 50
    save_every: int = 1000
    """Steps between checkpoints, from which the run continues."""
    device: str = "auto"

    def check(self) -> "TrainSegmenterConfig":
        """Raises `UserError` for impossible numbers."""
        for name in ("steps", "batch", "rate", "clip_norm", "log_every", "save_every"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give more than 0")
        for name in ("clip_rate", "decay", "warmup", "seed", "workers"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 or more")
        if not 0 < self.crop <= 1:
            raise UserError(f"--crop is {self.crop}: give a share of the shorter side, above 0 and up to 1")
        return self
