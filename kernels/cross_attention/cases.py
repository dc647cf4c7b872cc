"""Problems of `cross_attention`: what tests prove and benchmarks time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from semantica.kernels.registry import Case, normal

# matrix products of 2 * N * M * D operations: scores and output; the scores again, dP, dQ, dK, dV
MATRIX_PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


def products(direction: str, q_shape: tuple[int, ...], keys: int) -> int:
    """Operations of the matrix products for `q_shape [B, N, H, D]`."""
    batch, queries, heads, dim = q_shape
    return MATRIX_PRODUCTS[direction] * 2 * batch * heads * queries * keys * dim


FLOP_FORMULAS = {
    "cross_attention": lambda q, k, *rest, **options: products("forward", q, k[1]),
    "cross_attention_backward": lambda do, q, k, *rest, **options: products("backward", q, k[1]),
}


@dataclass(frozen=True)
class CrossAttentionCase(Case):
    """`strided` takes q, k, v as views of one wider tensor; `spread` scales the logits."""

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

    @property
    def layout(self) -> str:
        return "strided" if self.strided else "contiguous"

    @property
    def description(self) -> str:
        keys = "+".join(map(str, self.sizes))
        parts = [f"B{self.batch} N{self.queries} M{keys} H{self.heads} D{self.dim}", "gates" * self.gates]
        return " ".join(filter(None, [*parts, "lengths" * (self.lengths is not None)]))

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
        """Keyword arguments of `cross_attention`."""
        g = torch.Generator().manual_seed(seed)

        def new(*shape: int) -> Tensor:
            return normal(shape, g, dtype, device)

        keys = sum(self.sizes)
        if self.strided:
            q = new(self.batch, self.queries, 2, self.heads, self.dim)[:, :, 0]
            k, v = new(self.batch, keys, 2, self.heads, self.dim).unbind(2)
        else:
            q = new(self.batch, self.queries, self.heads, self.dim)
            k, v = (new(self.batch, keys, self.heads, self.dim) for _ in range(2))
        return {
            "q": q * self.spread,
            "k": k,
            "v": v,
            "sizes": self.sizes,
            "lengths": None if self.lengths is None else torch.tensor(self.lengths, device=device),
            "gates": new(self.batch, len(self.sizes), self.heads) if self.gates else None,
            "q_weight": 1 + new(self.dim) / 4 if self.q_norm else None,
        }

    def flops(self, direction: str) -> int:
        return products(direction, (self.batch, self.queries, self.heads, self.dim), sum(self.sizes))


# a picture, CLIP's text and T5's, with guidance in one batch: the reference is three attentions and their sum
THREE = (257, 77, 512)
CASES = {
    "tiny": CrossAttentionCase(2, 64, 3, 64, (64,)),
    "257 tokens": CrossAttentionCase(1, 64, 2, 32, (257,)),
    "one token": CrossAttentionCase(2, 16, 2, 48, (1,)),
    "no norm": CrossAttentionCase(2, 33, 2, 80, (19,), q_norm=False),
    "two streams": CrossAttentionCase(3, 20, 2, 96, (7, 12), gates=True),
    "absent stream": CrossAttentionCase(3, 20, 2, 64, (7, 12), ((7, 0), (3, 12), (0, 0)), gates=True),
    "views": CrossAttentionCase(2, 25, 2, 128, (31,), strided=True),
    "narrow rest": CrossAttentionCase(2, 33, 3, 40, (77, 4), ((77, 4), (20, 0)), gates=True),
    "wide head": CrossAttentionCase(1, 18, 2, 160, (77,), q_norm=False),
    "heads of 8 more": CrossAttentionCase(1, 17, 3, 104, (40,), strided=True),
    "large logits": CrossAttentionCase(2, 16, 2, 64, (40,), q_norm=False, spread=100.0),
    "several tiles": CrossAttentionCase(1, 70, 1, 48, (130, 77), ((129, 20),), gates=True, strided=True),
}


def timed(device: str, quick: bool) -> list[CrossAttentionCase]:
    """On a GPU the shapes of published figures, and a batch of 8: four pictures with guidance."""
    if quick:
        return [CrossAttentionCase(2, 64, 3, 64, (64,)), CrossAttentionCase(1, 64, 3, 64, (48, 19), gates=True)]
    if device == "cpu":
        return [
            CrossAttentionCase(2, 256, 8, 64, (257,)),
            CrossAttentionCase(2, 256, 8, 64, (256, 77), gates=True),
            CrossAttentionCase(2, 256, 8, 64, (256, 77), ((256, 40), (256, 0)), gates=True),
            CrossAttentionCase(2, 256, 8, 64, THREE),
        ]
    return [
        CrossAttentionCase(16, 256, 32, 128, (256,), q_norm=False),
        CrossAttentionCase(4, 576, 16, 64, (576,), q_norm=False),
        CrossAttentionCase(1, 1344, 16, 64, (257,), q_norm=False),
        CrossAttentionCase(8, 256, 16, 64, (257,)),
        CrossAttentionCase(8, 256, 16, 64, (256, 77), gates=True),
        CrossAttentionCase(8, 256, 16, 64, (256, 77), ((256, 40), (256, 0)) * 4, gates=True),
        CrossAttentionCase(8, 1024, 16, 64, (256,)),
        CrossAttentionCase(8, 256, 16, 64, THREE),
    ]
