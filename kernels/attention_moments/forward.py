"""Forward of `attention_moments` in Triton: one program per (key tile, block of features, head, sample).

It is the value gradient of attention with the features for its cotangents: a program keeps its keys and walks the
queries, P^T is made tile by tile in registers and multiplied there. Operations per query, key and head: D for the
logits, once for each block of features (one, of up to 64), and F. Keys are few (77 to 2048): where their tiles do not
fill the processors, the queries are split into partial sums, added in order by a second launch.
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
    near,
    plan_sum,
    query_splits,
    rows_of,
    settings,
    store_block,
    transposed_map_tile,
)
from semantica.kernels.cross_attention.tiles import (
    GRID_LIMIT,
    aligned,
    alignment,
    contiguous,
    dense,
    load_rows,
    split_dim,
    strides,
)
from semantica.kernels.launch import Launch


@triton.jit
def moments_tile(
    q_ptr, k_ptr, lse_ptr, f_ptr, out_ptr, start, length, size, begin, end, queries, column,
    stride_qn, stride_kn, stride_fn,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, TF32: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Moments of WIDTH keys, of BLOCK_F features."""
    key = tl.cast(start, tl.int64)
    k0, k1 = load_rows(k_ptr + key * stride_kn, stride_kn, length - start, WIDTH, D0, D1, True)
    acc = tl.zeros([WIDTH, BLOCK_F], tl.float32)
    # a tile without a valid key has no queries to walk
    for n in range(begin, tl.where(start < length, end, begin), BLOCK_N):
        q0, q1, lse = load_queries(q_ptr, lse_ptr, stride_qn, n, queries - n, BLOCK_N, D0, D1)
        p = transposed_map_tile(q0, q1, k0, k1, lse, D0, D1)
        f = load_block(f_ptr, stride_fn, n, queries - n, column, BLOCK_N, BLOCK_F, FEATURES)
        acc = dot_features(p.to(f.dtype), f, acc, TF32)
    there = tl.arange(0, WIDTH)[:, None] < length - start
    # keys beyond the length: zeros, whatever was computed
    acc = tl.where(there, acc, 0.0)
    store_block(out_ptr + key * FEATURES, FEATURES, acc, size - start, column, WIDTH, BLOCK_F, FEATURES)


@triton.jit
def moments_kernel(
    q_ptr, k_ptr, lse_ptr, f_ptr, out_ptr, lengths_ptr, queries, keys, span, splits,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_lb, stride_lh, stride_fb, stride_fn,
    SPANS: tl.constexpr, COUNT: tl.constexpr, TILES: tl.constexpr, FEATURES: tl.constexpr, TF32: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """SPANS: see `key_spans`; TILES in all. out: `[splits, B, H, keys, FEATURES]`."""
    stride_qn, stride_kn = aligned(stride_qn, ALIGN), aligned(stride_kn, ALIGN)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile, rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    split, column = rest % splits, rest // splits * BLOCK_F
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b), keys).to(tl.int32)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    lse_ptr += b * stride_lb + h * stride_lh
    f_ptr += b * stride_fb
    out_ptr += ((split * tl.num_programs(2) + b) * tl.num_programs(1) + h) * keys * FEATURES
    begin = split * span
    end = tl.minimum(begin + span, queries)
    for g in tl.static_range(COUNT):
        if (tile >= SPANS[g][1]) & (tile < SPANS[g][2]):
            moments_tile(
                q_ptr, k_ptr, lse_ptr, f_ptr, out_ptr, SPANS[g][3] + (tile - SPANS[g][1]) * SPANS[g][0],
                length, keys, begin, end, queries, column, stride_qn, stride_kn, stride_fn,
                SPANS[g][0], FEATURES, TF32, BLOCK_N, BLOCK_F, D0, D1,
            )  # fmt: skip


def plan_forward(q, k, lse, features, lengths) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Launches, and the moments `[B, H, M, F]` that they write. Works on meta tensors."""
    batch, queries, heads, dim = q.shape
    keys, count = k.shape[1], features.shape[-1]
    if max(batch, heads) > GRID_LIMIT:
        raise ValueError(f"q {tuple(q.shape)} = [B, N, H, D]: at most {GRID_LIMIT} samples or heads fit one launch")
    q, k, features = near(q), near(k), dense(features)
    (lse, lse_strides), (lengths,) = rows_of(q, lse), contiguous(lengths)
    out = torch.empty((batch, heads, keys, count), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return [], (out.zero_(),)
    row = settings("attention_moments", "forward", q)
    spans = key_spans(keys, row["block_m"])
    block_f, block_n = feature_block(row, count), min(row["block_n"], max(16, triton.next_power_of_2(queries)))
    programs = spans[-1][2] * triton.cdiv(count, block_f)
    splits, span = query_splits(queries, block_n, programs * heads * batch)
    parts = out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
    arguments = {"q_ptr": q, "k_ptr": k, "lse_ptr": lse, "f_ptr": features, "out_ptr": parts, "lengths_ptr": lengths}
    arguments |= {"queries": queries, "keys": keys, "span": span, "splits": splits, **strides(q=q, k=k), **lse_strides}
    arguments |= {"stride_fb": features.stride(0) if features.shape[0] > 1 else 0, "stride_fn": features.stride(1)}
    constants = {"SPANS": spans, "COUNT": len(spans), "TILES": spans[-1][2], "FEATURES": count}
    constants |= {"TF32": features.dtype != q.dtype, "BLOCK_N": block_n, "BLOCK_F": block_f, **split_dim(dim)}
    constants["ALIGN"] = alignment(q, k)
    grid = (programs * splits, heads, batch)
    plan = [Launch(moments_kernel, grid, arguments, constants, row["warps"], row["stages"])]
    return plan + plan_sum(parts, out), (out,)


def forward(q, k, lse, features, lengths) -> Tensor:
    return replay.run(plan_forward, (q, k, lse, features, lengths))[1][0]
