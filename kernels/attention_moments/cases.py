"""Problems of `attention_moments`: what tests prove and benchmarks time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from semantica.kernels.attention_moments.op import chunks, heads_first, normalised, valid
from semantica.kernels.registry import Case, normal


def products(direction: str, q_shape: tuple[int, ...], keys: int, features: int) -> int:
    """Operations of the matrix products: logits and moments; the logits again, dP, dq, dk, dF."""
    batch, queries, heads, dim = q_shape
    forward, backward = dim + features, 3 * dim + 2 * features
    widths = {"forward": forward, "backward": backward, "both": forward + backward}
    return 2 * batch * heads * queries * keys * widths[direction]


FLOP_FORMULAS = {
    "attention_moments": lambda q, k, lse, f, *rest, **options: products("forward", q, k[1], f[-1]),
    "attention_moments_backward": lambda dm, q, k, lse, f, *rest, **options: products("backward", q, k[1], f[-1]),
}


def log_sum_exp(q: Tensor, k: Tensor, lengths: Tensor | None, weight: Tensor | None) -> Tensor:
    """`[B, H, N]`, a chunk of queries at a time."""
    there, (q, k) = valid(lengths, k.shape[1]), heads_first(normalised(q, weight), k)
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, heads, queries)
    for part in chunks(queries, batch * heads * k.shape[2]):
        logits = q[:, :, part] @ k.transpose(2, 3)
        out[..., part] = (logits if there is None else logits.masked_fill(~there, -torch.inf)).logsumexp(-1)
    return out


@dataclass(frozen=True)
class MapCase(Case):
    """What the readers of an attention map share. `strided` takes q and k as views, `spread` scales the logits."""

    batch: int
    queries: int
    heads: int
    dim: int
    keys: int
    lengths: tuple[int, ...] | None = None
    q_norm: bool = False
    strided: bool = False
    spread: float = 1.0

    @property
    def layout(self) -> str:
        return "strided" if self.strided else "contiguous"

    @property
    def description(self) -> str:
        text = f"B{self.batch} N{self.queries} M{self.keys} H{self.heads} D{self.dim}"
        return text + " lengths" * (self.lengths is not None)

    def map_inputs(self, dtype: torch.dtype, device: str, g: torch.Generator) -> tuple[dict, dict]:
        """q, k and lse; and lengths and the weight of the norm."""

        def new(*shape: int) -> Tensor:
            return normal(shape, g, dtype, device)

        apart = (2,) if self.strided else ()
        q = new(self.batch, self.queries, *apart, self.heads, self.dim)
        k = new(self.batch, self.keys, *apart, self.heads, self.dim)
        q, k = (a[:, :, 0] if self.strided else a for a in (q, k))
        q = q * self.spread
        lengths = None if self.lengths is None else torch.tensor(self.lengths, device=device)
        weight = 1 + new(self.dim) / 4 if self.q_norm else None
        return {"q": q, "k": k, "lse": log_sum_exp(q, k, lengths, weight)}, {"lengths": lengths, "q_weight": weight}


@dataclass(frozen=True)
class AttentionMomentsCase(MapCase):
    """`own`: each sample has features of its own; `wide`: features in fp32 whatever q's type."""

    features: int = 6
    own: bool = False
    wide: bool = False

    @property
    def description(self) -> str:
        return f"{super().description} F{self.features}" + " own" * self.own + " fp32" * self.wide

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
        """Keyword arguments of `attention_moments`."""
        g = torch.Generator().manual_seed(seed)
        given, rest = self.map_inputs(dtype, device, g)
        shape = (self.batch,) * self.own + (self.queries, self.features)
        features = normal(shape, g, torch.promote_types(dtype, torch.float32) if self.wide else dtype, device)
        return {**given, "features": features, **rest}

    def flops(self, direction: str) -> int:
        return products(direction, (self.batch, self.queries, self.heads, self.dim), self.keys, self.features)


CASES = {
    "tiny": AttentionMomentsCase(2, 33, 3, 32, 20),
    "words": AttentionMomentsCase(1, 70, 2, 40, 77, wide=True),
    "absent": AttentionMomentsCase(3, 20, 2, 64, 19, (19, 7, 0), own=True),
    "one token": AttentionMomentsCase(2, 16, 1, 48, 1, features=1, q_norm=True),
    "views": AttentionMomentsCase(2, 25, 2, 104, 31, (31, 20), q_norm=True, strided=True),
    "wide head": AttentionMomentsCase(1, 40, 1, 160, 50, features=17, own=True),
    "activations": AttentionMomentsCase(2, 24, 2, 16, 140, features=80, own=True),
    "large logits": AttentionMomentsCase(1, 16, 2, 64, 40, spread=30.0, wide=True),
}


def timed(device: str, quick: bool) -> list[AttentionMomentsCase]:
    """On a GPU Stable Diffusion 1's and XL's largest maps, a U-ViT's, and appearance pooled from activations."""
    if quick:
        return [AttentionMomentsCase(2, 64, 3, 64, 77, wide=True)]
    if device == "cpu":
        return [AttentionMomentsCase(2, 256, 8, 64, 257), AttentionMomentsCase(2, 1024, 8, 40, 77, wide=True)]
    return [
        AttentionMomentsCase(2, 4096, 8, 40, 77, wide=True),
        AttentionMomentsCase(2, 4096, 10, 64, 77, wide=True),
        AttentionMomentsCase(8, 1024, 16, 64, 256, q_norm=True),
        AttentionMomentsCase(2, 4096, 8, 40, 77, features=320, own=True),
        AttentionMomentsCase(2, 4096, 8, 64, 2048, wide=True),
    ]
