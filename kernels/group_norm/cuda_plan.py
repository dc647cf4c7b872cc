"""How the CUDA kernels of group_norm cut a tensor into blocks: from sizes and a card's limits alone.

A unit is one sample's `width` channels, of whole groups, by all its pixels. Where the blocks of a cluster can hold it
in their shared memory, x is read once. Elsewhere blocks meet across the whole grid, keep what fits, and read the rest
again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

WARP = 32
# bytes: of one access, and of adjacent channels that fill a sector of memory
ACCESS, SECTOR = 16, 32
# sums of each channel, and copies ahead in each thread's ring, by the number of operands; as in csrc/cuda
SUMS = {1: 2, 2: 3}
AHEAD = {1: 6, 2: 4}
# pixels of a block below which another block does not pay
LEAST_PIXELS = 64


@dataclass(frozen=True)
class Limits:
    """Of a card: multiprocessors, bytes of shared memory of a block, blocks of a cluster (1 where there are none).

    threads: of a block, at most 512, which is what the kernels are compiled for.
    """

    multiprocessors: int
    shared: int
    cluster: int
    threads: int = 512


@dataclass(frozen=True)
class Plan:
    """See `csrc/cuda/group_norm.h`."""

    width: int
    vector: int
    rows: int
    chunks: int
    slots: int
    grid: bool
    shared: int

    @property
    def threads(self) -> int:
        return self.width // self.vector * self.rows

    def blocks(self, samples: int, channels: int) -> int:
        return samples * (channels // self.width) * self.chunks

    def workspace(self, samples: int, channels: int, operands: int) -> int:
        """Numbers of fp32 for the sums of blocks and of units."""
        if not self.grid or self.chunks == 1:
            return 0
        size = SUMS[operands] * self.width
        return (self.blocks(samples, channels) + samples * (channels // self.width)) * size

    def reread(self, samples: int, channels: int, pixels: int) -> float:
        """The share of each operand that is read a second time, from the L2 cache or from memory."""
        items = math.ceil(math.ceil(pixels / self.chunks) / self.rows)
        return max(0, items - self.slots) / items


def plan(
    samples: int, channels: int, groups: int, pixels: int, itemsize: int, operands: int, limits: Limits
) -> Plan | None:
    """The plan for `[samples, pixels, channels]` with channels innermost; None where these kernels do not serve.

    Args:
        itemsize: bytes of an element.
        operands: 1 forward (x), 2 backward (x and dy).
    """
    # the layout is what makes 16-byte accesses aligned; odd channels go one by one
    vector = ACCESS // itemsize if channels % (ACCESS // itemsize) == 0 else 1
    step = math.lcm(vector, channels // groups)
    widths = [width for width in range(step, channels + 1, step) if channels % width == 0]
    narrow = next((width for width in widths if width * itemsize >= SECTOR), channels)
    resident = list(clusters(samples, channels, groups, pixels, vector, narrow, itemsize, operands, limits))
    if resident:
        filling = [made for made in resident if made.blocks(samples, channels) >= limits.multiprocessors]
        return filling[0] if filling else resident[-1]
    # the wider, the longer the runs that are read
    for width in reversed(widths):
        chunks = limits.multiprocessors // (samples * (channels // width))
        made = cut(groups, channels, pixels, width, vector, chunks, itemsize, operands, limits) if chunks else None
        if made is not None:
            return Plan(width, vector, *made[:1], chunks, made[1], True, made[2])
    return None


def clusters(samples, channels, groups, pixels, vector, width, itemsize, operands, limits) -> Iterator[Plan]:
    """Plans that hold a unit on the chip, from the fewest blocks to the most that pay."""
    chunks = 1
    while chunks <= limits.cluster and (chunks == 1 or pixels // chunks >= LEAST_PIXELS):
        made = cut(groups, channels, pixels, width, vector, chunks, itemsize, operands, limits)
        if made is not None:
            rows, slots, shared = made
            if slots * rows * chunks >= pixels:
                yield Plan(width, vector, rows, chunks, slots, False, shared)
        chunks *= 2


def cut(groups, channels, pixels, width, vector, chunks, itemsize, operands, limits) -> tuple[int, int, int] | None:
    """Rows, slots and bytes of shared memory of one block; None where it has no room."""
    columns, share = width // vector, math.ceil(pixels / chunks)
    rows = WARP // math.gcd(columns, WARP)
    if columns * rows > limits.threads:
        return None
    while columns * rows * 2 <= limits.threads and rows < share:
        rows *= 2
    sums = SUMS[operands]
    tables = 4 * (sums * (rows // 2) * width + (2 * sums + 3) * width + 2 * (width // (channels // groups)))
    slot = itemsize * vector * operands * columns * rows
    items = math.ceil(share / rows)
    slots = min(max(items, AHEAD[operands] + 1), (limits.shared - tables) // slot)
    return (rows, slots, slots * slot + tables) if slots > AHEAD[operands] else None
