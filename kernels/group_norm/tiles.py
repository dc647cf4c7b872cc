"""How group_norm cuts a tensor into programs, and the Triton functions that all its kernels share.

In memory x is `[B, C, S]` (contiguous) or `[B, S, C]` (channels-last), S pixels in whatever order. Either way a tile is
`[LANES channels, SPAN pixels]` and only two strides differ, so one source serves both layouts. A program owns a *block*
of channels, either some whole groups or a part of one, and a *chunk* of pixels, which it walks through in tiles.

Addresses are a 64-bit scalar per program plus 32-bit offsets inside a tile: right at any size, at no cost per value.

Statistics are (mean, M2, count), each relative to its own mean, and merged by Chan, Golub & LeVeque 1979, eq. 2.1: no
sums of squares, so nothing is lost where |mean| >> std, and no value is squared before its mean is taken off.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from semantica.kernels.launch import Launch, planned, settings


@dataclass(frozen=True)
class Sizes:
    """Sizes of one group_norm; `vector`: values in 16 bytes."""

    batch: int
    channels: int
    pixels: int
    groups: int
    last: bool
    vector: int

    @classmethod
    def of(cls, x: Tensor, groups: int) -> "Sizes":
        # the cut depends on every size: a tracer with symbolic ones specialises here, once
        batch, channels, pixels = int(x.shape[0]), int(x.shape[1]), int(x[0, 0].numel())
        return cls(batch, channels, pixels, groups, order(x)[1] != 1, 16 // x.element_size())

    @property
    def group(self) -> int:
        return self.channels // self.groups

    @property
    def step(self) -> int:
        """What divides the number of pixels. Triton sees it only where it is 16, and needs it for 16-byte loads."""
        return next(step for step in (16, 8, 4, 2, 1) if self.pixels % step == 0)


def order(x: Tensor) -> Sequence[int] | None:
    """The permutation to `[B, C, *spatial]` or `[B, *spatial, C]`, spatial in any order, that is contiguous, if any."""
    spatial = sorted(range(2, x.ndim), key=x.stride, reverse=True)
    candidates = ([0, 1, *spatial], [0, *spatial, 1])
    return next((dims for dims in candidates if x.permute(dims).is_contiguous()), None)


def arranged(x: Tensor) -> Tensor:
    """`x`, or where its memory is in no order that the kernels know, a copy, in the order of its strides if it can."""
    if order(x) is not None:
        return x
    x = torch.empty_like(x).copy_(x)
    return x if order(x) is not None else x.contiguous()


def arranged_like(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the memory order of `x`, copied only where it is in another."""
    return y if y.permute(order(x)).is_contiguous() else torch.empty_like(x).copy_(y)


def restored(y: Tensor, x: Tensor) -> Tensor:
    """`y` with the strides of `torch.empty_like(x)`, which it lacks only where `x` had to be made contiguous."""
    if order(x) is not None or y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x).copy_(y)


@dataclass(frozen=True)
class Tiling:
    """A cut into programs: blocks of channels by chunks of pixels.

    Attributes:
        unit: channels that share statistics: some whole groups.
        width: channels of a block: `unit`, or less where one group is too wide for a tile.
        lanes, span: channels and pixels of a tile, powers of two.
        chunk: pixels of a program.
        splits: chunks that make up all pixels.
    """

    sizes: Sizes
    unit: int
    width: int
    lanes: int
    span: int
    chunk: int
    splits: int

    # cuts are cached and so are these: planning a launch costs the host as little as it can
    @functools.cached_property
    def parts(self) -> int:
        """Blocks per unit."""
        return triton.cdiv(self.unit, self.width)

    @functools.cached_property
    def blocks(self) -> int:
        """Blocks per sample."""
        return triton.cdiv(self.sizes.channels, self.unit) * self.parts

    @functools.cached_property
    def programs(self) -> int:
        return self.sizes.batch * self.blocks * self.splits

    @functools.cached_property
    def constants(self) -> dict:
        """What kernels are specialised for. The number of pixels is not among them, nor the batch."""
        sizes, kinds = self.sizes, self.unit // self.sizes.group
        return {
            "CHANNELS": sizes.channels,
            "GROUP": sizes.group,
            "UNIT": self.unit,
            "WIDTH": self.width,
            "LAST": sizes.last,
            "STEP": sizes.step,
            "LANES": self.lanes,
            "KINDS": triton.next_power_of_2(kinds),
            "SPAN": self.span,
        }

    @functools.cached_property
    def arguments(self) -> dict:
        return {"steps": self.sizes.pixels // self.sizes.step, "chunk": self.chunk, "splits": self.splits}

    def launch(self, kernel, row: dict, arguments: dict, **constants) -> Launch:
        """A kernel with all its programs; where it walks through chunks (row has `stages`), tiles in flight."""
        if "stages" in row:
            # a chunk of one tile is no loop
            constants["STAGES"] = row["stages"] if self.chunk > self.span else 0
        arguments, constants = arguments | self.arguments, self.constants | constants
        return Launch(kernel, (self.programs,), arguments, constants, row["warps"])


def channel_block(sizes: Sizes, most: int, span: int) -> tuple[int, int, float]:
    """Unit and width of the cheapest block of at most `most` channels, and its cost: 1 is perfect.

    The cost counts lanes that idle, loads that are not 16 bytes wide, and runs so short that memory sectors (32 bytes)
    or warps are only partly used.
    """
    group, channels = sizes.group, sizes.channels
    if group <= most:
        cuts = [(k * group, k * group) for k in range(1, min(sizes.groups, most // group) + 1)]
    else:
        round_to = sizes.vector if sizes.last and group % sizes.vector == 0 else 1
        fewest = triton.cdiv(group, most)
        widths = [triton.cdiv(triton.cdiv(group, n), round_to) * round_to for n in range(fewest, 2 * fewest + 1)]
        cuts = [(group, width) for width in widths if width <= most]
    grain = 2 * sizes.vector if sizes.last else triton.cdiv(256, span)

    def cost(cut: tuple[int, int]) -> float:
        unit, width = cut
        blocks = triton.cdiv(channels, unit) * triton.cdiv(unit, width)
        lanes = blocks * triton.next_power_of_2(width) / channels
        vector = sizes.vector if sizes.last and blocks > 1 and channels % sizes.vector == 0 else 1
        aligned = unit % vector == 0 and width % vector == 0
        # a block of all channels is as wide as it can be
        return lanes * (1 if aligned else vector / 2) * (1 if blocks == 1 else 1 + grain / width)

    best = min(cuts, key=cost)
    return *best, cost(best)


@planned
def split(sizes: Sizes, kernel: str, device: torch.device) -> tuple[Tiling, dict]:
    """The cut for a kernel that walks through chunks, and its launch settings.

    Chunks have the row's `tiles`, but fewer where the programs would be fewer than the first of its `programs`, which
    occupies every multiprocessor, and more where they would be more than the second.
    """
    row = settings("group_norm", kernel, sizes.channels if sizes.last else sizes.pixels, device)
    whole = triton.next_power_of_2(sizes.pixels)
    span = min(whole, row["block"] // row["lanes"]) if sizes.last else min(whole, row["block"])
    unit, width, _ = channel_block(sizes, row["block"] // span, span)
    lanes = triton.next_power_of_2(width)
    blocks = triton.cdiv(sizes.channels, unit) * triton.cdiv(unit, width)
    tiles, (least, most) = triton.cdiv(sizes.pixels, span), row["programs"]
    programs = min(max(sizes.batch * blocks * tiles // row["tiles"], least), most)
    splits = min(triton.cdiv(programs, sizes.batch * blocks), tiles)
    chunk = triton.cdiv(tiles, splits) * span
    return Tiling(sizes, unit, width, lanes, span, chunk, triton.cdiv(sizes.pixels, chunk)), row


@planned
def resident(sizes: Sizes, kernel: str, device: torch.device) -> tuple[Tiling, dict] | None:
    """The cut whose tiles hold whole groups, and its launch settings; None where no tile can.

    The smallest tile that wastes little, so that small tensors spread over many multiprocessors; else the best of all,
    unless it wastes more than reading twice would.
    """
    span, best = triton.next_power_of_2(sizes.pixels), None
    size = span * triton.next_power_of_2(sizes.group)
    while size <= (row := settings("group_norm", kernel, size, device))["width"]:
        unit, width, cost = channel_block(sizes, size // span, span)
        if best is None or cost < best[0]:
            best = cost, Tiling(sizes, unit, width, triton.next_power_of_2(width), span, span, 1), row
        if cost <= 2.5:
            break
        size *= 2
    return best[1:] if best is not None and best[0] <= 4 else None


@triton.jit
def place(
    program, steps, chunk, splits,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr, STEP: tl.constexpr,
    LANES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Where a program works. Programs go through memory in order.

    Returns:
        sample (int64), unit, part of it, chunk; channels [LANES] and which of them exist; pixels of the chunk; offset
        (int64) of its first value; offsets [LANES, SPAN] in its first tile; step to the next.
    """
    PARTS: tl.constexpr = (UNIT + WIDTH - 1) // WIDTH
    BLOCKS: tl.constexpr = (CHANNELS + UNIT - 1) // UNIT * PARTS
    if LAST:
        block, piece = program % BLOCKS, program // BLOCKS % splits
    else:
        block, piece = program // splits % BLOCKS, program % splits
    sample = (program // (BLOCKS * splits)).to(tl.int64)
    unit, part = block // PARTS, block % PARTS
    first = unit * UNIT + part * WIDTH
    c, s = tl.arange(0, LANES), tl.arange(0, SPAN)
    # comparisons with constants, one by one: the compiler then knows that whole vectors pass or fail
    exists = (c < WIDTH) & (part * WIDTH + c < UNIT) & (first + c < CHANNELS)
    pixels = tl.cast(steps, tl.int64) * STEP
    start = piece.to(tl.int64) * chunk
    length = tl.minimum(chunk, pixels - start).to(tl.int32)
    if LAST:
        origin = (sample * pixels + start) * CHANNELS + first
        offsets = c[:, None] + s[None, :] * CHANNELS
        step = SPAN * CHANNELS
    else:
        origin = (sample * CHANNELS + first) * pixels + start
        # a tile of several channels spans all their pixels, so these are few
        offsets = c[:, None] * pixels.to(tl.int32) + s[None, :]
        step = SPAN
    return sample, unit, part, piece, first + c, exists, length, origin, offsets, step


@triton.jit
def group_sum(values, GROUP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr):
    """Sums over the channels of each group, `[LANES]` -> `[KINDS]`; values of channels that do not exist are 0."""
    if KINDS == 1:
        total = tl.sum(values, 0, keep_dims=True)
    elif KINDS == LANES:
        total = values
    elif KINDS * GROUP == LANES:
        total = tl.sum(tl.reshape(values, (KINDS, GROUP)), 1)
    else:
        member = (tl.arange(0, LANES) // GROUP)[:, None] == tl.arange(0, KINDS)[None, :]
        total = tl.sum(tl.where(member, values[:, None], 0.0), 0)
    return total


@triton.jit
def to_channels(values, GROUP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr):
    """Each channel's value of its group, `[KINDS]` -> `[LANES]`."""
    if KINDS == 1:
        spread = tl.broadcast_to(values, (LANES,))
    elif KINDS == LANES:
        spread = values
    elif KINDS * GROUP == LANES:
        spread = tl.reshape(tl.broadcast_to(values[:, None], (KINDS, GROUP)), (LANES,))
    else:
        member = (tl.arange(0, LANES) // GROUP)[:, None] == tl.arange(0, KINDS)[None, :]
        spread = tl.sum(tl.where(member, values[None, :], 0.0), 1)
    return spread


@triton.jit
def merge_rows(mean, m2, count):
    """Statistics of each row from those of its members, `[R, N]` -> `[R]`; counts may be 0."""
    total = tl.sum(count, 1)
    share = 1 / tl.maximum(total, 1.0)
    average = tl.sum(count * mean, 1) * share
    delta = mean - average[:, None]
    # what rounding left out of the mean
    rest = tl.sum(count * delta, 1) * share
    return average + rest, tl.sum(m2 + count * delta * delta, 1) - total * rest * rest, total


@triton.jit
def merge_groups(mean, m2, count, GROUP: tl.constexpr, LANES: tl.constexpr, KINDS: tl.constexpr):
    """Statistics of each group from those of its channels, `[LANES]` -> `[KINDS]`."""
    total = group_sum(count, GROUP, LANES, KINDS)
    share = 1 / tl.maximum(total, 1.0)
    average = group_sum(count * mean, GROUP, LANES, KINDS) * share
    delta = tl.where(count > 0, mean - to_channels(average, GROUP, LANES, KINDS), 0.0)
    rest = group_sum(count * delta, GROUP, LANES, KINDS) * share
    m2 = group_sum(m2 + count * delta * delta, GROUP, LANES, KINDS) - total * rest * rest
    return average + rest, m2, total


@triton.jit
def affine(weight, bias, scale, shift, scale_b, scale_c, shift_b, shift_c, sample, channels, exists):
    """Factor and term of each channel, `[LANES]`: `x_hat * factor + term` is what the activation gets."""
    factor = tl.load(weight + channels, exists, 0).to(tl.float32)
    term = tl.load(bias + channels, exists, 0).to(tl.float32)
    if scale is not None:
        film = 1 + tl.load(scale + sample * scale_b + channels * scale_c, exists, 0).to(tl.float32)
        factor *= film
        term *= film
    if shift is not None:
        term += tl.load(shift + sample * shift_b + channels * shift_c, exists, 0).to(tl.float32)
    return factor, term


@triton.jit
def added(addend, addend_b, addend_c, sample, channels, exists):
    """What is added to each channel, `[LANES]`: it moves the channel's mean and nothing else."""
    return tl.load(addend + sample * addend_b + channels * addend_c, exists, 0).to(tl.float32)


def film_arguments(**tensors: Tensor | None) -> dict:
    """Tensors `[B, C]` by name, with their strides."""
    strides = {name: (0, 0) if a is None else a.stride() for name, a in tensors.items()}
    return tensors | {f"{name}_{axis}": stride for name, pair in strides.items() for axis, stride in zip("bc", pair)}
