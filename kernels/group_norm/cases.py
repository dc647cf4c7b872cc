"""Problems of `group_norm`: what tests prove and benchmarks time."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from semantica.kernels.registry import Case, normal

# nominal operations per element: two statistics (4), normalise (2), affine (2), FiLM (2), SiLU (4); twice that back
OPERATIONS = {"forward": 14, "backward": 28, "both": 42}
# tensors of x's size that a second pass reads: x; x and dy
REREAD = {"forward": 1, "backward": 2, "both": 3}


@dataclass(frozen=True)
class GroupNormCase(Case):
    """`x` of a shape and layout, shifted by `mean` to strain the statistics."""

    shape: tuple[int, ...]
    groups: int
    film: bool = True
    activation: str = "silu"
    channels_last: bool = False
    mean: float = 0.0
    addend: bool = False

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def description(self) -> str:
        parts = ["x".join(map(str, self.shape)), f"G{self.groups}", "film" * self.film, "addend" * self.addend]
        return " ".join(filter(None, [*parts, "silu" * (self.activation == "silu")]))

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
        """Keyword arguments of `group_norm`; weights and FiLM around their usual sizes."""
        g = torch.Generator().manual_seed(seed)
        batch, channels = self.shape[:2]
        x = normal(self.shape, g, dtype, device, self.mean)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
        film = {
            name: normal((batch, channels), g, dtype, device) / 2 if self.film else None for name in ("scale", "shift")
        }
        weight, bias = 1 + normal((channels,), g, dtype, device) / 4, normal((channels,), g, dtype, device) / 4
        affine = {"weight": weight, "bias": bias}
        addend = {"addend": normal((batch, channels), g, dtype, device)} if self.addend else {}
        return {"x": x, "groups": self.groups, **affine, **film, "activation": self.activation, **addend}

    def flops(self, direction: str) -> int:
        return OPERATIONS[direction] * math.prod(self.shape)

    def reread_bytes(self, dtype: torch.dtype, direction: str, cache: int) -> int:
        x = math.prod(self.shape) * dtype.itemsize
        return REREAD[direction] * x if x > cache else 0


CASES = {
    "tiny": GroupNormCase((2, 64, 16, 16), 32, channels_last=True),
    "plain": GroupNormCase((2, 64, 16, 16), 32, film=False, activation="none"),
    "odd channels": GroupNormCase((2, 30, 7, 5), 3, channels_last=True),
    "one group": GroupNormCase((1, 48, 9, 9), 1),
    "one channel each": GroupNormCase((2, 12, 8, 8), 12, channels_last=True),
    "one pixel": GroupNormCase((3, 32, 1, 1), 4),
    "sequence": GroupNormCase((2, 32, 37), 8),
    "volume": GroupNormCase((1, 16, 3, 4, 5), 4, channels_last=True),
    "large mean": GroupNormCase((2, 64, 16, 16), 8, channels_last=True, mean=300.0),
    "addend": GroupNormCase((2, 64, 16, 16), 32, film=False, channels_last=True, addend=True),
    "addend and film": GroupNormCase((3, 30, 7, 5), 3, addend=True),
}


def timed(device: str, quick: bool) -> list[GroupNormCase]:
    """On a GPU the shapes of published figures, elsewhere those of small machines; each in both layouts."""
    if quick:
        cases = [GroupNormCase((2, 64, 32, 32), 32)]
    elif device == "cpu":
        shapes = ((8, 128, 64, 64), (2, 320, 64, 64), (1, 128, 256, 256), (16, 512, 16, 16))
        cases = [GroupNormCase(shape, 32) for shape in shapes]
    else:
        shapes = ((1, 320, 64, 64), (8, 320, 64, 64), (8, 640, 32, 32), (1, 128, 20, 256, 256), (13, 18, 512, 512))
        cases = [GroupNormCase(s, 6 if s[1] == 18 else 32, film=s[0] == 8) for s in shapes]
    return [dataclasses.replace(case, channels_last=last) for case in cases for last in (False, True)]
