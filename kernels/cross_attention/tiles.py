"""How `cross_attention` cuts its problem into tiles, and the Triton functions that all its kernels share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import launch

LOG2E = tl.constexpr(1.4426950408889634)
# below this many programs a data-centre GPU has idle processors: smaller query tiles, or split loops, are faster
PROCESSORS = 132
# of CUDA, along the second and third axis of a grid
GRID_LIMIT = 65535


@triton.constexpr_function
def padded(dim):
    """Width of the block that holds `dim` values of a head: a power of two, of at least the 16 that a product takes."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def aligned(offset, ALIGN: tl.constexpr):
    """An offset that the compiler knows to be a multiple of 8, so that loads stay wide; of 16 it knows by itself."""
    if ALIGN == 8:
        # a hint by tl.multiple_of would stay behind in this function
        offset = offset // 8 * 8
    return offset


@triton.jit
def load_rows(ptr, stride, count, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr):
    """`[ROWS, D0]` and `[ROWS, padded(D1)]` (the first again if D1 is 0); rows from `count` on are zero if MASK."""
    rows = tl.arange(0, ROWS)[:, None]
    pointers = ptr + rows * stride + tl.arange(0, D0)[None, :]
    if MASK:
        a = tl.load(pointers, mask=rows < count, other=0.0)
    else:
        a = tl.load(pointers)
    b = a
    if D1 > 0:
        width: tl.constexpr = padded(D1)
        columns = tl.arange(0, width)[None, :]
        pointers = ptr + D0 + rows * stride + columns
        if width > D1:
            b = tl.load(pointers, mask=((rows < count) | (not MASK)) & (columns < D1), other=0.0)
        elif MASK:
            b = tl.load(pointers, mask=rows < count, other=0.0)
        else:
            b = tl.load(pointers)
    return a, b


@triton.jit
def store_rows(ptr, stride, a, b, count, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows before `count`, cast to the pointer's type."""
    rows = tl.arange(0, ROWS)[:, None]
    tl.store(ptr + rows * stride + tl.arange(0, D0)[None, :], a.to(ptr.dtype.element_ty), mask=rows < count)
    if D1 > 0:
        width: tl.constexpr = padded(D1)
        columns = tl.arange(0, width)[None, :]
        inside = rows < count
        if width > D1:
            inside &= columns < D1
        tl.store(ptr + D0 + rows * stride + columns, b.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot_rows(a0, a1, b0, b1, D1: tl.constexpr):
    """`a . b^T` over the head dim."""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision="ieee")
    return s


@triton.jit
def add_dot(acc0, acc1, p, b0, b1, D1: tl.constexpr):
    """`acc + p . b`, p rounded to b's type."""
    p = p.to(b0.dtype)
    acc0 = tl.dot(p, b0, acc0, input_precision="ieee")
    if D1 > 0:
        acc1 = tl.dot(p, b1, acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    a = tl.zeros([ROWS, D0], tl.float32)
    b = a
    if D1 > 0:
        b = tl.zeros([ROWS, padded(D1)], tl.float32)
    return a, b


@triton.jit
def inverse_rms(a, b, eps, D0: tl.constexpr, D1: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of rows in fp32."""
    squares = tl.sum(a * a, 1)
    if D1 > 0:
        squares += tl.sum(b * b, 1)
    return tl.rsqrt(squares / (D0 + D1) + eps)


@triton.jit
def load_weight(ptr, D0: tl.constexpr, D1: tl.constexpr):
    a = tl.load(ptr + tl.arange(0, D0)).to(tl.float32)[None, :]
    b = a
    if D1 > 0:
        columns = tl.arange(0, padded(D1))
        b = tl.load(ptr + D0 + columns, mask=columns < D1, other=0.0).to(tl.float32)[None, :]
    return a, b


@triton.jit
def normalise(q0, q1, weight_ptr, eps, D0: tl.constexpr, D1: tl.constexpr):
    """RMS norm in fp32, rounded to q's type; and the inverse rms."""
    x0, x1 = q0.to(tl.float32), q1.to(tl.float32)
    rms = inverse_rms(x0, x1, eps, D0, D1)
    w0, w1 = load_weight(weight_ptr, D0, D1)
    y0 = (x0 * rms[:, None] * w0).to(q0.dtype)
    y1 = y0
    if D1 > 0:
        y1 = (x1 * rms[:, None] * w1).to(q0.dtype)
    return y0, y1, rms


@triton.jit
def scaled(q0, q1, D0: tl.constexpr, D1: tl.constexpr):
    """fp32 queries over sqrt(D), so that a product is a logit; others as they are: see `exp_minus`."""
    if q0.dtype == tl.float32:
        q0 *= (D0 + D1) ** -0.5
        q1 = q1 * (D0 + D1) ** -0.5
    return q0, q1


@triton.jit
def exp_minus(s, reference, D: tl.constexpr, WIDE: tl.constexpr):
    """exp(logit - reference) of a product s.

    In fp32 (WIDE) the largest logit must cancel to the last digit, so nothing is multiplied before the subtraction.
    """
    if WIDE:
        p = tl.exp(s - reference)
    else:
        factor = tl.full(s.shape, LOG2E * D**-0.5, tl.float32)
        p = tl.exp2(tl.fma(s, factor, -LOG2E * reference))
    return p


@triton.jit
def stream_length(lengths_ptr, index, SIZE: tl.constexpr):
    """Valid tokens: a number the compiler knows unless there are lengths."""
    if lengths_ptr is None:
        length = SIZE
    else:
        length = tl.minimum(tl.load(lengths_ptr + index), SIZE).to(tl.int32)
    return length


def split_dim(dim: int) -> dict[str, int]:
    """The head dim as a power of two and a rest, which a block of `padded` width holds.

    Up to 128 neither is above 64: wider operands of 128 spill registers.
    """
    high = min(64 if dim <= 128 else 128, 1 << (dim.bit_length() - 1))
    return {"D0": high, "D1": dim - high}


def tail(rest: int) -> tuple[int, int]:
    """Widths of the tiles for the keys after the full ones: one power of two of at least 16, or two if that is less."""
    if rest == 0:
        return 0, 0
    one = max(16, 1 << (rest - 1).bit_length())
    high = one // 2
    low = max(16, 1 << (rest - high - 1).bit_length())
    return (high, low) if high >= 16 and high + low < one else (one, 0)


def stream_tiles(sizes: list[int], block_m: int) -> tuple[tuple[int, int, int, int, bool], ...]:
    """Per stream: first key, size, widths of the one or two tiles after the full ones, whether one tile is all."""
    tiles = []
    for s, size in enumerate(sizes):
        high, low = tail(size % block_m)
        tiles.append((sum(sizes[:s]), size, high, low, size // block_m + (high > 0) + (low > 0) == 1))
    return tuple(tiles)


def settings(kernel: str, q: Tensor) -> dict:
    """Row of the kernel's ladder by head dim; fp32, which has no tensor cores, has ladders of its own."""
    kernel += "_fp32" if q.dtype == torch.float32 else ""
    return launch.settings("cross_attention", kernel, q.shape[-1], q.device)


def query_tile(row: dict, q: Tensor) -> tuple[int, int]:
    """Queries per program, and warps: the row's, halved while a tile is mostly empty or processors would be idle."""
    batch, queries, heads, _ = q.shape
    size, warps = row["block_n"], row["warps"]
    while size > 16 and (
        size >= 2 * queries or (size > 64 and batch * heads * triton.cdiv(queries, size) < PROCESSORS)
    ):
        size, warps = size // 2, max(4, warps // 2)
    return size, warps


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of `[B, length, H, D]` tensors without the last, which is 1, as kernel arguments."""
    return {f"stride_{name}{axis}": a.stride(i) for name, a in tensors.items() for i, axis in enumerate("bnh")}


def alignment(*tensors: Tensor) -> int:
    """What divides every stride but the last: 16, which Triton sees by itself, 8, as of heads 40 values wide, or 1."""
    found = {stride % 16 for a in tensors for stride in a.stride()[:-1]}
    return 16 if found == {0} else 8 if found <= {0, 8} else 1


def dense(a: Tensor | None) -> Tensor | None:
    """Itself if its last dimension is dense, else a copy."""
    return a if a is None or a.stride(-1) == 1 else a.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if a is None else a.contiguous() for a in tensors]
