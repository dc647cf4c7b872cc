"""Forward of `attention_columns` in Triton: one program per (query tile, head, sample), which gathers its keys.

Nothing is computed of other tokens: D operations per query, head and chosen token, q and lse read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import replay
from semantica.kernels.attention_columns.tiles import load_chosen, load_tokens
from semantica.kernels.attention_moments.tiles import load_queries, map_tile, near, rows_of, settings
from semantica.kernels.cross_attention.tiles import (
    GRID_LIMIT,
    aligned,
    alignment,
    contiguous,
    query_tile,
    split_dim,
    strides,
)
from semantica.kernels.launch import Launch


@triton.jit
def columns_kernel(
    q_ptr, k_ptr, lse_ptr, tokens_ptr, lengths_ptr, out_ptr, queries, keys, count,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_lb, stride_lh, stride_tb,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    stride_qn, stride_kn = aligned(stride_qn, ALIGN), aligned(stride_kn, ALIGN)
    h, b, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    n = tl.program_id(0) * BLOCK_N
    rows, lanes = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_T)[None, :]
    q0, q1, lse = load_queries(
        q_ptr + aligned(b * stride_qb + h * stride_qh, ALIGN), lse_ptr + b * stride_lb + h * stride_lh,
        stride_qn, n, queries - n, BLOCK_N, D0, D1,
    )  # fmt: skip
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    out_ptr += ((b * heads + h) * queries + n) * count
    for t in range(0, count, BLOCK_T):
        tokens, there = load_tokens(tokens_ptr + b * stride_tb, lengths_ptr, b, t, count, keys, BLOCK_T)
        k0, k1 = load_chosen(k_ptr, stride_kn, tokens, there, D0, D1)
        p = tl.where(there[None, :], map_tile(q0, q1, k0, k1, lse, 0, False, D0, D1), 0.0)
        tl.store(out_ptr + rows * count + t + lanes, p, mask=(rows < queries - n) & (t + lanes < count))


def plan_forward(q, k, lse, tokens, lengths) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Launches, and the columns `[B, H, N, T]` that they write. Works on meta tensors."""
    batch, queries, heads, dim = q.shape
    if max(batch, heads) > GRID_LIMIT:
        raise ValueError(f"q {tuple(q.shape)} = [B, N, H, D]: at most {GRID_LIMIT} samples or heads fit one launch")
    q, k = near(q), near(k)
    (lse, lse_strides), (tokens, lengths) = rows_of(q, lse), contiguous(tokens, lengths)
    count = tokens.shape[1]
    out = torch.empty((batch, heads, queries, count), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return [], (out,)
    row = settings("attention_columns", "forward", q)
    block_n, warps = query_tile(row, q)
    arguments = {"q_ptr": q, "k_ptr": k, "lse_ptr": lse, "tokens_ptr": tokens, "lengths_ptr": lengths, "out_ptr": out}
    arguments |= {"queries": queries, "keys": k.shape[1], "count": count, **strides(q=q, k=k), **lse_strides}
    arguments["stride_tb"] = count if tokens.shape[0] > 1 else 0
    block_t = min(row["block_t"], max(16, triton.next_power_of_2(count)))
    constants = {"BLOCK_N": block_n, "BLOCK_T": block_t, **split_dim(dim), "ALIGN": alignment(q, k)}
    grid = (triton.cdiv(queries, block_n), heads, batch)
    return [Launch(columns_kernel, grid, arguments, constants, warps, row["stages"])], (out,)


def forward(q, k, lse, tokens, lengths) -> Tensor:
    return replay.run(plan_forward, (q, k, lse, tokens, lengths))[1][0]
