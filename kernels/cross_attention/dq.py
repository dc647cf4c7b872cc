"""The first launch of the backward of `cross_attention`: dq; see `backward`."""

import triton
import triton.language as tl

from semantica.kernels.cross_attention.tiles import (
    add_dot,
    aligned,
    dot_rows,
    exp_minus,
    load_rows,
    load_weight,
    normalise,
    padded,
    scaled,
    store_rows,
    stream_length,
    zero_rows,
)


@triton.jit
def dq_tile(
    acc0, acc1, delta, q0, q1, do0, do1, k_ptr, v_ptr, stride_k, stride_v, start, length, lse, row, gate,
    WIDTH: tl.constexpr, MASK: tl.constexpr, MODE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """MODE "delta" adds to delta, "grad" to acc; "both" does both for a stream of one tile, with row = -dlse given."""
    wide: tl.constexpr = q0.dtype == tl.float32
    first, count = tl.cast(start, tl.int64), length - start
    k0, k1 = load_rows(k_ptr + first * stride_k, stride_k, count, WIDTH, D0, D1, MASK)
    s = dot_rows(q0, q1, k0, k1, D1)
    p = exp_minus(s, lse[:, None], D0 + D1, wide)
    if MASK:
        p = tl.where((tl.arange(0, WIDTH) < count)[None, :], p, 0.0)
    v0, v1 = load_rows(v_ptr + first * stride_v, stride_v, count, WIDTH, D0, D1, MASK)
    dp = dot_rows(do0, do1, v0, v1, D1)
    if MODE != "grad":
        delta += tl.sum(p * dp, 1)
    if MODE == "both":
        row += gate * delta
    if MODE != "delta":
        acc0, acc1 = add_dot(acc0, acc1, p * (gate * dp - row[:, None]), k0, k1, D1)
    return acc0, acc1, delta


@triton.jit
def dq_stream(
    acc0, acc1, delta, q0, q1, do0, do1, k_ptr, v_ptr, stride_k, stride_v, length, lse, row, gate,
    SIZE: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, RAGGED: tl.constexpr, MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """One walk over the tiles of a stream, as in the forward."""
    bulk: tl.constexpr = SIZE // BLOCK_M * BLOCK_M
    if bulk > 0:
        whole = tl.minimum(length, bulk) // BLOCK_M * BLOCK_M
        for start in range(0, whole, BLOCK_M):
            acc0, acc1, delta = dq_tile(
                acc0, acc1, delta, q0, q1, do0, do1, k_ptr, v_ptr, stride_k, stride_v, start, length, lse, row, gate,
                BLOCK_M, False, MODE, D0, D1,
            )  # fmt: skip
        if RAGGED:
            for start in range(whole, tl.minimum(length, bulk), BLOCK_M):
                acc0, acc1, delta = dq_tile(
                    acc0, acc1, delta, q0, q1, do0, do1, k_ptr, v_ptr, stride_k, stride_v, start, length,
                    lse, row, gate, BLOCK_M, True, MODE, D0, D1,
                )  # fmt: skip
    if HIGH > 0:
        for start in range(bulk, tl.minimum(length, bulk + HIGH), HIGH):
            acc0, acc1, delta = dq_tile(
                acc0, acc1, delta, q0, q1, do0, do1, k_ptr, v_ptr, stride_k, stride_v, start, length, lse, row, gate,
                HIGH, RAGGED or SIZE < bulk + HIGH, MODE, D0, D1,
            )  # fmt: skip
    if LOW > 0:
        for start in range(bulk + HIGH, tl.minimum(length, bulk + HIGH + LOW), LOW):
            acc0, acc1, delta = dq_tile(
                acc0, acc1, delta, q0, q1, do0, do1, k_ptr, v_ptr, stride_k, stride_v, start, length, lse, row, gate,
                LOW, RAGGED or SIZE < bulk + HIGH + LOW, MODE, D0, D1,
            )  # fmt: skip
    return acc0, acc1, delta


@triton.jit
def dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, dlse_ptr, lengths_ptr, gates_ptr, weight_ptr,
    dq_ptr, normal_ptr, row_ptr, dgates_ptr, dweight_ptr, queries,
    stride_dob, stride_don, stride_doh, stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    TILES: tl.constexpr, STREAMS: tl.constexpr, EPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """o_ptr: contiguous, given where delta is the row sum of do * o. Partial sums: one row per program."""
    stride_don, stride_qn = aligned(stride_don, ALIGN), aligned(stride_qn, ALIGN)
    stride_kn, stride_vn = aligned(stride_kn, ALIGN), aligned(stride_vn, ALIGN)
    dim: tl.constexpr = D0 + D1
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, head = tl.num_programs(1), b * tl.num_programs(1) + h
    n, count = tile.to(tl.int64) * BLOCK_N, queries - tile * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    inside = rows < count
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN) + n * stride_qn
    q0, q1 = load_rows(q_ptr, stride_qn, count, BLOCK_N, D0, D1, True)
    rms = tl.zeros([BLOCK_N], tl.float32)
    if weight_ptr is not None:
        q0, q1, rms = normalise(q0, q1, weight_ptr, EPS, D0, D1)
        store_rows(normal_ptr + (head * queries + n) * dim, dim, q0, q1, count, BLOCK_N, D0, D1)
    q0, q1 = scaled(q0, q1, D0, D1)
    do_ptr += aligned(b * stride_dob + h * stride_doh, ALIGN) + n * stride_don
    do0, do1 = load_rows(do_ptr, stride_don, count, BLOCK_N, D0, D1, True)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    out = ((b * queries + n) * heads + h) * dim
    acc0, acc1 = zero_rows(BLOCK_N, D0, D1)
    for s in tl.static_range(STREAMS):
        length = stream_length(lengths_ptr, b * STREAMS + s, TILES[s][1])
        first = tl.full([], TILES[s][0], tl.int64)
        per_row = (head * STREAMS + s) * queries + n
        # beyond the last query p is 0
        lse = tl.load(lse_ptr + per_row + rows, mask=inside, other=float("inf"))
        row, delta = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
        gate = 1.0
        if gates_ptr is not None:
            gate = tl.load(gates_ptr + (b * STREAMS + s) * heads + h).to(tl.float32)
        if dlse_ptr is not None:
            row -= tl.load(dlse_ptr + per_row + rows, mask=inside, other=0.0)
        if o_ptr is not None:
            o0, o1 = load_rows(o_ptr + out, heads * dim, count, BLOCK_N, D0, D1, True)
            delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
            if D1 > 0:
                delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
            row += delta
        acc0, acc1, delta = dq_stream(
            acc0, acc1, delta, q0, q1, do0, do1, k_ptr + first * stride_kn, v_ptr + first * stride_vn,
            stride_kn, stride_vn, length, lse, row, gate,
            TILES[s][1], TILES[s][2], TILES[s][3], lengths_ptr is not None,
            "grad" if o_ptr is not None else "both" if TILES[s][4] else "delta", BLOCK_M, D0, D1,
        )  # fmt: skip
        if o_ptr is None:
            row += gate * delta
        if o_ptr is None and not TILES[s][4]:
            acc0, acc1, delta = dq_stream(
                acc0, acc1, delta, q0, q1, do0, do1, k_ptr + first * stride_kn, v_ptr + first * stride_vn,
                stride_kn, stride_vn, length, lse, row, gate,
                TILES[s][1], TILES[s][2], TILES[s][3], lengths_ptr is not None, "grad", BLOCK_M, D0, D1,
            )  # fmt: skip
        tl.store(row_ptr + per_row + rows, row, mask=inside)
        if dgates_ptr is not None:
            samples = tl.num_programs(2)
            tl.store(dgates_ptr + ((tile * samples + b) * STREAMS + s) * heads + h, tl.sum(delta, 0))
    acc0 *= dim**-0.5
    if D1 > 0:
        acc1 *= dim**-0.5
    if weight_ptr is not None:
        x0, x1 = load_rows(q_ptr, stride_qn, count, BLOCK_N, D0, D1, True)
        x0 = x0.to(tl.float32) * rms[:, None]
        w0, w1 = load_weight(weight_ptr, D0, D1)
        dweight_ptr += (head * tl.num_programs(0) + tile) * dim
        tl.store(dweight_ptr + tl.arange(0, D0), tl.sum(acc0 * x0, 0))
        acc0 *= w0
        along = tl.sum(acc0 * x0, 1)
        if D1 > 0:
            x1 = x1.to(tl.float32) * rms[:, None]
            columns = tl.arange(0, padded(D1))
            tl.store(dweight_ptr + D0 + columns, tl.sum(acc1 * x1, 0), mask=columns < D1)
            acc1 *= w1
            along += tl.sum(acc1 * x1, 1)
        # Zhang & Sennrich, arXiv 1910.07467: what changes the length of q changes nothing
        along /= dim
        acc0 = rms[:, None] * (acc0 - x0 * along[:, None])
        if D1 > 0:
            acc1 = rms[:, None] * (acc1 - x1 * along[:, None])
    store_rows(dq_ptr + out, heads * dim, acc0, acc1, count, BLOCK_N, D0, D1)
