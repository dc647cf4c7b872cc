"""Backward of `attention_moments` in Triton: a launch for each gradient that is asked for, no atomics, fixed order.

With dP = F dM^T: dS = P * dP, dq = dS k / sqrt(D), dlse = -row sums of dS, dk = dS^T q / sqrt(D), dF = P dM.
1. `moments_dq_kernel`, one program per (query tile, head, sample), walks the keys: dq and dlse. As lse is an input of
   its own, the row sums need not be known beforehand: one walk, where attention's backward may need two.
2. `moments_dk_kernel`, one program per (key tile, head, sample), walks the queries, as the forward does: dk. Steering
   has no use for it, since the condition's keys do not depend on the picture, and leaves it out.
3. `moments_df_kernel`, one program per (query tile, block of features, sample), walks heads and keys: dF, summed over
   the heads (and the samples, where they share the features) in registers.
Features beyond one block (of up to 64) are read again, from L2, for every tile of the map: dP has them all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import replay
from semantica.kernels.attention_moments.tiles import (
    dot_features,
    feature_block,
    key_spans,
    load_block,
    load_queries,
    map_tile,
    near,
    plan_sum,
    query_splits,
    rows_of,
    settings,
    store_block,
    transposed_map_tile,
)
from semantica.kernels.cross_attention.tiles import (
    add_dot,
    aligned,
    alignment,
    contiguous,
    dense,
    load_rows,
    query_tile,
    split_dim,
    store_rows,
    stream_tiles,
    strides,
    zero_rows,
)
from semantica.kernels.launch import Launch


@triton.jit
def dp_tile(
    f, g, f_ptr, g_ptr, stride_fn, n, queries, start, keys,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, TF32: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dP = F dM^T; f and g, the blocks of both, are given where one block is all."""
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if FEATURES <= BLOCK_F:
        acc = dot_features(f, tl.trans(g), acc, TF32)
    else:
        for column in range(0, FEATURES, BLOCK_F):
            some = load_block(f_ptr, stride_fn, n, queries - n, column, ROWS, BLOCK_F, FEATURES)
            part = load_block(g_ptr, FEATURES, start, keys - start, column, WIDTH, BLOCK_F, FEATURES)
            acc = dot_features(some, tl.trans(part.to(some.dtype)), acc, TF32)
    return acc


@triton.jit
def moments_dq_tile(
    acc0, acc1, total, q0, q1, lse, f, k_ptr, f_ptr, g_ptr, stride_kn, stride_fn, n, queries, start, length, keys,
    WIDTH: tl.constexpr, MASK: tl.constexpr, FEATURES: tl.constexpr, TF32: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    k0, k1 = load_rows(k_ptr + tl.cast(start, tl.int64) * stride_kn, stride_kn, length - start, WIDTH, D0, D1, MASK)
    p = map_tile(q0, q1, k0, k1, lse, length - start, MASK, D0, D1)
    g = f
    if FEATURES <= BLOCK_F:
        g = load_block(g_ptr, FEATURES, start, keys - start, 0, WIDTH, BLOCK_F, FEATURES).to(f.dtype)
    ds = p * dp_tile(f, g, f_ptr, g_ptr, stride_fn, n, queries, start, keys, BLOCK_N, WIDTH, FEATURES, TF32, BLOCK_F)
    acc0, acc1 = add_dot(acc0, acc1, ds, k0, k1, D1)
    return acc0, acc1, total + tl.sum(ds, 1)


@triton.jit
def moments_dq_kernel(
    q_ptr, k_ptr, lse_ptr, f_ptr, g_ptr, lengths_ptr, dq_ptr, dlse_ptr, queries,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_lb, stride_lh, stride_fb, stride_fn,
    KEYS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, FEATURES: tl.constexpr, TF32: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """g: the cotangents dM `[B, H, KEYS, FEATURES]`. HIGH, LOW: widths of the tiles after the full ones."""
    stride_qn, stride_kn = aligned(stride_qn, ALIGN), aligned(stride_kn, ALIGN)
    ragged: tl.constexpr = lengths_ptr is not None
    dim: tl.constexpr = D0 + D1
    h, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    n = tl.program_id(0) * BLOCK_N
    length = KEYS
    if ragged:
        length = tl.minimum(tl.load(lengths_ptr + b), KEYS).to(tl.int32)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    f_ptr += b * stride_fb
    g_ptr += (b * heads + h) * KEYS * FEATURES
    q0, q1, lse = load_queries(
        q_ptr, lse_ptr + b * stride_lb + h * stride_lh, stride_qn, n, queries - n, BLOCK_N, D0, D1
    )
    # more features than one block holds are read with each tile of keys
    f = lse
    if FEATURES <= BLOCK_F:
        f = load_block(f_ptr, stride_fn, n, queries - n, 0, BLOCK_N, BLOCK_F, FEATURES)
    acc0, acc1 = zero_rows(BLOCK_N, D0, D1)
    total = tl.zeros([BLOCK_N], tl.float32)
    bulk: tl.constexpr = KEYS // BLOCK_M * BLOCK_M
    if bulk > 0:
        whole = tl.minimum(length, bulk) // BLOCK_M * BLOCK_M
        for start in range(0, whole, BLOCK_M):
            acc0, acc1, total = moments_dq_tile(
                acc0, acc1, total, q0, q1, lse, f, k_ptr, f_ptr, g_ptr, stride_kn, stride_fn, n, queries,
                start, length, KEYS, BLOCK_M, False, FEATURES, TF32, BLOCK_N, BLOCK_F, D0, D1,
            )  # fmt: skip
        if ragged:
            for start in range(whole, tl.minimum(length, bulk), BLOCK_M):
                acc0, acc1, total = moments_dq_tile(
                    acc0, acc1, total, q0, q1, lse, f, k_ptr, f_ptr, g_ptr, stride_kn, stride_fn, n, queries,
                    start, length, KEYS, BLOCK_M, True, FEATURES, TF32, BLOCK_N, BLOCK_F, D0, D1,
                )  # fmt: skip
    # at most once each: a loop of one known step is no loop to the compiler
    if HIGH > 0:
        for start in range(bulk, tl.minimum(length, bulk + HIGH), HIGH):
            acc0, acc1, total = moments_dq_tile(
                acc0, acc1, total, q0, q1, lse, f, k_ptr, f_ptr, g_ptr, stride_kn, stride_fn, n, queries,
                start, length, KEYS, HIGH, ragged or KEYS < bulk + HIGH, FEATURES, TF32, BLOCK_N, BLOCK_F, D0, D1,
            )  # fmt: skip
    if LOW > 0:
        for start in range(bulk + HIGH, tl.minimum(length, bulk + HIGH + LOW), LOW):
            acc0, acc1, total = moments_dq_tile(
                acc0, acc1, total, q0, q1, lse, f, k_ptr, f_ptr, g_ptr, stride_kn, stride_fn, n, queries,
                start, length, KEYS, LOW, ragged or KEYS < bulk + HIGH + LOW, FEATURES, TF32, BLOCK_N, BLOCK_F, D0, D1,
            )  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    tl.store(dlse_ptr + (b * heads + h) * queries + n + rows, -total, mask=rows < queries - n)
    acc0 *= dim**-0.5
    if D1 > 0:
        acc1 *= dim**-0.5
    store_rows(dq_ptr + ((b * queries + n) * heads + h) * dim, heads * dim, acc0, acc1, queries - n, BLOCK_N, D0, D1)


@triton.jit
def moments_dk_tile(
    q_ptr, k_ptr, lse_ptr, f_ptr, g_ptr, dk_ptr, start, length, size, begin, end, queries, heads,
    stride_qn, stride_kn, stride_fn,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, TF32: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    dim: tl.constexpr = D0 + D1
    # fp32 queries come scaled
    factor: tl.constexpr = 1.0 if q_ptr.dtype.element_ty == tl.float32 else dim**-0.5
    key = tl.cast(start, tl.int64)
    k0, k1 = load_rows(k_ptr + key * stride_kn, stride_kn, length - start, WIDTH, D0, D1, True)
    g = load_block(g_ptr, FEATURES, start, size - start, 0, WIDTH, BLOCK_F, FEATURES).to(f_ptr.dtype.element_ty)
    acc0, acc1 = zero_rows(WIDTH, D0, D1)
    # a tile without a valid key has no queries to walk
    for n in range(begin, tl.where(start < length, end, begin), BLOCK_N):
        q0, q1, lse = load_queries(q_ptr, lse_ptr, stride_qn, n, queries - n, BLOCK_N, D0, D1)
        p = transposed_map_tile(q0, q1, k0, k1, lse, D0, D1)
        dp = tl.zeros([WIDTH, BLOCK_N], tl.float32)
        if FEATURES <= BLOCK_F:
            f = load_block(f_ptr, stride_fn, n, queries - n, 0, BLOCK_N, BLOCK_F, FEATURES)
            dp = dot_features(g, tl.trans(f), dp, TF32)
        else:
            for column in range(0, FEATURES, BLOCK_F):
                f = load_block(f_ptr, stride_fn, n, queries - n, column, BLOCK_N, BLOCK_F, FEATURES)
                part = load_block(g_ptr, FEATURES, start, size - start, column, WIDTH, BLOCK_F, FEATURES)
                dp = dot_features(part.to(f.dtype), tl.trans(f), dp, TF32)
        acc0, acc1 = add_dot(acc0, acc1, p * dp, q0, q1, D1)
    there = tl.arange(0, WIDTH)[:, None] < length - start
    # keys beyond the length: zeros, whatever was computed
    acc0 = tl.where(there, acc0 * factor, 0.0)
    if D1 > 0:
        acc1 = tl.where(there, acc1 * factor, 0.0)
    store_rows(dk_ptr + key * heads * dim, heads * dim, acc0, acc1, size - start, WIDTH, D0, D1)


@triton.jit
def moments_dk_kernel(
    q_ptr, k_ptr, lse_ptr, f_ptr, g_ptr, lengths_ptr, dk_ptr, queries, keys, span,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_lb, stride_lh, stride_fb, stride_fn,
    SPANS: tl.constexpr, COUNT: tl.constexpr, TILES: tl.constexpr, FEATURES: tl.constexpr, TF32: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """SPANS: see `key_spans`; TILES in all. dk: `[splits, B, keys, H, D]`."""
    stride_qn, stride_kn = aligned(stride_qn, ALIGN), aligned(stride_kn, ALIGN)
    tile, split = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    h, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b), keys).to(tl.int32)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    g_ptr += (b * heads + h) * keys * FEATURES
    dk_ptr += ((split * tl.num_programs(2) + b) * keys * heads + h) * (D0 + D1)
    begin = split * span
    end = tl.minimum(begin + span, queries)
    for s in tl.static_range(COUNT):
        if (tile >= SPANS[s][1]) & (tile < SPANS[s][2]):
            moments_dk_tile(
                q_ptr, k_ptr, lse_ptr + b * stride_lb + h * stride_lh, f_ptr + b * stride_fb, g_ptr, dk_ptr,
                SPANS[s][3] + (tile - SPANS[s][1]) * SPANS[s][0], length, keys, begin, end, queries, heads,
                stride_qn, stride_kn, stride_fn, SPANS[s][0], FEATURES, TF32, BLOCK_N, BLOCK_F, D0, D1,
            )  # fmt: skip


@triton.jit
def moments_df_kernel(
    q_ptr, k_ptr, lse_ptr, g_ptr, lengths_ptr, df_ptr, queries, keys, heads, samples, blocks,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_lb, stride_lh,
    FEATURES: tl.constexpr, TF32: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """df: `[grid's second axis, queries, FEATURES]`; each adds up `samples` samples, with all their heads."""
    stride_qn, stride_kn = aligned(stride_qn, ALIGN), aligned(stride_kn, ALIGN)
    n, column = tl.program_id(0) // blocks * BLOCK_N, tl.program_id(0) % blocks * BLOCK_F
    place = tl.program_id(1).to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for bh in range(samples * heads):
        b, h = place * samples + bh // heads, bh % heads
        length = keys
        if lengths_ptr is not None:
            length = tl.minimum(tl.load(lengths_ptr + b), keys).to(tl.int32)
        q0, q1, lse = load_queries(
            q_ptr + aligned(b * stride_qb + h * stride_qh, ALIGN), lse_ptr + b * stride_lb + h * stride_lh,
            stride_qn, n, queries - n, BLOCK_N, D0, D1,
        )  # fmt: skip
        k_at = k_ptr + aligned(b * stride_kb + h * stride_kh, ALIGN)
        g_at = g_ptr + (b * heads + h) * keys * FEATURES
        for start in range(0, length, BLOCK_M):
            first, count = tl.cast(start, tl.int64), length - start
            k0, k1 = load_rows(k_at + first * stride_kn, stride_kn, count, BLOCK_M, D0, D1, True)
            p = map_tile(q0, q1, k0, k1, lse, count, True, D0, D1)
            g = load_block(g_at, FEATURES, start, count, column, BLOCK_M, BLOCK_F, FEATURES)
            if TF32 or q0.dtype == tl.float32:
                acc = dot_features(p, g, acc, TF32)
            else:
                acc = dot_features(p.to(q0.dtype), g.to(q0.dtype), acc, TF32)
    df_ptr += (place * queries + n) * FEATURES
    store_block(df_ptr, FEATURES, acc, queries - n, column, BLOCK_N, BLOCK_F, FEATURES)


def plan_backward(dm, q, k, lse, features, lengths, needs) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Launches, and what they write: dq, dlse, dk, dfeatures (empty where not needed). Works on meta tensors."""
    batch, queries, heads, dim = q.shape
    keys, count = k.shape[1], features.shape[-1]
    q, k, features = near(q), near(k), dense(features)
    (lse, lse_strides), (dm, lengths) = rows_of(q, lse), contiguous(dm, lengths)

    def new(like: Tensor, need: bool) -> Tensor:
        return torch.empty(like.shape if need else (0,), dtype=like.dtype, device=q.device)

    outputs = new(q, needs[0]), new(lse, needs[0]), new(k, needs[1]), new(features, needs[2])
    if q.numel() == 0:
        return [], tuple(output.zero_() for output in outputs)
    dq, dlse, dk, df = outputs
    shared = {"q_ptr": q, "k_ptr": k, "lse_ptr": lse, "g_ptr": dm, "lengths_ptr": lengths, "queries": queries}
    shared |= {**strides(q=q, k=k), **lse_strides}
    of_features = {"f_ptr": features, "stride_fb": features.stride(0) if features.shape[0] > 1 else 0}
    of_features |= {"stride_fn": features.stride(1)}
    fixed = {"FEATURES": count, "TF32": features.dtype != q.dtype, **split_dim(dim), "ALIGN": alignment(q, k)}
    plan = []
    if needs[0]:
        row = settings("attention_moments", "dq", q)
        block_n, warps = query_tile(row, q)
        ((_, _, high, low, _),) = stream_tiles([keys], row["block_m"])
        constants = {**fixed, "KEYS": keys, "HIGH": high, "LOW": low, "BLOCK_N": block_n, "BLOCK_M": row["block_m"]}
        constants["BLOCK_F"] = feature_block(row, count)
        arguments = {**shared, **of_features, "dq_ptr": dq, "dlse_ptr": dlse}
        grid = (triton.cdiv(queries, block_n), heads, batch)
        plan.append(Launch(moments_dq_kernel, grid, arguments, constants, warps, row["stages"]))
    if needs[1]:
        row = settings("attention_moments", "dk", q)
        spans, block_n = key_spans(keys, row["block_m"]), min(row["block_n"], max(16, triton.next_power_of_2(queries)))
        splits, span = query_splits(queries, block_n, spans[-1][2] * heads * batch)
        parts = dk if splits == 1 else torch.empty((splits, *k.shape), dtype=torch.float32, device=q.device)
        constants = {**fixed, "SPANS": spans, "COUNT": len(spans), "TILES": spans[-1][2], "BLOCK_N": block_n}
        constants["BLOCK_F"] = feature_block(row, count)
        arguments = {**shared, **of_features, "dk_ptr": parts, "keys": keys, "span": span}
        grid = (spans[-1][2] * splits, heads, batch)
        plan.append(Launch(moments_dk_kernel, grid, arguments, constants, row["warps"], row["stages"]))
        plan += plan_sum(parts, dk)
    if needs[2]:
        row = settings("attention_moments", "df", q)
        block_f, block_n = feature_block(row, count), min(row["block_n"], max(16, triton.next_power_of_2(queries)))
        blocks, samples = triton.cdiv(count, block_f), batch // features.shape[0]
        constants = {**fixed, "BLOCK_N": block_n, "BLOCK_M": row["block_m"], "BLOCK_F": block_f}
        arguments = {**shared, "df_ptr": df, "keys": keys, "heads": heads, "samples": samples, "blocks": blocks}
        grid = (triton.cdiv(queries, block_n) * blocks, features.shape[0])
        plan.append(Launch(moments_df_kernel, grid, arguments, constants, row["warps"], row["stages"]))
    return plan, outputs


def backward(dm, q, k, lse, features, lengths, needs) -> list[Tensor]:
    return list(replay.run(plan_backward, (dm, q, k, lse, features, lengths, tuple(needs)))[1])
