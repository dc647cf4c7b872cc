"""The Triton functions that the kernels of `attention_moments` and `attention_columns` share, and how both are planned.

Precision of the products with features: 16-bit features on tensor cores in their own type; fp32 ones beside 16-bit
queries in TF32 (a rounding of 2^-11 as fp16's, over the range of fp32, which cotangents of normalised energies need);
fp32 throughout in full.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import launch
from semantica.kernels.cross_attention.tiles import (
    PROCESSORS,
    dense,
    dot_rows,
    exp_minus,
    far,
    load_rows,
    scaled,
    stream_tiles,
)


@triton.jit
def map_tile(q0, q1, k0, k1, lse, count, MASK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """P of queries by keys; keys from `count` on are 0 if MASK."""
    p = exp_minus(dot_rows(q0, q1, k0, k1, D1), lse[:, None], D0 + D1, q0.dtype == tl.float32)
    if MASK:
        p = tl.where((tl.arange(0, k0.shape[0]) < count)[None, :], p, 0.0)
    return p


@triton.jit
def transposed_map_tile(q0, q1, k0, k1, lse, D0: tl.constexpr, D1: tl.constexpr):
    """P^T of keys by queries, unmasked: a row depends on its own key alone."""
    wide: tl.constexpr = q0.dtype == tl.float32
    # in fp32 the forward's own product: its logits to the bit, so that p sums to 1 however large they are
    if wide:
        s = tl.trans(dot_rows(q0, q1, k0, k1, D1))
    else:
        s = dot_rows(k0, k1, q0, q1, D1)
    return exp_minus(s, lse[None, :], D0 + D1, wide)


@triton.jit
def load_queries(q_ptr, lse_ptr, stride, at, count, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Queries as `exp_minus` wants them, and their lse; beyond the last query p is 0."""
    q0, q1 = load_rows(q_ptr + tl.cast(at, tl.int64) * stride, stride, count, ROWS, D0, D1, True)
    q0, q1 = scaled(q0, q1, D0, D1)
    rows = tl.arange(0, ROWS)
    return q0, q1, tl.load(lse_ptr + at + rows, mask=rows < count, other=float("inf"))


@triton.jit
def load_block(ptr, stride, at, count, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """`[ROWS, WIDTH]` of a matrix of COLUMNS columns, zeros outside."""
    rows, columns = tl.arange(0, ROWS)[:, None], column + tl.arange(0, WIDTH)[None, :]
    inside = rows < count
    if COLUMNS % WIDTH != 0:
        inside &= columns < COLUMNS
    return tl.load(ptr + tl.cast(at, tl.int64) * stride + rows * stride + columns, mask=inside, other=0.0)


@triton.jit
def store_block(ptr, stride, a, count, column, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], column + tl.arange(0, WIDTH)[None, :]
    inside = rows < count
    if COLUMNS % WIDTH != 0:
        inside &= columns < COLUMNS
    tl.store(ptr + rows * stride + columns, a.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot_features(a, b, acc, TF32: tl.constexpr):
    """`acc + a . b`, where one side is features and both are in the features' type."""
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def parts_sum_kernel(part_ptr, out_ptr, splits, values, BLOCK: tl.constexpr):
    """Sums over the first axis of `[splits, values]`, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for s in range(splits):
        acc += tl.load(part_ptr + tl.cast(s, tl.int64) * values + i, mask=i < values, other=0.0)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=i < values)


def plan_sum(parts: Tensor, out: Tensor) -> list[launch.Launch]:
    """What adds up partial results `[splits, ...]`, where there are several."""
    if parts is out:
        return []
    arguments = {"part_ptr": parts, "out_ptr": out, "splits": parts.shape[0], "values": out.numel()}
    return [launch.Launch(parts_sum_kernel, (triton.cdiv(out.numel(), 1024),), arguments, {"BLOCK": 1024}, 4)]


def key_spans(keys: int, block_m: int) -> tuple[tuple[int, int, int, int], ...]:
    """Key tiles by width: width, its first tile, the tile after its last, its first key."""
    ((_, _, high, low, _),) = stream_tiles([keys], block_m)
    spans, tile, key = [], 0, 0
    for width, count in ((block_m, keys // block_m), (high, 1), (low, 1)):
        if width and count:
            spans.append((width, tile, tile + count, key))
            tile, key = tile + count, key + width * count
    return tuple(spans)


def query_splits(queries: int, block_n: int, programs: int) -> tuple[int, int]:
    """Into how many parts the queries are cut so that processors are busy, and how many queries are in one."""
    tiles = triton.cdiv(queries, block_n)
    splits = max(1, min(PROCESSORS // max(1, programs), tiles))
    span = triton.cdiv(tiles, splits) * block_n
    return triton.cdiv(queries, span), span


def near(a: Tensor) -> Tensor:
    """`dense`, and copied where 32 bits, with which these kernels count heads, are too few for the offset of one."""
    a = dense(a)
    return a.contiguous() if far(a) else a


def rows_of(q: Tensor, lse: Tensor) -> tuple[Tensor, dict[str, int]]:
    """lse with a dense last axis, and its other strides: of several streams it is a view."""
    lse = lse if lse.stride(-1) == 1 else lse.contiguous()
    return lse, {"stride_lb": lse.stride(0), "stride_lh": lse.stride(1)}


def settings(operator: str, kernel: str, q: Tensor) -> dict:
    """Row of the kernel's ladder by head dim; fp32, which has no tensor cores, has ladders of its own."""
    kernel += "_fp32" if q.dtype == torch.float32 else ""
    return launch.settings(operator, kernel, q.shape[-1], q.device)


def feature_block(row: dict, features: int) -> int:
    return min(row["block_f"], max(16, triton.next_power_of_2(features)))
