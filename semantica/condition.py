"""What conditions the denoiser, as values: streams of encoder tokens, and the keys and values made from them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """The output of one encoder.

    tokens: `[B, M, C]`. Several images of the same encoder are one stream of more tokens.
    pooled: `[B, C]`, one vector per sample, or None where no global conditioning is used.
    lengths: `[B]` integers, the valid tokens per sample, or None for all of them; 0 = absent.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Condition:
    """Everything the denoiser needs of its condition, computed once per image by `UViT.condition`.

    keys, values: one `[B, M, H, D]` per transformer block, the streams one after the other along M; empty without
        token conditioning.
    emb: `[B, E]`, added to the noise-level embedding; zeros without global conditioning.
    lengths: `[B, S]`, valid tokens per sample and stream, or None for all.
    sizes: the static size of each stream along M.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    emb: Tensor
    lengths: Tensor | None
    sizes: tuple[int, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """Apply a function to every tensor, as for moving, casting or indexing along the batch."""
        lengths = None if self.lengths is None else function(self.lengths)
        keys, values = tuple(map(function, self.keys)), tuple(map(function, self.values))
        return Condition(keys, values, function(self.emb), lengths, self.sizes)

    def repeat(self, times: int) -> "Condition":
        """Each sample `times` times in a row: `[B, ...]` becomes `[B * times, ...]`."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, 0))


# known to torch's pytrees, so that conditions pass through export, compile and distributed wrappers
torch.export.register_dataclass(Stream)
torch.export.register_dataclass(Condition)
