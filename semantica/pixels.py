"""Pixels of 8 bits to the numbers that networks take, and back: plain arithmetic, numpy only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def to_planes(images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """uint8 `[B, S, S, 3]`, or a list of `[S, S, 3]`, to contiguous float32 `[B, 3, S, S]` in [-1, 1]."""
    pixels = images if isinstance(images, np.ndarray) else np.stack(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"expected uint8 [B, S, S, 3], got {pixels.dtype} {list(pixels.shape)}")
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    planes /= 127.5
    planes -= 1
    return planes


def to_uint8(images: "np.ndarray | Tensor") -> np.ndarray:
    """Floats `[B, 3, S, S]` in [-1, 1] to uint8 `[B, S, S, 3]`: rounded to nearest, clamped. Inverts `to_planes`."""
    if isinstance(images, np.ndarray):
        pixels = ((images + 1) * np.float32(127.5)).round().clip(0, 255)
        return pixels.transpose(0, 2, 3, 1).astype(np.uint8)
    pixels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
