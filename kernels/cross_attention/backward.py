"""Backward of `cross_attention` in Triton: three launches, no atomics, every sum in a fixed order.

With p = exp(logit - lse), dp = do . v^T and delta_s = sum over a stream's keys of p * dp = do . o_s:
    d(logit) = p * (gate * dp - row),  row = gate * delta - dlse
1. `dq_kernel`, one program per (query tile, head, sample): delta, row, dq, and partial sums of dgates and dweight; it
   stores the normalised q, so that the second kernel feeds its products from memory without norming again.
2. `dkv_kernel`, one program per (key tile, head, sample), loops over the queries. Key tiles are few (M is 77 to 512):
   where they do not fill the processors, the queries are split into partial sums, added in order by the third kernel.
3. `sums_kernel` adds up partial dk, dv, dgates and dweight.

Delta. A stream of one tile has p and dp in registers. One longer stream without a gate has the row sum of do * o: D
more values read per query and head. Otherwise it would take each o_s: S more outputs written by every forward, kept
until the backward and read again. It is computed instead in a first walk over K and V, which are in L2 already: 2 more
products on top of 7 (4 * M * D operations per query and head) and no memory.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import launch
from semantica.kernels.cross_attention.forward import (
    PROCESSORS,
    add_dot,
    contiguous,
    dense,
    dot_rows,
    exp_minus,
    load_rows,
    load_weight,
    normalise,
    plan_forward,
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
from semantica.kernels.cross_attention.op import HEAD_DIMS, RMS_EPS
from semantica.kernels.launch import Launch


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
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """o_ptr: contiguous, given where delta is the row sum of do * o. Partial sums: one row per program."""
    dim: tl.constexpr = D0 + D1
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, head = tl.num_programs(1), b * tl.num_programs(1) + h
    n, count = tile.to(tl.int64) * BLOCK_N, queries - tile * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    inside = rows < count
    q_ptr += b * stride_qb + h * stride_qh + n * stride_qn
    q0, q1 = load_rows(q_ptr, stride_qn, count, BLOCK_N, D0, D1, True)
    rms = tl.zeros([BLOCK_N], tl.float32)
    if weight_ptr is not None:
        q0, q1, rms = normalise(q0, q1, weight_ptr, EPS, D0, D1)
        store_rows(normal_ptr + (head * queries + n) * dim, dim, q0, q1, count, BLOCK_N, D0, D1)
    q0, q1 = scaled(q0, q1, D0, D1)
    do_ptr += b * stride_dob + h * stride_doh + n * stride_don
    do0, do1 = load_rows(do_ptr, stride_don, count, BLOCK_N, D0, D1, True)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
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
            tl.store(dweight_ptr + D0 + tl.arange(0, D1), tl.sum(acc1 * x1, 0))
            acc1 *= w1
            along += tl.sum(acc1 * x1, 1)
        # Zhang & Sennrich, arXiv 1910.07467: what changes the length of q changes nothing
        along /= dim
        acc0 = rms[:, None] * (acc0 - x0 * along[:, None])
        if D1 > 0:
            acc1 = rms[:, None] * (acc1 - x1 * along[:, None])
    store_rows(dq_ptr + out, heads * dim, acc0, acc1, count, BLOCK_N, D0, D1)


@triton.jit
def dkv_tile(
    tile, split, b, h, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, row_ptr, lengths_ptr, gates_ptr, dk_ptr, dv_ptr,
    queries, span, stride_don, stride_qn, stride_kn, stride_vn,
    WIDTH: tl.constexpr, RUNS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, KEYS: tl.constexpr,
    STREAMS: tl.constexpr, BLOCK_N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """dk and dv of WIDTH keys of one stream. A row depends on its own key alone, so only the store is masked."""
    dim: tl.constexpr = D0 + D1
    wide: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    stream, first, start, size = 0, 0, 0, 0
    for r in tl.static_range(FIRST, LAST):
        if tile >= RUNS[r][0]:
            stream, first, size = RUNS[r][1], RUNS[r][2], RUNS[r][3]
            start = RUNS[r][4] + (tile - RUNS[r][0]) * WIDTH
    heads = tl.num_programs(1)
    length = size
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b * STREAMS + stream), size).to(tl.int32)
    gate = 1.0
    if gates_ptr is not None:
        gate = tl.load(gates_ptr + (b * STREAMS + stream) * heads + h).to(tl.float32)
    key = tl.cast(first + start, tl.int64)
    k0, k1 = load_rows(k_ptr + key * stride_kn, stride_kn, length - start, WIDTH, D0, D1, True)
    v0, v1 = load_rows(v_ptr + key * stride_vn, stride_vn, length - start, WIDTH, D0, D1, True)
    per_row = ((b * heads + h) * STREAMS + stream) * queries
    lse_ptr += per_row
    row_ptr += per_row
    dk0, dk1 = zero_rows(WIDTH, D0, D1)
    dv0, dv1 = zero_rows(WIDTH, D0, D1)
    begin = split * span
    # a tile without a valid key has no queries to walk
    end = tl.where(start < length, tl.minimum(begin + span, queries), begin)
    for n in range(begin, end, BLOCK_N):
        at, count = tl.cast(n, tl.int64), queries - n
        rows = tl.arange(0, BLOCK_N)
        q0, q1 = load_rows(q_ptr + at * stride_qn, stride_qn, count, BLOCK_N, D0, D1, True)
        q0, q1 = scaled(q0, q1, D0, D1)
        lse = tl.load(lse_ptr + n + rows, mask=rows < count, other=float("inf"))
        # the forward's own product in fp32: its logits to the bit, so that p sums to 1 however large they are
        if wide:
            s = tl.trans(dot_rows(q0, q1, k0, k1, D1))
        else:
            s = dot_rows(k0, k1, q0, q1, D1)
        p = exp_minus(s, lse[None, :], dim, wide)
        do0, do1 = load_rows(do_ptr + at * stride_don, stride_don, count, BLOCK_N, D0, D1, True)
        dv0, dv1 = add_dot(dv0, dv1, p, do0, do1, D1)
        dp = dot_rows(v0, v1, do0, do1, D1)
        row = tl.load(row_ptr + n + rows, mask=rows < count, other=0.0)
        dk0, dk1 = add_dot(dk0, dk1, p * (gate * dp - row[None, :]), q0, q1, D1)
    # keys beyond the length: zeros, whatever was computed
    rows = tl.arange(0, WIDTH)[:, None]
    there = rows < length - start
    factor: tl.constexpr = 1.0 if wide else dim**-0.5
    dk0, dv0 = tl.where(there, dk0 * factor, 0.0), tl.where(there, dv0 * gate, 0.0)
    if D1 > 0:
        dk1, dv1 = tl.where(there, dk1 * factor, 0.0), tl.where(there, dv1 * gate, 0.0)
    out = (((split * tl.num_programs(2) + b) * KEYS + key) * heads + h) * dim
    store_rows(dk_ptr + out, heads * dim, dk0, dk1, size - start, WIDTH, D0, D1)
    store_rows(dv_ptr + out, heads * dim, dv0, dv1, size - start, WIDTH, D0, D1)


@triton.jit
def dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, row_ptr, lengths_ptr, gates_ptr, dk_ptr, dv_ptr, queries, span,
    stride_dob, stride_don, stride_doh, stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    GROUPS: tl.constexpr, RUNS: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr,
    STREAMS: tl.constexpr, BLOCK_N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """GROUPS, RUNS: see `key_groups`. dk, dv: `[SPLITS, B, KEYS, H, D]`. q is normalised already."""
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    do_ptr += b * stride_dob + h * stride_doh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    for g in tl.static_range(COUNT):
        if (tile >= GROUPS[g][1]) & (tile < GROUPS[g][2]):
            dkv_tile(
                tile, split, b, h, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, row_ptr, lengths_ptr, gates_ptr,
                dk_ptr, dv_ptr, queries, span, stride_don, stride_qn, stride_kn, stride_vn,
                GROUPS[g][0], RUNS, GROUPS[g][3], GROUPS[g][4], KEYS, STREAMS, BLOCK_N, D0, D1,
            )  # fmt: skip


@triton.jit
def column_sums(source, target, program, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over the rows of a `[rows, columns]` matrix, of BLOCK_C columns."""
    c = program.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)[:, None]
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        at = (start + r).to(tl.int64) * columns + c[None, :]
        acc += tl.load(source + at, mask=(start + r < rows) & (c < columns)[None, :], other=0.0)
    tl.store(target + c, tl.sum(acc, 0).to(target.dtype.element_ty), mask=c < columns)


@triton.jit
def sums_kernel(
    dk_part, dk_ptr, dv_part, dv_ptr, dgates_part, dgates_ptr, dweight_part, dweight_ptr,
    splits, values, tiles, gates, partials,
    VALUES: tl.constexpr, GATES: tl.constexpr, WEIGHTS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """VALUES programs for dk, VALUES for dv, then GATES and WEIGHTS for dgates and dweight."""
    program = tl.program_id(0)
    if VALUES > 0:
        if program < VALUES:
            column_sums(dk_part, dk_ptr, program, splits, values, 1, 1024)
        elif program < 2 * VALUES:
            column_sums(dv_part, dv_ptr, program - VALUES, splits, values, 1, 1024)
    if GATES > 0:
        if (program >= 2 * VALUES) & (program < 2 * VALUES + GATES):
            column_sums(dgates_part, dgates_ptr, program - 2 * VALUES, tiles, gates, 1, 1024)
    if WEIGHTS > 0:
        if program >= 2 * VALUES + GATES:
            column_sums(dweight_part, dweight_ptr, program - 2 * VALUES - GATES, partials, DIM, 256, 16)


def key_groups(sizes: list[int], block_m: int) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Key tiles by width, widest first. A group: width, its first tile, the tile after its last; its runs likewise.

    A run is a stretch of equal tiles of one stream: first tile, stream, its first key, its size, the run's first token.
    """
    stretches: dict[int, list[tuple[int, ...]]] = {}
    for s, (first, size, high, low, _) in enumerate(stream_tiles(sizes, block_m)):
        token = 0
        for width, count in ((block_m, size // block_m), (high, 1), (low, 1)):
            if width and count:
                stretches.setdefault(width, []).append((count, s, first, size, token))
                token += count * width
    groups, runs, tile = [], [], 0
    for width in sorted(stretches, reverse=True):
        begin, first_run = tile, len(runs)
        for count, *run in stretches[width]:
            runs.append((tile, *run))
            tile += count
        groups.append((width, begin, tile, first_run, len(runs)))
    return tuple(groups), tuple(runs)


def plan_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor,
    dlse: Tensor | None,
    sizes: list[int],
    lengths: Tensor | None,
    gates: Tensor | None,
    q_weight: Tensor | None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Launches, and what they write: dq, dk, dv, dgates, dweight (empty where there is none). Works on meta tensors."""
    sizes = list(sizes)
    batch, queries, heads, dim = q.shape
    streams, keys = len(sizes), sum(sizes)
    do, q, k, v = dense(do), dense(q), dense(k), dense(v)
    o, dlse, lengths, gates, q_weight = contiguous(o, dlse, lengths, gates, q_weight)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    dq, dk, dv = new(*q.shape, dtype=q.dtype), new(*k.shape, dtype=k.dtype), new(*k.shape, dtype=v.dtype)
    dgates = new(0, dtype=q.dtype) if gates is None else new(*gates.shape, dtype=gates.dtype)
    dweight = new(0, dtype=q.dtype) if q_weight is None else new(*q_weight.shape, dtype=q_weight.dtype)
    outputs = dq, dk, dv, dgates, dweight
    if q.numel() == 0:
        return [], tuple(output.zero_() for output in outputs)

    row, blocks = settings("dq", q), split_dim(dim)
    block_n, warps = query_tile(row, q)
    tiles = triton.cdiv(queries, block_n)
    normal = None if q_weight is None else new(batch, heads, queries, dim, dtype=q.dtype).transpose(1, 2)
    rows = new(batch, heads, streams, queries)
    dgates_part = None if gates is None else new(tiles, batch, streams, heads)
    dweight_part = None if q_weight is None else new(batch * heads * tiles, dim)
    tiled = stream_tiles(sizes, row["block_m"])
    o = o if streams == 1 and gates is None and not tiled[0][4] else None
    shared = {"do_ptr": do, "k_ptr": k, "v_ptr": v, "lse_ptr": lse, "lengths_ptr": lengths, "gates_ptr": gates}
    arguments = {
        **shared, "q_ptr": q, "o_ptr": o, "dlse_ptr": dlse,
        "weight_ptr": q_weight, "dq_ptr": dq, "normal_ptr": normal, "row_ptr": rows, "dgates_ptr": dgates_part,
        "dweight_ptr": dweight_part, "queries": queries, **strides(do=do, q=q, k=k, v=v),
    }  # fmt: skip
    constants = {
        "TILES": tiled, "STREAMS": streams, "EPS": RMS_EPS,
        "BLOCK_N": block_n, "BLOCK_M": row["block_m"], **blocks,
    }  # fmt: skip
    plan = [Launch(dq_kernel, (tiles, heads, batch), arguments, constants, warps, row["stages"])]

    row, q = settings("dkv", q), q if normal is None else normal
    groups, runs = key_groups(sizes, row["block_m"])
    block_n = min(row["block_n"], max(16, triton.next_power_of_2(queries)))
    splits = max(1, min(PROCESSORS // (groups[-1][2] * heads * batch), triton.cdiv(queries, block_n)))
    span = triton.cdiv(triton.cdiv(queries, block_n), splits) * block_n
    parts = (dk, dv) if splits == 1 else (new(splits, *k.shape), new(splits, *k.shape))
    arguments = {
        **shared, "q_ptr": q, "row_ptr": rows, "dk_ptr": parts[0], "dv_ptr": parts[1],
        "queries": queries, "span": span, **strides(do=do, q=q, k=k, v=v),
    }  # fmt: skip
    constants = {
        "GROUPS": groups, "RUNS": runs, "COUNT": len(groups), "SPLITS": splits, "KEYS": keys, "STREAMS": streams,
        "BLOCK_N": block_n, **blocks,
    }  # fmt: skip
    grid = (groups[-1][2] * splits, heads, batch)
    plan.append(Launch(dkv_kernel, grid, arguments, constants, row["warps"], row["stages"]))

    values = triton.cdiv(k.numel(), 1024) if splits > 1 else 0
    counts = values, 0 if gates is None else triton.cdiv(gates.numel(), 1024), 0 if q_weight is None else dim // 16
    if any(counts):
        pairs = {
            "dk": (parts[0], dk) if values else (None, None), "dv": (parts[1], dv) if values else (None, None),
            "dgates": (dgates_part, None if gates is None else dgates),
            "dweight": (dweight_part, None if q_weight is None else dweight),
        }  # fmt: skip
        arguments = {f"{name}_part": part for name, (part, _) in pairs.items()}
        arguments |= {f"{name}_ptr": target for name, (_, target) in pairs.items()}
        arguments |= {"splits": splits, "values": k.numel(), "tiles": tiles}
        arguments |= {"gates": dgates.numel(), "partials": batch * heads * tiles}
        constants = dict(zip(("VALUES", "GATES", "WEIGHTS"), counts)) | {"DIM": dim}
        plan.append(Launch(sums_kernel, (2 * counts[0] + counts[1] + counts[2],), arguments, constants, 4))
    return plan, outputs


def backward(do, q, k, v, o, lse, dlse, sizes, lengths, gates, q_weight) -> tuple[Tensor, ...]:
    launches, outputs = plan_backward(do, q, k, v, o, lse, dlse, sizes, lengths, gates, q_weight)
    with torch.cuda.device_of(q):
        launch.run(launches)
    return outputs


def specimens() -> Iterator[tuple[str, list[Launch]]]:
    """Labelled launches of every kernel, head dim and ladder row, planned on the meta device, to be compiled."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = {"257": (257,), "256": (256,), "2048": (2048,)}
    cases = [(dim, name, bf16, 16, {}) for dim, name in zip(HEAD_DIMS, 2 * list(shapes))]
    cases += [(dim, "77+257", bf16, 16, {"ragged"}) for dim in HEAD_DIMS]
    cases += [(64, "77+257", bf16, 16, set()), (64, "257", bf16, 1, {"lse"}), (128, "257", bf16, 1, {"lse"})]
    cases += [(64, "257", fp16, 16, {}), (64, "257", fp32, 16, {}), (128, "77+257", fp32, 16, {"ragged"})]
    for dim, name, dtype, batch, extra in cases:
        heads, queries, sizes = 12, 256, [int(size) for size in name.split("+")]

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q = new(batch, queries, heads, dim, dtype=dtype)
        k, v = new(batch, sum(sizes), 2, heads, dim, dtype=dtype).unbind(2)
        ragged = "ragged" in extra
        lengths = new(batch, len(sizes), dtype=torch.int32) if ragged else None
        gates = new(batch, len(sizes), heads) if ragged else None
        weight = None if "lse" in extra else new(dim)
        launches, (o, lse) = plan_forward(q, k, v, sizes, lengths, gates, weight)
        dlse = lse if "lse" in extra else None
        launches += plan_backward(o, q, k, v, o, lse, dlse, sizes, lengths, gates, weight)[0]
        label = " ".join(["cross_attention", f"D={dim} M={name} B={batch}", str(dtype).removeprefix("torch."), *extra])
        yield label, launches
