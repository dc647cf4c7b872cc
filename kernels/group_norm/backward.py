"""group_norm in Triton, backward.

With h = x_hat * a + b the argument of the activation, a = weight * (1 + scale), b = bias * (1 + scale) + shift, and
g = dy * act'(h), everything follows from two sums over the pixels of each (sample, channel), G = sum g and
H = sum g * x_hat:

    dshift = G                                   dscale = weight * H + bias * G
    dweight = sum_b (1 + scale) * H              dbias = sum_b (1 + scale) * G
    dx = rstd * (a * g - (sum_c a * G + x_hat * sum_c a * H) / N)    over the N values, channels c, of a group

(Wu & He, arXiv 1803.08494, eq. 1, differentiated.) h is computed again from x, mean and rstd; nothing else was kept.

Where a tile in registers holds whole groups of x and dy, one launch reads both once (2R + W) and a small one sums over
the batch. Otherwise: the sums of chunks, a small launch that adds them up, and a second pass (4R + W, less what the L2
cache holds: it runs backwards through memory). All sums have one order: two runs are bit-equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels import replay
from semantica.kernels.group_norm.op import over_pixels
from semantica.kernels.group_norm.tiles import (
    Sizes,
    added,
    affine,
    arranged,
    arranged_like,
    film_arguments,
    group_sum,
    place,
    resident,
    restored,
    split,
    to_channels,
)
from semantica.kernels.launch import Launch, settings


@triton.jit
def activation_gradient(dy, normal, factor, term, SILU: tl.constexpr):
    """g = dy * act'(x_hat * factor + term)."""
    if SILU:
        h = tl.fma(normal, factor[:, None], term[:, None])
        p = tl.sigmoid(h)
        dy *= p * tl.fma(h, 1 - p, 1.0)
    return dy


@triton.jit
def resident_backward_kernel(
    dy, x, dx, sums, mean, rstd, weight, bias, scale, shift, addend, scale_b, scale_c, shift_b, shift_c, addend_b,
    addend_c, rows, steps, chunk, splits,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr, SPAN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program per block of whole groups: x and dy once in, dx once out, and sums `[2, rows = B, C]`: G and H."""
    sample, _, _, _, channels, exists, length, origin, offsets, _ = place(
        tl.program_id(0), steps, chunk, splits, CHANNELS, UNIT, WIDTH, LAST, STEP, LANES, SPAN
    )
    inside = exists[:, None] & (tl.arange(0, SPAN) < length)[None, :]
    value = tl.load(x + origin + offsets, inside, 0).to(tl.float32)
    g = tl.load(dy + origin + offsets, inside, 0).to(tl.float32)
    groups = sample * (CHANNELS // GROUP) + channels // GROUP
    average, inverse = tl.load(mean + groups, exists, 0), tl.load(rstd + groups, exists, 0)
    if addend is not None:
        average -= added(addend, addend_b, addend_c, sample, channels, exists)
    factor, term = affine(weight, bias, scale, shift, scale_b, scale_c, shift_b, shift_c, sample, channels, exists)
    normal = (value - average[:, None]) * inverse[:, None]
    # zero where there is no value, as dy is
    g = activation_gradient(g, normal, factor, term, SILU)
    sum_g, sum_h = tl.sum(g, 1), tl.sum(g * normal, 1)
    at = sums + sample * CHANNELS + channels
    tl.store(at, sum_g, exists)
    tl.store(at + tl.cast(rows, tl.int64) * CHANNELS, sum_h, exists)
    share = 1.0 / (tl.cast(steps, tl.float32) * (STEP * GROUP))
    mean_g = to_channels(group_sum(factor * sum_g, GROUP, LANES, KINDS), GROUP, LANES, KINDS) * share
    mean_h = to_channels(group_sum(factor * sum_h, GROUP, LANES, KINDS), GROUP, LANES, KINDS) * share
    result = factor[:, None] * g - tl.fma(normal, mean_h[:, None], mean_g[:, None])
    tl.store(dx + origin + offsets, (result * inverse[:, None]).to(dx.dtype.element_ty), inside)


@triton.jit
def partial_backward_kernel(
    dy, x, sums, mean, rstd, weight, bias, scale, shift, addend, scale_b, scale_c, shift_b, shift_c, addend_b,
    addend_c, rows, steps, chunk, splits,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """G and H of every (sample, chunk, channel): sums `[2, rows = B * splits, C]`."""
    sample, _, _, piece, channels, exists, length, origin, offsets, step = place(
        tl.program_id(0), steps, chunk, splits, CHANNELS, UNIT, WIDTH, LAST, STEP, LANES, SPAN
    )
    s = tl.arange(0, SPAN)
    groups = sample * (CHANNELS // GROUP) + channels // GROUP
    average, inverse = tl.load(mean + groups, exists, 0), tl.load(rstd + groups, exists, 0)
    if addend is not None:
        average -= added(addend, addend_b, addend_c, sample, channels, exists)
    factor, term = affine(weight, bias, scale, shift, scale_b, scale_c, shift_b, shift_c, sample, channels, exists)
    values, gradients = x + origin, dy + origin
    sum_g = tl.zeros((LANES, SPAN), tl.float32)
    sum_h = tl.zeros((LANES, SPAN), tl.float32)
    for i in tl.range(0, tl.cdiv(length, SPAN), num_stages=STAGES):
        inside = exists[:, None] & (s < length - i * SPAN)[None, :]
        value = tl.load(values + offsets, inside, 0).to(tl.float32)
        g = tl.load(gradients + offsets, inside, 0).to(tl.float32)
        normal = (value - average[:, None]) * inverse[:, None]
        g = activation_gradient(g, normal, factor, term, SILU)
        sum_g += g
        sum_h = tl.fma(g, normal, sum_h)
        values += step
        gradients += step
    at = sums + (sample * splits + piece) * CHANNELS + channels
    tl.store(at, tl.sum(sum_g, 1), exists)
    tl.store(at + tl.cast(rows, tl.int64) * CHANNELS, tl.sum(sum_h, 1), exists)


@triton.jit
def merge_backward_kernel(
    sums, totals, weight, bias, scale, dweight, dbias, dscale, dshift, scale_b, scale_c,
    dscale_b, dscale_c, dshift_b, dshift_c, batch, splits,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, SAMPLES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Gradients of all but x from sums `[2, B * splits, C]`; and totals `[2, B, groups, parts]`, unless None, for dx.

    One program per LANES channels of a group; totals are its shares of sum_c a * G and sum_c a * H.
    """
    group, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, b, p = part * LANES + tl.arange(0, LANES), tl.arange(0, SAMPLES), tl.arange(0, SPLITS)
    channels, exists = group * GROUP + c, c < GROUP
    factor = tl.load(weight + channels, exists, 0).to(tl.float32)
    term = tl.load(bias + channels, exists, 0).to(tl.float32)
    plane = tl.cast(batch, tl.int64) * splits * CHANNELS
    sum_dweight = tl.zeros((SAMPLES, LANES), tl.float32)
    sum_dbias = tl.zeros((SAMPLES, LANES), tl.float32)
    for first in range(0, batch, SAMPLES):
        samples = (first + b).to(tl.int64)
        real = samples < batch
        inside = real[:, None] & exists[None, :]
        sum_g = tl.zeros((SAMPLES, LANES), tl.float32)
        sum_h = tl.zeros((SAMPLES, LANES), tl.float32)
        for start in range(0, splits, SPLITS):
            row = samples[:, None] * splits + (start + p)[None, :]
            at = sums + row[:, :, None] * CHANNELS + channels[None, None, :]
            given = inside[:, None, :] & (start + p < splits)[None, :, None]
            sum_g += tl.sum(tl.load(at, given, 0), 1)
            sum_h += tl.sum(tl.load(at + plane, given, 0), 1)
        if dshift is not None:
            at = dshift + samples[:, None] * dshift_b + channels[None, :] * dshift_c
            tl.store(at, sum_g.to(dshift.dtype.element_ty), inside)
        if scale is not None:
            at = dscale + samples[:, None] * dscale_b + channels[None, :] * dscale_c
            tl.store(at, (factor[None, :] * sum_h + term[None, :] * sum_g).to(dscale.dtype.element_ty), inside)
            film = 1 + tl.load(scale + samples[:, None] * scale_b + channels[None, :] * scale_c, inside, 0).to(
                tl.float32
            )
            sum_g *= film
            sum_h *= film
        sum_dweight += sum_h
        sum_dbias += sum_g
        if totals is not None:
            groups = tl.cast(batch, tl.int64) * (CHANNELS // GROUP)
            at = totals + (samples * (CHANNELS // GROUP) + group) * parts + part
            tl.store(at, tl.sum(factor[None, :] * sum_g, 1), real)
            tl.store(at + groups * parts, tl.sum(factor[None, :] * sum_h, 1), real)
    tl.store(dweight + channels, tl.sum(sum_dweight, 0).to(dweight.dtype.element_ty), exists)
    tl.store(dbias + channels, tl.sum(sum_dbias, 0).to(dbias.dtype.element_ty), exists)


@triton.jit
def apply_backward_kernel(
    dy, x, dx, totals, mean, rstd, weight, bias, scale, shift, addend, scale_b, scale_c, shift_b, shift_c, addend_b,
    addend_c, rows, parts, steps, chunk, splits,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """dx of every chunk, given totals `[2, rows = B * groups, parts]`."""
    sample, _, _, _, channels, exists, length, origin, offsets, step = place(
        tl.num_programs(0) - 1 - tl.program_id(0),
        steps, chunk, splits, CHANNELS, UNIT, WIDTH, LAST, STEP, LANES, SPAN,
    )  # fmt: skip
    s = tl.arange(0, SPAN)
    groups = sample * (CHANNELS // GROUP) + channels // GROUP
    average, inverse = tl.load(mean + groups, exists, 0), tl.load(rstd + groups, exists, 0)
    if addend is not None:
        average -= added(addend, addend_b, addend_c, sample, channels, exists)
    factor, term = affine(weight, bias, scale, shift, scale_b, scale_c, shift_b, shift_c, sample, channels, exists)
    mean_g = tl.zeros((LANES,), tl.float32)
    mean_h = tl.zeros((LANES,), tl.float32)
    plane = tl.cast(rows, tl.int64) * parts
    for part in range(parts):
        mean_g += tl.load(totals + groups * parts + part, exists, 0)
        mean_h += tl.load(totals + groups * parts + part + plane, exists, 0)
    share = 1.0 / (tl.cast(steps, tl.float32) * (STEP * GROUP))
    mean_g *= share
    mean_h *= share
    values, gradients, results = x + origin, dy + origin, dx + origin
    for i in tl.range(0, tl.cdiv(length, SPAN), num_stages=STAGES):
        inside = exists[:, None] & (s < length - i * SPAN)[None, :]
        value = tl.load(values + offsets, inside, 0).to(tl.float32)
        g = tl.load(gradients + offsets, inside, 0).to(tl.float32)
        normal = (value - average[:, None]) * inverse[:, None]
        g = activation_gradient(g, normal, factor, term, SILU)
        result = factor[:, None] * g - tl.fma(normal, mean_h[:, None], mean_g[:, None])
        tl.store(results + offsets, (result * inverse[:, None]).to(dx.dtype.element_ty), inside)
        values += step
        gradients += step
        results += step


def plan_backward(
    dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend=None
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Launches, and what they fill: dx in the memory order of `arranged(x)`, dweight, dbias, dscale, dshift."""
    assert x.dtype in (torch.float32, torch.float16, torch.bfloat16), x.dtype
    x = arranged(x)
    empty = torch.zeros_like if x.numel() == 0 else torch.empty_like
    gradients = {"dweight": empty(weight), "dbias": empty(bias)}
    dscale, dshift = (None if a is None else empty(a) for a in (scale, shift))
    dx = torch.empty_like(x)
    outputs = dx, *gradients.values(), *(x.new_empty(0) if a is None else a for a in (dscale, dshift))
    if x.numel() == 0:
        return [], outputs
    dy, sizes, silu = arranged_like(dy, x), Sizes.of(x, groups), activation == "silu"
    weights = {"weight": weight.contiguous(), "bias": bias.contiguous()}
    arguments = {"dy": dy, "x": x, "mean": mean, "rstd": rstd, **weights}
    arguments |= film_arguments(scale=scale, shift=shift, addend=addend)

    if whole := resident(sizes, "resident_backward", x.device):
        (tiling, row), kernel, outs = whole, resident_backward_kernel, {"dx": dx}
    else:
        (tiling, row), kernel, outs = split(sizes, "partial_backward", x.device), partial_backward_kernel, {}
    rows = sizes.batch * tiling.splits
    outs["sums"] = sums = x.new_empty((2, rows, sizes.channels), dtype=torch.float32)
    launches = [tiling.launch(kernel, row, arguments | outs | {"rows": rows}, SILU=silu)]

    merge = settings("group_norm", "merge_backward", rows, x.device)
    lanes = min(triton.next_power_of_2(sizes.group), merge["lanes"])
    samples = min(triton.next_power_of_2(sizes.batch), merge["block"] // lanes)
    pieces = min(triton.next_power_of_2(tiling.splits), merge["block"] // lanes // samples)
    parts = triton.cdiv(sizes.group, lanes)
    totals = None if whole else x.new_empty((2, sizes.batch * groups, parts), dtype=torch.float32)
    merged = {name: arguments[name] for name in ("weight", "bias", "scale", "scale_b", "scale_c")}
    merged |= gradients | {f"d{name}": a for name, a in film_arguments(scale=dscale, shift=dshift).items()}
    merged |= {"sums": sums, "totals": totals, "batch": sizes.batch, "splits": tiling.splits}
    constants = {"CHANNELS": sizes.channels, "GROUP": sizes.group}
    constants |= {"LANES": lanes, "SAMPLES": samples, "SPLITS": pieces}
    # the first axis of a grid alone takes more than 65535
    launches.append(Launch(merge_backward_kernel, (groups, parts), merged, constants, merge["warps"]))
    if not whole:
        tiling, row = split(sizes, "apply_backward", x.device)
        arguments |= {"dx": dx, "totals": totals, "rows": sizes.batch * groups, "parts": parts}
        launches.append(tiling.launch(apply_backward_kernel, row, arguments, SILU=silu))
    return launches, outputs


def backward(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend=None):
    """What `semantica::group_norm_backward` computes: gradients; those of what is absent are empty."""
    arguments = dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend
    kept, (dx, *others) = replay.run(plan_backward, arguments)
    return dx if kept else restored(dx, x), *others, over_pixels(dx, addend)
