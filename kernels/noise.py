"""Standard normal noise in Triton, in one pass: the integers of `semantica.train.data.noise`, to the bit.

One program per (run of counters, sample): Philox4x32-10 gives four words of each, a table turns them into normals.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels.launch import Launch

# counters of a program: 16 KiB of normals
BLOCK = 1024
# of a launch: what CUDA takes along the second axis of a grid
SAMPLES = 65535


@triton.jit
def to_normal(word, ends_ptr, falls_ptr, WITHIN: tl.constexpr, FRACTION: tl.constexpr):
    # the first bit is the sign, the others say how far out
    bits = (((word & 0x7FFFFFFF) << 1) | 1).to(tl.float32).to(tl.int32, bitcast=True)
    piece = (bits >> WITHIN) - (127 << (23 - WITHIN))
    fall = tl.load(falls_ptr + piece) * (bits & ((1 << WITHIN) - 1)) + (1 << (WITHIN - 1))
    size = (tl.load(ends_ptr + piece) - (fall >> WITHIN)).to(tl.float32) * (1.0 / (1 << FRACTION))
    return tl.where(word > 0x7FFFFFFF, size, -size)


@triton.jit
def noise_kernel(
    out_ptr, index_ptr, key_ptr, ends_ptr, falls_ptr, size,
    WITHIN: tl.constexpr, FRACTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start = tl.program_id(1), tl.program_id(0) * BLOCK
    sample = tl.load(index_ptr + row)
    counter = (start + tl.arange(0, BLOCK)).to(tl.uint32)
    zero = tl.zeros([BLOCK], tl.uint32)
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32) + zero, (sample >> 32).to(tl.uint32) + zero
    a, b, c, d = tl.philox(tl.load(key_ptr), counter, zero, low, high)
    a = to_normal(a, ends_ptr, falls_ptr, WITHIN, FRACTION)
    b = to_normal(b, ends_ptr, falls_ptr, WITHIN, FRACTION)
    c = to_normal(c, ends_ptr, falls_ptr, WITHIN, FRACTION)
    d = to_normal(d, ends_ptr, falls_ptr, WITHIN, FRACTION)
    # a, b, c, d of one counter, then of the next: whole lines are written
    values = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    place = start * 4 + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * size + place, values, place < size)


def plan_noise(
    out: Tensor, index: Tensor, key: Tensor, ends: Tensor, falls: Tensor, within: int, fraction: int
) -> Launch:
    """Noise of samples `index` int64 `[B]` into `out` fp32 `[B, n]`, contiguous.

    Args:
        key: int64 `[1]`, both words of Philox' key, the first in the lower half.
        ends, falls, within, fraction: see `semantica.train.data.noise.quantiles`.

    Raises:
        ValueError: n is 2^31 or more, or there are more samples than `SAMPLES`.
    """
    batch, size = out.shape
    if batch > SAMPLES or size >= 2**31:
        raise ValueError(f"noise {(batch, size)}: {SAMPLES} samples of fewer than 2^31 numbers fit one launch")
    return Launch(
        kernel=noise_kernel,
        # the first axis takes 2^31 - 1 programs
        grid=(triton.cdiv(size, 4 * BLOCK), batch),
        arguments=dict(out_ptr=out, index_ptr=index, key_ptr=key, ends_ptr=ends, falls_ptr=falls, size=size),
        constants=dict(WITHIN=within, FRACTION=fraction, BLOCK=BLOCK),
        warps=4,
    )


def fill(out: Tensor, index: Tensor, key: Tensor, ends: Tensor, falls: Tensor, within: int, fraction: int) -> None:
    """As `plan_noise` says, on the current stream of the tensors' device."""
    if out.numel():
        with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
            for part, numbers in zip(out.split(SAMPLES), index.split(SAMPLES)):
                plan_noise(part, numbers, key, ends, falls, within, fraction).run()
