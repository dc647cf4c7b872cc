"""group_norm in Triton, forward. How a tensor is cut into programs is in `tiles`.

y = act((x + addend - mean) * rstd * weight * (1 + scale) + bias * (1 + scale) + shift), mean and rstd of each (sample,
group). What is added to a channel moves its mean by as much, and costs nothing for each value.

Where a tile in registers holds whole groups, one launch reads x once (R + W). Otherwise: partial statistics of chunks;
then a second pass that merges them itself, always in the same order, or reads them merged by a launch of its own where
they are many. It runs backwards through memory, so that it begins with what the first pass has just left in the L2
cache: R + W from DRAM where x fits there, else towards 2R + W. No atomics: two runs are bit-equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import replay
from semantica.kernels.group_norm.tiles import (
    Sizes,
    added,
    affine,
    arranged,
    film_arguments,
    merge_groups,
    merge_rows,
    place,
    resident,
    restored,
    split,
    to_channels,
)
from semantica.kernels.launch import Launch, settings


@triton.jit
def activated(x, mean, factor, term, SILU: tl.constexpr):
    # the mean goes first: exact where |mean| >> std, unlike x * factor + (term - mean * factor)
    y = tl.fma(x - mean[:, None], factor[:, None], term[:, None])
    if SILU:
        y *= tl.sigmoid(y)
    return y


@triton.jit
def resident_kernel(
    x, y, mean, rstd, weight, bias, scale, shift, addend, scale_b, scale_c, shift_b, shift_c, addend_b, addend_c, eps,
    steps, chunk, splits,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr, SPAN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program per block of whole groups: x once in, y once out. mean, rstd: `[B, groups]`."""
    sample, unit, _, _, channels, exists, length, origin, offsets, _ = place(
        tl.program_id(0), steps, chunk, splits, CHANNELS, UNIT, WIDTH, LAST, STEP, LANES, SPAN
    )
    inside = exists[:, None] & (tl.arange(0, SPAN) < length)[None, :]
    value = tl.load(x + origin + offsets, inside, 0).to(tl.float32)
    average, m2, count = merge_rows(value, tl.zeros_like(value), inside.to(tl.float32))
    if addend is not None:
        average += added(addend, addend_b, addend_c, sample, channels, exists)
    average, m2, count = merge_groups(average, m2, count, GROUP, LANES, KINDS)
    inverse = tl.rsqrt(m2 / tl.maximum(count, 1.0) + eps)
    kind = tl.arange(0, KINDS)
    groups = sample * (CHANNELS // GROUP) + unit * (UNIT // GROUP) + kind
    tl.store(mean + groups, average, count > 0)
    tl.store(rstd + groups, inverse, count > 0)
    average, inverse = to_channels(average, GROUP, LANES, KINDS), to_channels(inverse, GROUP, LANES, KINDS)
    if addend is not None:
        average -= added(addend, addend_b, addend_c, sample, channels, exists)
    factor, term = affine(weight, bias, scale, shift, scale_b, scale_c, shift_b, shift_c, sample, channels, exists)
    result = activated(value, average, inverse * factor, term, SILU)
    tl.store(y + origin + offsets, result.to(y.dtype.element_ty), inside)


@triton.jit
def partial_kernel(
    x, partials, addend, addend_b, addend_c, rows, steps, chunk, splits,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean, M2 and count of every (group, chunk): partials `[3, rows = B * groups, parts * splits]`.

    STAGES: tiles in flight, 0 where a chunk is one tile.
    """
    sample, unit, part, piece, channels, exists, length, origin, offsets, step = place(
        tl.program_id(0), steps, chunk, splits, CHANNELS, UNIT, WIDTH, LAST, STEP, LANES, SPAN
    )
    s = tl.arange(0, SPAN)
    values = x + origin
    mean = tl.zeros((LANES, SPAN), tl.float32)
    m2 = tl.zeros((LANES, SPAN), tl.float32)
    if STAGES:
        # every lane keeps statistics of its own (Welford 1962), so that tiles cost no exchange between threads
        for i in tl.range(0, tl.cdiv(length, SPAN), num_stages=STAGES):
            inside = exists[:, None] & (s < length - i * SPAN)[None, :]
            value = tl.load(values + offsets, inside, 0).to(tl.float32)
            delta = tl.where(inside, value - mean, 0.0)
            mean = tl.fma(delta, 1.0 / (i + 1), mean)
            m2 = tl.fma(delta, value - mean, m2)
            values += step
    else:
        # one tile: each lane has seen one value, or none
        mean = tl.load(values + offsets, exists[:, None] & (s < length)[None, :], 0).to(tl.float32)
    count = tl.where(exists[:, None], tl.cdiv(tl.maximum(length - s, 0), SPAN)[None, :], 0).to(tl.float32)
    mean, m2, count = merge_rows(mean, m2, count)
    if addend is not None:
        mean += added(addend, addend_b, addend_c, sample, channels, exists)
    mean, m2, count = merge_groups(mean, m2, count, GROUP, LANES, KINDS)
    PARTS: tl.constexpr = (UNIT + WIDTH - 1) // WIDTH
    groups = sample * (CHANNELS // GROUP) + unit * (UNIT // GROUP) + tl.arange(0, KINDS)
    at = partials + groups * (PARTS * splits) + part * splits + piece
    plane = tl.cast(rows, tl.int64) * (PARTS * splits)
    tl.store(at, mean, count > 0)
    tl.store(at + plane, m2, count > 0)
    tl.store(at + 2 * plane, count, count > 0)


@triton.jit
def merge_kernel(partials, mean, rstd, eps, pieces, BLOCK: tl.constexpr):
    """Mean and 1 / std `[rows]` from partials `[3, rows, pieces]`."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    average = tl.zeros((1, BLOCK), tl.float32)
    m2 = tl.zeros((1, BLOCK), tl.float32)
    count = tl.zeros((1, BLOCK), tl.float32)
    plane = tl.cast(rows, tl.int64) * pieces
    for start in range(0, pieces, BLOCK):
        at = (partials + row * pieces + start + lane)[None, :]
        inside = (start + lane < pieces)[None, :]
        other = tl.load(at + 2 * plane, inside, 0)
        total = count + other
        share = other / tl.maximum(total, 1.0)
        delta = tl.load(at, inside, 0) - average
        average += delta * share
        m2 += tl.load(at + plane, inside, 0) + delta * delta * count * share
        count = total
    average, m2, count = merge_rows(average, m2, count)
    at = row + tl.arange(0, 1)
    tl.store(mean + at, average)
    tl.store(rstd + at, tl.rsqrt(m2 / count + eps))


@triton.jit
def apply_kernel(
    x, y, partials, mean, rstd, weight, bias, scale, shift, addend, scale_b, scale_c, shift_b, shift_c, addend_b,
    addend_c, eps, rows, pieces, steps, chunk, splits,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    SILU: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """y of every chunk. Merges partials `[3, rows, pieces]` itself, up to PIECES of them; 0: mean, rstd are given."""
    sample, unit, part, piece, channels, exists, length, origin, offsets, step = place(
        tl.num_programs(0) - 1 - tl.program_id(0),
        steps, chunk, splits, CHANNELS, UNIT, WIDTH, LAST, STEP, LANES, SPAN,
    )  # fmt: skip
    s = tl.arange(0, SPAN)
    if PIECES:
        kind, p = tl.arange(0, KINDS), tl.arange(0, PIECES)
        groups = sample * (CHANNELS // GROUP) + unit * (UNIT // GROUP) + kind
        at = partials + groups[:, None] * pieces + p[None, :]
        real = (kind < UNIT // GROUP) & (unit * (UNIT // GROUP) + kind < CHANNELS // GROUP)
        given = real[:, None] & (p < pieces)[None, :]
        plane = tl.cast(rows, tl.int64) * pieces
        count = tl.load(at + 2 * plane, given, 0)
        average, m2, count = merge_rows(tl.load(at, given, 0), tl.load(at + plane, given, 0), count)
        inverse = tl.rsqrt(m2 / tl.maximum(count, 1.0) + eps)
        if (part == 0) & (piece == 0):
            tl.store(mean + groups, average, real)
            tl.store(rstd + groups, inverse, real)
        average, inverse = to_channels(average, GROUP, LANES, KINDS), to_channels(inverse, GROUP, LANES, KINDS)
    else:
        groups = sample * (CHANNELS // GROUP) + channels // GROUP
        average, inverse = tl.load(mean + groups, exists, 0), tl.load(rstd + groups, exists, 0)
    if addend is not None:
        average -= added(addend, addend_b, addend_c, sample, channels, exists)
    factor, term = affine(weight, bias, scale, shift, scale_b, scale_c, shift_b, shift_c, sample, channels, exists)
    factor *= inverse
    values, results = x + origin, y + origin
    for i in tl.range(0, tl.cdiv(length, SPAN), num_stages=STAGES):
        inside = exists[:, None] & (s < length - i * SPAN)[None, :]
        value = tl.load(values + offsets, inside, 0).to(tl.float32)
        result = activated(value, average, factor, term, SILU)
        tl.store(results + offsets, result.to(y.dtype.element_ty), inside)
        values += step
        results += step


def plan_forward(
    x, groups, weight, bias, scale, shift, activation, eps, addend=None
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Launches, and what they fill: y in the memory order of `arranged(x)`, mean and rstd `[B, groups]` in fp32."""
    assert x.dtype in (torch.float32, torch.float16, torch.bfloat16), x.dtype
    x = arranged(x)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return [], (y, mean.zero_(), rstd.zero_())
    sizes, silu = Sizes.of(x, groups), activation == "silu"
    tensors = {"x": x, "y": y, "mean": mean, "rstd": rstd, "weight": weight.contiguous(), "bias": bias.contiguous()}
    arguments = {**tensors, **film_arguments(scale=scale, shift=shift, addend=addend), "eps": eps}
    if whole := resident(sizes, "resident", x.device):
        tiling, row = whole
        return [tiling.launch(resident_kernel, row, arguments, SILU=silu)], (y, mean, rstd)

    (tiling, row), rows = split(sizes, "partial", x.device), sizes.batch * groups
    pieces = tiling.parts * tiling.splits
    partials = x.new_empty((3, rows, pieces), dtype=torch.float32)
    counts = {"x": x, "partials": partials, "rows": rows, **film_arguments(addend=addend)}
    launches = [tiling.launch(partial_kernel, row, counts)]
    tiling, row = split(sizes, "apply", x.device)
    many = pieces > row["pieces"]
    if many:
        merge = settings("group_norm", "merge", pieces, x.device)
        counts = {"partials": partials, "mean": mean, "rstd": rstd, "eps": eps, "pieces": pieces}
        launches.append(Launch(merge_kernel, (rows,), counts, {"BLOCK": merge["block"]}, merge["warps"]))
    arguments |= {"partials": partials, "rows": rows, "pieces": pieces}
    inline = 0 if many else triton.next_power_of_2(pieces)
    launches.append(tiling.launch(apply_kernel, row, arguments, SILU=silu, PIECES=inline))
    return launches, (y, mean, rstd)


def forward(x, groups, weight, bias, scale, shift, activation, eps, addend=None):
    """What `semantica::group_norm` computes: y, and mean and rstd `[B, groups]` in fp32."""
    kept, (y, mean, rstd) = replay.run(plan_forward, (x, groups, weight, bias, scale, shift, activation, eps, addend))
    return y if kept else restored(y, x), mean, rstd
