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

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import replay
from semantica.kernels.cross_attention.dkv import dkv_kernel, key_groups
from semantica.kernels.cross_attention.dq import dq_kernel
from semantica.kernels.cross_attention.op import RMS_EPS
from semantica.kernels.cross_attention.tiles import (
    PROCESSORS,
    alignment,
    contiguous,
    dense,
    query_tile,
    settings,
    split_dim,
    stream_tiles,
    strides,
)
from semantica.kernels.launch import Launch


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


def plan_backward(
    do, q, k, v, o, lse, dlse, sizes, lengths, gates, q_weight
) -> tuple[list[Launch], tuple[Tensor, ...]]:
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
    arguments = {**shared, "q_ptr": q, "o_ptr": o, "dlse_ptr": dlse, "weight_ptr": q_weight, "dq_ptr": dq}
    arguments |= {"normal_ptr": normal, "row_ptr": rows, "dgates_ptr": dgates_part, "dweight_ptr": dweight_part}
    arguments |= {"queries": queries, **strides(do=do, q=q, k=k, v=v)}
    constants = {"TILES": tiled, "STREAMS": streams, "EPS": RMS_EPS, "BLOCK_N": block_n, "BLOCK_M": row["block_m"]}
    constants |= blocks | {"ALIGN": alignment(do, q, k, v)}
    plan = [Launch(dq_kernel, (tiles, heads, batch), arguments, constants, warps, row["stages"])]

    row, q = settings("dkv", q), q if normal is None else normal
    groups, runs = key_groups(sizes, row["block_m"])
    block_n = min(row["block_n"], max(16, triton.next_power_of_2(queries)))
    splits = max(1, min(PROCESSORS // (groups[-1][2] * heads * batch), triton.cdiv(queries, block_n)))
    span = triton.cdiv(triton.cdiv(queries, block_n), splits) * block_n
    parts = (dk, dv) if splits == 1 else (new(splits, *k.shape), new(splits, *k.shape))
    arguments = {**shared, "q_ptr": q, "row_ptr": rows, "dk_ptr": parts[0], "dv_ptr": parts[1]}
    arguments |= {"queries": queries, "span": span, **strides(do=do, q=q, k=k, v=v)}
    constants = {"GROUPS": groups, "RUNS": runs, "COUNT": len(groups), "SPLITS": splits, "KEYS": keys}
    constants |= {"STREAMS": streams, "BLOCK_N": block_n, **blocks}
    constants["ALIGN"] = alignment(do, q, k, v)
    grid = (groups[-1][2] * splits, heads, batch)
    plan.append(Launch(dkv_kernel, grid, arguments, constants, row["warps"], row["stages"]))

    values = triton.cdiv(k.numel(), 1024) if splits > 1 else 0
    counts = values, 0 if gates is None else triton.cdiv(gates.numel(), 1024), 0 if q_weight is None else -(-dim // 16)
    if any(counts):
        pairs = {"dk": (parts[0], dk), "dv": (parts[1], dv)} if values else dict.fromkeys(("dk", "dv"), (None, None))
        pairs["dgates"] = dgates_part, None if gates is None else dgates
        pairs["dweight"] = dweight_part, None if q_weight is None else dweight
        arguments = {f"{name}_part": part for name, (part, _) in pairs.items()}
        arguments |= {f"{name}_ptr": target for name, (_, target) in pairs.items()}
        arguments |= {"splits": splits, "values": k.numel(), "tiles": tiles}
        arguments |= {"gates": dgates.numel(), "partials": batch * heads * tiles}
        constants = dict(zip(("VALUES", "GATES", "WEIGHTS"), counts)) | {"DIM": dim}
        plan.append(Launch(sums_kernel, (2 * counts[0] + counts[1] + counts[2],), arguments, constants, 4))
    return plan, outputs


def backward(do, q, k, v, o, lse, dlse, sizes, lengths, gates, q_weight) -> tuple[Tensor, ...]:
    arguments = do, q, k, v, o, lse, dlse, tuple(sizes), lengths, gates, q_weight
    return tuple(replay.run(plan_backward, arguments)[1])
