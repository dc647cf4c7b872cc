"""Batches: bytes on the host, in memory that is made once; mirrored, normalised and given their noise on the device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from semantica.condition import Stream
from semantica.inputs import SINGLE, is_text
from semantica.train.data.noise import noise

# a name and what it has for each sample: shape and type
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
PICTURES = ("target", "condition")


def empty(layout: Layout, *leading: int) -> dict[str, Tensor]:
    """Memory for batches, `[*leading, ...]` of each name."""
    return {name: torch.empty(*leading, *shape, dtype=kind) for name, (shape, kind) in layout.items()}


def stack(items: list[dict[str, Any]], batch: dict[str, Tensor]) -> None:
    """Write items of `Pairs` into a batch of their layout. Arrays in mapped files are not copied before."""
    for name, tensor in batch.items():
        rows = tensor.numpy()
        for i, item in enumerate(items):
            if isinstance(item[name], tuple):
                for slot, array in zip(rows[i], item[name], strict=True):
                    slot[...] = array
            else:
                rows[i] = item[name]


def finish(batch: dict[str, Any], seed: int, device: torch.device | str) -> dict[str, Any]:
    """A stacked batch on a device, as the trainer takes it; the same bits on every device.

    Returns:
        `target` float32 `[B, 3, S, S]` in [-1, 1]; `condition` the same, `[B, 3, C, C]` or `[B, K, 3, C, C]`, or a
        `Stream` of stored tokens `[B, K M, C]`, with their pictures, if any, as `shown`; where texts are read too, or
        alone, `{"image": ..., "text": numbers, "text_2": ...}`; `noise` float32 `[B, 3, S, S]`, see
        `semantica.train.data.noise`; the rest as it was, but `flips`. `u` stays on the host, where noise levels are
        worked out in float64. Nothing shares memory with pictures of `batch`.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "u"}
    moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
    flips = moved.pop("flips")
    moved["target"] = planes(moved["target"], flips[:, 0])
    if "condition" in moved:
        several = moved["condition"].ndim == 5
        moved["condition"] = planes(moved["condition"], flips[:, 1:] if several else flips[:, 1])
    moved["noise"] = noise(seed, moved["index"], moved["target"].shape[1:])
    made = {**{name: value for name, value in batch.items() if name not in tensors}, **moved}
    if "tokens" in made:
        shown = {"shown": made.pop("condition")} if "condition" in made else {}
        made |= {**shown, "condition": Stream(made.pop("tokens").flatten(1, 2), made.pop("pooled"))}
    texts = {name: made.pop(name) for name in [*made] if is_text(name)}
    if texts:
        pictures = {SINGLE: made.pop("condition")} if "condition" in made else {}
        made["condition"] = pictures | texts
    return made


def planes(pixels: Tensor, flips: Tensor) -> Tensor:
    """uint8 `[..., S, S, 3]` to contiguous float32 `[..., 3, S, S]` in [-1, 1], mirrored where `flips` `[...]` say so:
    the bits of `semantica.images.to_tensor`."""
    pixels = torch.where(flips[..., None, None, None], pixels.flip(-2), pixels).movedim(-1, -3)
    # by a tensor: CUDA multiplies by the reciprocal of a number instead, which rounds twice
    half = torch.full((), 127.5, device=pixels.device)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(half).sub_(1)


def mean(vectors: tuple[np.ndarray, ...]) -> np.ndarray:
    """Of fp16 vectors, in float32."""
    return np.stack(vectors).astype(np.float32).mean(0)
