"""The case table of the operators: what tests prove and benchmarks time."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupNormCase:
    """One `group_norm` problem: `x` of a shape and layout, shifted by `mean` to strain the statistics."""

    shape: tuple[int, ...]
    groups: int
    film: bool = True
    activation: str = "silu"
    channels_last: bool = False
    mean: float = 0.0

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
        """Keyword arguments of `group_norm`; weights and FiLM around their usual sizes."""
        g = torch.Generator().manual_seed(seed)
        batch, channels = self.shape[:2]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

        x = (torch.randn(self.shape, generator=g, dtype=torch.float64) + self.mean).to(device, dtype)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
        film = {name: normal(batch, channels) / 2 if self.film else None for name in ("scale", "shift")}
        affine = {"weight": 1 + normal(channels) / 4, "bias": normal(channels) / 4}
        return {"x": x, "groups": self.groups, **affine, **film, "activation": self.activation}


@dataclass(frozen=True)
class CrossAttentionCase:
    """One `cross_attention` problem; `spread` scales the logits."""

    batch: int
    queries: int
    heads: int
    dim: int
    sizes: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...] | None = None
    gates: bool = False
    q_norm: bool = True
    strided: bool = False
    spread: float = 1.0

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
        """Keyword arguments of `cross_attention`. `strided` takes q, k, v as views of one wider tensor."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

        keys = sum(self.sizes)
        if self.strided:
            q = normal(self.batch, self.queries, 2, self.heads, self.dim)[:, :, 0]
            k, v = normal(self.batch, keys, 2, self.heads, self.dim).unbind(2)
        else:
            q = normal(self.batch, self.queries, self.heads, self.dim)
            k, v = (normal(self.batch, keys, self.heads, self.dim) for _ in range(2))
        return {
            "q": q * self.spread,
            "k": k,
            "v": v,
            "sizes": self.sizes,
            "lengths": None if self.lengths is None else torch.tensor(self.lengths, device=device),
            "gates": normal(self.batch, len(self.sizes), self.heads) if self.gates else None,
            "q_weight": 1 + normal(self.dim) / 4 if self.q_norm else None,
        }


GROUP_NORM = {
    "tiny": GroupNormCase((2, 64, 16, 16), 32, channels_last=True),
    "plain": GroupNormCase((2, 64, 16, 16), 32, film=False, activation="none"),
    "odd channels": GroupNormCase((2, 30, 7, 5), 3, channels_last=True),
    "one group": GroupNormCase((1, 48, 9, 9), 1),
    "one channel each": GroupNormCase((2, 12, 8, 8), 12, channels_last=True),
    "one pixel": GroupNormCase((3, 32, 1, 1), 4),
    "sequence": GroupNormCase((2, 32, 37), 8),
    "volume": GroupNormCase((1, 16, 3, 4, 5), 4, channels_last=True),
    "large mean": GroupNormCase((2, 64, 16, 16), 8, channels_last=True, mean=300.0),
}
CROSS_ATTENTION = {
    "tiny": CrossAttentionCase(2, 64, 3, 64, (64,)),
    "257 tokens": CrossAttentionCase(1, 64, 2, 32, (257,)),
    "one token": CrossAttentionCase(2, 16, 2, 48, (1,)),
    "no norm": CrossAttentionCase(2, 33, 2, 80, (19,), q_norm=False),
    "two streams": CrossAttentionCase(3, 20, 2, 96, (7, 12), gates=True),
    "absent stream": CrossAttentionCase(3, 20, 2, 64, (7, 12), ((7, 0), (3, 12), (0, 0)), gates=True),
    "views": CrossAttentionCase(2, 25, 2, 128, (31,), strided=True),
    "large logits": CrossAttentionCase(2, 16, 2, 64, (40,), q_norm=False, spread=100.0),
    "several tiles": CrossAttentionCase(1, 70, 1, 48, (130, 77), ((129, 20),), gates=True, strided=True),
}
