"""What conditions the denoiser, as values: streams of encoder tokens, and the keys and values made from them.

The fields are numpy arrays or torch tensors, all of one kind; this module imports numpy only, so that an exported model
can be sampled where torch is not installed. `semantica.model.uvit` makes both classes known to torch's pytrees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from semantica.errors import UserError

Array = Any  # numpy.ndarray or torch.Tensor


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Join numpy arrays, or torch tensors, along an axis."""
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays, axis)
    import torch

    return torch.cat(list(arrays), axis)


def repeat_each(array: Array, times: int, axis: int = 0) -> Array:
    """Each entry along an axis `times` times in a row."""
    return np.repeat(array, times, axis) if isinstance(array, np.ndarray) else array.repeat_interleave(times, axis)


def full(lengths: Array, sizes: Sequence[int]) -> Array:
    """Like lengths `[B, S]`, of streams that are there whole."""
    made = lengths * 0
    for stream, size in enumerate(sizes):
        made[:, stream] += size
    return made


@dataclass(frozen=True)
class Stream:
    """The output of one encoder.

    tokens: `[B, M, C]`. Several images of the same encoder are one stream of more tokens.
    pooled: `[B, C]`, one vector per sample, or None where no global conditioning is used.
    lengths: `[B]` integers, the valid tokens per sample, or None for all of them; 0 = absent.
    """

    tokens: Array
    pooled: Array | None = None
    lengths: Array | None = None

    def map(self, function: Callable[[Array], Array]) -> "Stream":
        """Apply a function to every array that there is, as for moving, casting or indexing along the batch."""
        return Stream(*(None if a is None else function(a) for a in (self.tokens, self.pooled, self.lengths)))


@dataclass(frozen=True)
class Condition:
    """Everything the denoiser needs of its condition, computed once per image by `UViT.condition`.

    keys, values: one `[B, M, H, D]` per transformer block, the streams one after the other along M; empty without
        token conditioning.
    emb: `[B, E]`, added to the noise-level embedding; zeros without global conditioning.
    lengths: `[B, S]`, valid tokens per sample and stream, or None for all.
    sizes: the static size of each stream along M.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    emb: Array
    lengths: Array | None
    sizes: tuple[int, ...]

    def map(self, function: Callable[[Array], Array]) -> "Condition":
        """Apply a function to every array, as for moving, casting or indexing along the batch."""
        lengths = None if self.lengths is None else function(self.lengths)
        keys, values = tuple(map(function, self.keys)), tuple(map(function, self.values))
        return Condition(keys, values, function(self.emb), lengths, self.sizes)

    def repeat(self, times: int) -> "Condition":
        """Each sample `times` times in a row: `[B, ...]` becomes `[B * times, ...]`."""
        return self if times == 1 else self.map(lambda array: repeat_each(array, times))

    def fill(self, sizes: tuple[int, ...]) -> "Condition":
        """A null condition, one token per stream, at other stream sizes: copies of one token have the same softmax.

        Raises:
            UserError: a stream holds neither one token nor as many as asked for.
        """
        if self.sizes == sizes:
            return self
        if len(self.sizes) != len(sizes) or any(a not in (1, b) for a, b in zip(self.sizes, sizes)):
            raise UserError(f"condition with stream sizes {self.sizes} cannot be filled up to {sizes}: use a null one")
        starts = np.cumsum((0, *self.sizes))

        def filled(array: Array) -> Array:
            parts = [array[:, a:b] for a, b in zip(starts, starts[1:])]
            return concatenate([repeat_each(p, size // p.shape[1], 1) for p, size in zip(parts, sizes)], 1)

        keys, values = tuple(map(filled, self.keys)), tuple(map(filled, self.values))
        return Condition(keys, values, self.emb, None, sizes)

    def join(self, null: "Condition") -> "Condition":
        """Both branches of guidance as one batch `[2 B, ...]`: this condition first, then the other one, filled up
        where it is a null one.

        Raises:
            UserError: as `fill`.
        """
        null, sizes, emb = null.fill(self.sizes), self.sizes, self.emb
        if null.emb.ndim > emb.ndim:
            # time-step guidance of some blocks has an embedding for each of them
            emb = repeat_each(emb[:, None], null.emb.shape[1], 1)
        keys, values, emb = (
            tuple(concatenate(pair) for pair in zip(self.keys, null.keys)),
            tuple(concatenate(pair) for pair in zip(self.values, null.values)),
            concatenate((emb, null.emb)),
        )
        if self.lengths is None and null.lengths is None:
            return Condition(keys, values, emb, None, sizes)
        # a null token stands at every place
        own = full(null.lengths, sizes) if self.lengths is None else self.lengths
        other = full(self.lengths, sizes) if null.lengths is None else null.lengths
        return Condition(keys, values, emb, concatenate((own, other)), sizes)
