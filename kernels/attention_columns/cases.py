"""Problems of `attention_columns`: what tests prove and benchmarks time."""

from dataclasses import dataclass

import torch

from semantica.kernels.attention_moments.cases import MapCase


def products(direction: str, q_shape: tuple[int, ...], tokens: int) -> int:
    """Operations of the matrix products: logits; the logits again, dq, dk."""
    batch, queries, heads, dim = q_shape
    return {"forward": 1, "backward": 3, "both": 4}[direction] * 2 * batch * heads * queries * tokens * dim


FLOP_FORMULAS = {
    "attention_columns": lambda q, k, lse, tokens, *rest, **options: products("forward", q, tokens[-1]),
    "attention_columns_backward": lambda dc, q, k, lse, tokens, *rest, **options: products("backward", q, tokens[-1]),
}


@dataclass(frozen=True)
class AttentionColumnsCase(MapCase):
    """`tokens`: one tuple for all samples, or one for each."""

    tokens: tuple = (0,)

    @property
    def description(self) -> str:
        return f"{super().description} T{self.shown}"

    @property
    def shown(self) -> int:
        first = self.tokens[0]
        return len(self.tokens if isinstance(first, int) else first)

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
        """Keyword arguments of `attention_columns`."""
        given, rest = self.map_inputs(dtype, device, torch.Generator().manual_seed(seed))
        return {**given, "tokens": torch.tensor(self.tokens, device=device), **rest}

    def flops(self, direction: str) -> int:
        return products(direction, (self.batch, self.queries, self.heads, self.dim), self.shown)


CASES = {
    "tiny": AttentionColumnsCase(2, 33, 3, 64, 20, tokens=(3, 19)),
    "words": AttentionColumnsCase(1, 70, 2, 40, 77, tokens=(5, 2, 5, 76)),
    "absent": AttentionColumnsCase(3, 20, 2, 64, 19, (19, 7, 0), tokens=((1, 18), (6, 7), (0, -1))),
    "views": AttentionColumnsCase(2, 25, 2, 104, 31, (31, 20), q_norm=True, strided=True, tokens=(0, 30, 7)),
    "wide head": AttentionColumnsCase(1, 40, 1, 160, 50, tokens=tuple(range(0, 50, 2))),
    "region": AttentionColumnsCase(2, 24, 2, 16, 140, tokens=tuple(range(30, 100))),
    "large logits": AttentionColumnsCase(1, 16, 2, 64, 40, spread=30.0, tokens=tuple(range(40))),
}


def timed(device: str, quick: bool) -> list[AttentionColumnsCase]:
    """On a GPU two words of Stable Diffusion 1's and XL's largest maps, and a region of a picture's tokens."""
    if quick:
        return [AttentionColumnsCase(2, 64, 3, 64, 77, tokens=(4, 9))]
    if device == "cpu":
        return [AttentionColumnsCase(2, 1024, 8, 40, 77, tokens=(4, 9))]
    return [
        AttentionColumnsCase(2, 4096, 8, 40, 77, tokens=(4, 9)),
        AttentionColumnsCase(2, 4096, 10, 64, 77, tokens=(4, 9)),
        AttentionColumnsCase(8, 1024, 16, 64, 256, q_norm=True, tokens=tuple(range(64))),
    ]
