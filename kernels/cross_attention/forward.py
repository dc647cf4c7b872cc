"""Forward of `cross_attention` in Triton: one program per (query tile, head, sample), all streams in one pass.

Tiles. A head dim that is no power of two is split into two blocks (48 = 32 + 16, 80 = 64 + 16, 96 = 64 + 32) and every
product into two: exactly the multiplications that are needed, where padding would cost 33, 60 and 33 % more. Only a
rest that is no power of two of at least 16 is padded, by masked loads: 40 = 32 + 8 of 16, 160 = 128 + 32. The keys of a
stream are walked in tiles of `block_m`, the rest in at most two narrower ones: with tiles of 64, 257 keys are 4 x 64 +
16, not 3 x 128, and 77 are 64 + 16. Stream sizes are compile-time constants, so tiles that are always full carry no
mask.

Softmax. In fp32 and base 2; the factor log2(e) / sqrt(D) is not folded into q, where rounding to 16 bits would cost the
logits their last digits, but into the subtraction of the maximum: one fused multiply-add per score either way. A stream
of a single tile has its maximum at once and is not rescaled. The query tiles of a head are neighbours in the grid and
find its keys and values in L2; a loop over full tiles is software-pipelined into shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import replay
from semantica.kernels.cross_attention.op import RMS_EPS
from semantica.kernels.cross_attention.tiles import (
    GRID_LIMIT,
    add_dot,
    aligned,
    alignment,
    contiguous,
    dense,
    dot_rows,
    exp_minus,
    load_rows,
    normalise,
    query_tile,
    scaled,
    settings,
    split_dim,
    store_rows,
    stream_length,
    stream_tiles,
    strides,
    zero_rows,
)
from semantica.kernels.launch import Launch


@triton.jit
def attend_tile(
    acc0, acc1, top, mass, q0, q1, k_ptr, v_ptr, stride_k, stride_v, start, length,
    WIDTH: tl.constexpr, MASK: tl.constexpr, SINGLE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov & Gimelshein, arXiv 1805.02867, alg. 3) over WIDTH keys."""
    dim: tl.constexpr = D0 + D1
    wide: tl.constexpr = q0.dtype == tl.float32
    first, count = tl.cast(start, tl.int64), length - start
    k0, k1 = load_rows(k_ptr + first * stride_k, stride_k, count, WIDTH, D0, D1, MASK)
    s = dot_rows(q0, q1, k0, k1, D1)
    if MASK:
        s = tl.where((tl.arange(0, WIDTH) < count)[None, :], s, -float("inf"))
    peak = tl.max(s, 1) * (1.0 if wide else dim**-0.5)
    if not SINGLE:
        peak = tl.maximum(top, peak)
        shrink = tl.exp(top - peak)
        mass *= shrink
        acc0 *= shrink[:, None]
        if D1 > 0:
            acc1 *= shrink[:, None]
    p = exp_minus(s, peak[:, None], dim, wide)
    mass += tl.sum(p, 1)
    v0, v1 = load_rows(v_ptr + first * stride_v, stride_v, count, WIDTH, D0, D1, MASK)
    acc0, acc1 = add_dot(acc0, acc1, p, v0, v1, D1)
    return acc0, acc1, peak, mass


@triton.jit
def attend_stream(
    q0, q1, k_ptr, v_ptr, stride_k, stride_v, length,
    SIZE: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, SINGLE: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Unnormalised output, maximum and sum of one stream. RAGGED: the length is known at run time only."""
    bulk: tl.constexpr = SIZE // BLOCK_M * BLOCK_M
    acc0, acc1 = zero_rows(BLOCK_N, D0, D1)
    top, mass = tl.full([BLOCK_N], -float("inf"), tl.float32), tl.zeros([BLOCK_N], tl.float32)
    if bulk > 0:
        whole = tl.minimum(length, bulk) // BLOCK_M * BLOCK_M
        for start in range(0, whole, BLOCK_M):
            acc0, acc1, top, mass = attend_tile(
                acc0, acc1, top, mass, q0, q1, k_ptr, v_ptr, stride_k, stride_v, start, length,
                BLOCK_M, False, SINGLE, D0, D1,
            )  # fmt: skip
        if RAGGED:
            for start in range(whole, tl.minimum(length, bulk), BLOCK_M):
                acc0, acc1, top, mass = attend_tile(
                    acc0, acc1, top, mass, q0, q1, k_ptr, v_ptr, stride_k, stride_v, start, length,
                    BLOCK_M, True, SINGLE, D0, D1,
                )  # fmt: skip
    # at most once each: a loop of one known step is no loop to the compiler
    if HIGH > 0:
        for start in range(bulk, tl.minimum(length, bulk + HIGH), HIGH):
            acc0, acc1, top, mass = attend_tile(
                acc0, acc1, top, mass, q0, q1, k_ptr, v_ptr, stride_k, stride_v, start, length,
                HIGH, RAGGED or SIZE < bulk + HIGH, SINGLE, D0, D1,
            )  # fmt: skip
    if LOW > 0:
        for start in range(bulk + HIGH, tl.minimum(length, bulk + HIGH + LOW), LOW):
            acc0, acc1, top, mass = attend_tile(
                acc0, acc1, top, mass, q0, q1, k_ptr, v_ptr, stride_k, stride_v, start, length,
                LOW, RAGGED or SIZE < bulk + HIGH + LOW, SINGLE, D0, D1,
            )  # fmt: skip
    return acc0, acc1, top, mass


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths_ptr, gates_ptr, weight_ptr, queries,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    TILES: tl.constexpr, STREAMS: tl.constexpr, EPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """TILES: see `stream_tiles`. ALIGN: see `alignment`."""
    stride_qn, stride_kn = aligned(stride_qn, ALIGN), aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    h, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    count = queries - tl.program_id(0) * BLOCK_N
    n = tl.program_id(0).to(tl.int64) * BLOCK_N
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    q0, q1 = load_rows(q_ptr + n * stride_qn, stride_qn, count, BLOCK_N, D0, D1, True)
    if weight_ptr is not None:
        q0, q1, _ = normalise(q0, q1, weight_ptr, EPS, D0, D1)
    q0, q1 = scaled(q0, q1, D0, D1)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    rows = tl.arange(0, BLOCK_N)
    lse_ptr += (b * heads + h) * STREAMS * queries + n
    out0, out1 = zero_rows(BLOCK_N, D0, D1)
    for s in tl.static_range(STREAMS):
        length = stream_length(lengths_ptr, b * STREAMS + s, TILES[s][1])
        first = tl.full([], TILES[s][0], tl.int64)
        acc0, acc1, top, mass = attend_stream(
            q0, q1, k_ptr + first * stride_kn, v_ptr + first * stride_vn, stride_kn, stride_vn, length,
            TILES[s][1], TILES[s][2], TILES[s][3], TILES[s][4], lengths_ptr is not None, BLOCK_N, BLOCK_M, D0, D1,
        )  # fmt: skip
        tl.store(lse_ptr + s * queries + rows, top + tl.log(mass), mask=rows < count)
        # an absent stream has acc = mass = 0 and adds exactly 0
        factor = 1 / tl.where(mass > 0, mass, 1)
        if gates_ptr is not None:
            factor *= tl.load(gates_ptr + (b * STREAMS + s) * heads + h).to(tl.float32)
        out0 += acc0 * factor[:, None]
        if D1 > 0:
            out1 += acc1 * factor[:, None]
    o_ptr += ((b * queries + n) * heads + h) * (D0 + D1)
    store_rows(o_ptr, heads * (D0 + D1), out0, out1, count, BLOCK_N, D0, D1)


def plan_forward(q, k, v, sizes, lengths, gates, q_weight) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Launches, and what they write: `o [B, N, H, D]` and `lse [B, H, S, N]`. Works on meta tensors."""
    batch, queries, heads, dim = q.shape
    if max(batch, heads) > GRID_LIMIT:
        raise ValueError(f"q {tuple(q.shape)} = [B, N, H, D]: at most {GRID_LIMIT} samples or heads fit one launch")
    q, k, v = dense(q), dense(k), dense(v)
    lengths, gates, q_weight = contiguous(lengths, gates, q_weight)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, len(sizes), queries), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return [], (o, lse)
    row = settings("forward", q)
    block_n, warps = query_tile(row, q)
    arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "o_ptr": o, "lse_ptr": lse, "lengths_ptr": lengths}
    arguments |= {"gates_ptr": gates, "weight_ptr": q_weight, "queries": queries, **strides(q=q, k=k, v=v)}
    constants = {"TILES": stream_tiles(list(sizes), row["block_m"]), "STREAMS": len(sizes), "EPS": RMS_EPS}
    constants |= {"BLOCK_N": block_n, "BLOCK_M": row["block_m"], **split_dim(dim)}
    constants["ALIGN"] = alignment(q, k, v)
    grid = (triton.cdiv(queries, block_n), heads, batch)
    return [Launch(forward_kernel, grid, arguments, constants, warps, row["stages"])], (o, lse)


def forward(q, k, v, sizes, lengths, gates, q_weight, return_lse=False) -> tuple[Tensor, Tensor]:
    """`o` and `lse`, which the backward uses whether or not the caller asked for it (`return_lse`)."""
    _, (o, lse) = replay.run(plan_forward, (q, k, v, tuple(sizes), lengths, gates, q_weight))
    return o, lse
