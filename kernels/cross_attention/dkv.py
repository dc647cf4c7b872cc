"""The second launch of the backward of `cross_attention`: dk and dv; see `backward`."""

import triton
import triton.language as tl

from semantica.kernels.cross_attention.tiles import (
    add_dot,
    aligned,
    dot_rows,
    exp_minus,
    load_rows,
    scaled,
    store_rows,
    stream_tiles,
    zero_rows,
)


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
    STREAMS: tl.constexpr, BLOCK_N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """GROUPS, RUNS: see `key_groups`. dk, dv: `[SPLITS, B, KEYS, H, D]`. q is normalised already."""
    stride_don, stride_qn = aligned(stride_don, ALIGN), aligned(stride_qn, ALIGN)
    stride_kn, stride_vn = aligned(stride_kn, ALIGN), aligned(stride_vn, ALIGN)
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    do_ptr += aligned(b * stride_dob + h * stride_doh, ALIGN)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    for g in tl.static_range(COUNT):
        if (tile >= GROUPS[g][1]) & (tile < GROUPS[g][2]):
            dkv_tile(
                tile, split, b, h, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, row_ptr, lengths_ptr, gates_ptr,
                dk_ptr, dv_ptr, queries, span, stride_don, stride_qn, stride_kn, stride_vn,
                GROUPS[g][0], RUNS, GROUPS[g][3], GROUPS[g][4], KEYS, STREAMS, BLOCK_N, D0, D1,
            )  # fmt: skip


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
