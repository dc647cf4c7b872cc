"""Backward of `attention_columns` in Triton: no atomics, every sum in a fixed order.

With dS = P * dC of the chosen tokens: dq = dS k_t / sqrt(D), dlse = -row sums of dS, dk_t = dS^T q / sqrt(D).
1. `columns_dq_kernel`, one program per (query tile, head, sample): dq and dlse.
2. `columns_dk_kernel`, one program per (token tile, part of the queries, head, sample): partial dk_t in fp32.
3. `columns_place_kernel`, one program per (key, block of heads and dims, sample): a key's partial sums added in order,
   each time that it was chosen; zeros for the other keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import replay
from semantica.kernels.attention_columns.tiles import load_chosen, load_tokens
from semantica.kernels.attention_moments.tiles import (
    load_queries,
    map_tile,
    near,
    query_splits,
    rows_of,
    settings,
    transposed_map_tile,
)
from semantica.kernels.cross_attention.tiles import (
    add_dot,
    aligned,
    alignment,
    contiguous,
    query_tile,
    split_dim,
    store_rows,
    strides,
    zero_rows,
)
from semantica.kernels.launch import Launch


@triton.jit
def columns_dq_kernel(
    dc_ptr, q_ptr, k_ptr, lse_ptr, tokens_ptr, lengths_ptr, dq_ptr, dlse_ptr, queries, keys, count,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_lb, stride_lh, stride_tb,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dc: `[B, H, N, T]`."""
    stride_qn, stride_kn = aligned(stride_qn, ALIGN), aligned(stride_kn, ALIGN)
    dim: tl.constexpr = D0 + D1
    h, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    n = tl.program_id(0) * BLOCK_N
    rows, lanes = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_T)[None, :]
    q0, q1, lse = load_queries(
        q_ptr + aligned(b * stride_qb + h * stride_qh, ALIGN), lse_ptr + b * stride_lb + h * stride_lh,
        stride_qn, n, queries - n, BLOCK_N, D0, D1,
    )  # fmt: skip
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    dc_ptr += ((b * heads + h) * queries + n) * count
    acc0, acc1 = zero_rows(BLOCK_N, D0, D1)
    total = tl.zeros([BLOCK_N], tl.float32)
    for t in range(0, count, BLOCK_T):
        tokens, there = load_tokens(tokens_ptr + b * stride_tb, lengths_ptr, b, t, count, keys, BLOCK_T)
        k0, k1 = load_chosen(k_ptr, stride_kn, tokens, there, D0, D1)
        p = tl.where(there[None, :], map_tile(q0, q1, k0, k1, lse, 0, False, D0, D1), 0.0)
        inside = (rows < queries - n) & (t + lanes < count)
        ds = p * tl.load(dc_ptr + rows * count + t + lanes, mask=inside, other=0.0)
        acc0, acc1 = add_dot(acc0, acc1, ds, k0, k1, D1)
        total += tl.sum(ds, 1)
    row = tl.arange(0, BLOCK_N)
    tl.store(dlse_ptr + (b * heads + h) * queries + n + row, -total, mask=row < queries - n)
    acc0 *= dim**-0.5
    if D1 > 0:
        acc1 *= dim**-0.5
    store_rows(dq_ptr + ((b * queries + n) * heads + h) * dim, heads * dim, acc0, acc1, queries - n, BLOCK_N, D0, D1)


@triton.jit
def columns_dk_kernel(
    dc_ptr, q_ptr, k_ptr, lse_ptr, tokens_ptr, lengths_ptr, part_ptr, queries, keys, count, span, splits,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_lb, stride_lh, stride_tb,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """part: `[splits, B, T, H, D]`."""
    stride_qn, stride_kn = aligned(stride_qn, ALIGN), aligned(stride_kn, ALIGN)
    dim: tl.constexpr = D0 + D1
    # fp32 queries come scaled
    factor: tl.constexpr = 1.0 if q_ptr.dtype.element_ty == tl.float32 else dim**-0.5
    h, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    split, t = tl.program_id(0) % splits, tl.program_id(0) // splits * BLOCK_T
    tokens, there = load_tokens(tokens_ptr + b * stride_tb, lengths_ptr, b, t, count, keys, BLOCK_T)
    k0, k1 = load_chosen(k_ptr + aligned(b * stride_kb + h * stride_kh, ALIGN), stride_kn, tokens, there, D0, D1)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    lse_ptr += b * stride_lb + h * stride_lh
    dc_ptr += (b * heads + h) * queries * count
    lanes, columns = t + tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_N)[None, :]
    acc0, acc1 = zero_rows(BLOCK_T, D0, D1)
    begin = split * span
    for n in range(begin, tl.minimum(begin + span, queries), BLOCK_N):
        q0, q1, lse = load_queries(q_ptr, lse_ptr, stride_qn, n, queries - n, BLOCK_N, D0, D1)
        p = tl.where(there[:, None], transposed_map_tile(q0, q1, k0, k1, lse, D0, D1), 0.0)
        inside = (columns < queries - n) & (lanes < count)
        at = tl.cast(n, tl.int64) * count + columns * count + lanes
        acc0, acc1 = add_dot(acc0, acc1, p * tl.load(dc_ptr + at, mask=inside, other=0.0), q0, q1, D1)
    acc0 *= factor
    if D1 > 0:
        acc1 *= factor
    part_ptr += (((split * tl.num_programs(2) + b) * count + t) * heads + h) * dim
    store_rows(part_ptr, heads * dim, acc0, acc1, count - t, BLOCK_T, D0, D1)


@triton.jit
def columns_place_kernel(
    part_ptr, tokens_ptr, dk_ptr, keys, count, splits, width, stride_tb, samples, BLOCK: tl.constexpr
):  # fmt: skip
    """width: heads times dims."""
    key, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for t in range(count):
        if tl.load(tokens_ptr + b * stride_tb + t) == key:
            for split in range(splits):
                at = ((split * samples + b) * count + t) * width
                acc += tl.load(part_ptr + at + columns, mask=columns < width, other=0.0)
    tl.store(dk_ptr + (b * keys + key) * width + columns, acc.to(dk_ptr.dtype.element_ty), mask=columns < width)


def plan_backward(dc, q, k, lse, tokens, lengths, needs) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Launches, and what they write: dq, dlse, dk (empty where not needed). Works on meta tensors."""
    batch, queries, heads, dim = q.shape
    q, k = near(q), near(k)
    (lse, lse_strides), (dc, tokens, lengths) = rows_of(q, lse), contiguous(dc, tokens, lengths)
    count = tokens.shape[1]

    def new(like: Tensor, need: bool) -> Tensor:
        return torch.empty(like.shape if need else (0,), dtype=like.dtype, device=q.device)

    dq, dlse, dk = outputs = new(q, needs[0]), new(lse, needs[0]), new(k, needs[1])
    if q.numel() == 0:
        return [], tuple(output.zero_() for output in outputs)
    shared = {"dc_ptr": dc, "q_ptr": q, "k_ptr": k, "lse_ptr": lse, "tokens_ptr": tokens, "lengths_ptr": lengths}
    shared |= {"queries": queries, "keys": k.shape[1], "count": count, **strides(q=q, k=k), **lse_strides}
    shared["stride_tb"] = count if tokens.shape[0] > 1 else 0
    fixed, plan = {**split_dim(dim), "ALIGN": alignment(q, k)}, []
    lanes = max(16, triton.next_power_of_2(count))
    if needs[0]:
        row = settings("attention_columns", "dq", q)
        block_n, warps = query_tile(row, q)
        constants = {**fixed, "BLOCK_N": block_n, "BLOCK_T": min(row["block_t"], lanes)}
        grid = (triton.cdiv(queries, block_n), heads, batch)
        arguments = {**shared, "dq_ptr": dq, "dlse_ptr": dlse}
        plan.append(Launch(columns_dq_kernel, grid, arguments, constants, warps, row["stages"]))
    if needs[1]:
        row = settings("attention_columns", "dk", q)
        block_n, block_t = min(row["block_n"], max(16, triton.next_power_of_2(queries))), min(row["block_t"], lanes)
        tiles = triton.cdiv(count, block_t)
        splits, span = query_splits(queries, block_n, tiles * heads * batch)
        part = torch.empty((splits, batch, count, heads, dim), dtype=torch.float32, device=q.device)
        constants = {**fixed, "BLOCK_N": block_n, "BLOCK_T": block_t}
        arguments = {**shared, "part_ptr": part, "span": span, "splits": splits}
        grid = (tiles * splits, heads, batch)
        plan.append(Launch(columns_dk_kernel, grid, arguments, constants, row["warps"], row["stages"]))
        arguments = {"part_ptr": part, "tokens_ptr": tokens, "dk_ptr": dk, "keys": k.shape[1], "count": count}
        arguments |= {"splits": splits, "width": heads * dim, "stride_tb": shared["stride_tb"], "samples": batch}
        grid = (k.shape[1], triton.cdiv(heads * dim, 1024), batch)
        plan.append(Launch(columns_place_kernel, grid, arguments, {"BLOCK": 1024}, 4))
    return plan, outputs


def backward(dc, q, k, lse, tokens, lengths, needs) -> list[Tensor]:
    return list(replay.run(plan_backward, (dc, q, k, lse, tokens, lengths, tuple(needs)))[1])
