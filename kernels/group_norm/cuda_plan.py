"""How the CUDA kernels of group_norm (csrc/cuda) cut a tensor into blocks: from sizes and a card's limits alone.

A team of blocks finds statistics together. Where the shared memory of a block, or of a cluster of blocks (sm_90 and
newer), holds all that a team reads, every tensor is read once: `RESIDENT`. Elsewhere a cooperative grid takes teams in
rounds; each block keeps the first part of what it reads in shared memory and walks back over the rest, newest first, so
that the L2 cache serves a part: `GRID`. `PLAIN` is two launches, for cards without clusters.

Bytes that a round moves through memory: read + written + max(0, read - kept - L2). So it pays to take as few groups a
round as keep every multiprocessor busy: what a round reads is then mostly still on the chip when it is read again.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

RESIDENT, GRID, PLAIN = range(3)
WARP = 32
# blocks of the largest cluster that every card with clusters has, and of the largest that any has
PORTABLE, LARGEST = 8, 16
# bytes of one access; of adjacent elements below which memory sends more than is asked for
ACCESS, BURST = 16, 64
# copies that a thread has under way, by the number of operands: as in csrc/cuda/walk.cuh
AHEAD = {1: 8, 2: 4}
# fp32 numbers of each channel and pixel chunk that the backward leaves in the workspace
SUMS = 3
# channels of a block, whose constants and sums are in shared memory; a contiguous one has the sums of each warp there
MOST_WIDTH, MOST_LINES = 512, 128
# thought to take (s): a meeting of a cluster and of a grid, and the latency of memory; bytes/s of memory, and of one
# multiprocessor
CLUSTER, MEETING, LATENCY = 1e-6, 4e-6, 1.5e-6
MEMORY, ALONE = 4e12, 6e10


@dataclass(frozen=True)
class Card:
    """Limits of a GPU.

    Attributes:
        capability: (9, 0) of an H100.
        multiprocessors: of the card.
        shared: bytes of shared memory that a block may have; `shared_all` those of a multiprocessor.
        cache: bytes of the L2 cache.
        clusters: how many clusters of 1, 2, 4, ... blocks run at once where each block fills a multiprocessor, as the
            card itself says; by default of the sizes that every card with clusters has, and as many as multiprocessors
            permit.
        threads: that a block of these kernels may have.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    shared_all: int
    cache: int
    clusters: tuple[int, ...] = ()
    threads: int = 512

    def __post_init__(self):
        if not self.clusters:
            object.__setattr__(self, "clusters", even(self.multiprocessors, PORTABLE if self.has_clusters else 1))

    @property
    def has_clusters(self) -> bool:
        return self.capability >= (9, 0)

    @property
    def cluster(self) -> int:
        """Blocks of the largest cluster."""
        return 2 ** (sum(1 for _ in itertools.takewhile(bool, self.clusters)) - 1)

    def residents(self, threads: int, shared: int) -> int:
        """Blocks at once on a multiprocessor, with 128 registers a thread; the system takes 1 KiB for each block."""
        return min(512 // threads, self.shared_all // (shared + 1024))

    def at_once(self, team: int, threads: int, shared: int) -> int:
        """Blocks at once on the card where those of a team are a cluster."""
        return max(1, self.residents(threads, shared)) * self.clusters[team.bit_length() - 1] * team


def even(multiprocessors: int, largest: int) -> tuple[int, ...]:
    """Clusters at once, by size, where only the number of multiprocessors counts: at least one of each size."""
    return tuple(max(1, multiprocessors >> i) for i in range(largest.bit_length()))


# by architecture, to plan without a GPU: data-centre cards may have clusters of 16, which the card at hand is asked for
CARDS = {
    "sm_80": Card((8, 0), 108, 163 << 10, 164 << 10, 40 << 20),
    "sm_86": Card((8, 6), 84, 99 << 10, 100 << 10, 6 << 20),
    "sm_89": Card((8, 9), 142, 99 << 10, 100 << 10, 96 << 20),
    "sm_90": Card((9, 0), 132, 227 << 10, 228 << 10, 50 << 20, even(132, LARGEST)),
    "sm_100": Card((10, 0), 148, 227 << 10, 228 << 10, 126 << 20, even(148, LARGEST)),
    "sm_120": Card((12, 0), 188, 99 << 10, 100 << 10, 128 << 20),
}


@dataclass(frozen=True)
class Problem:
    """Sizes of x; channels are innermost in memory where `channels_last`, else pixels.

    `aligned`: all tensors of x's size begin at a multiple of 16 bytes.
    """

    samples: int
    channels: int
    groups: int
    pixels: int
    itemsize: int
    channels_last: bool
    aligned: bool = True

    @property
    def depth(self) -> int:
        return self.channels // self.groups

    @property
    def bytes(self) -> int:
        return self.samples * self.channels * self.pixels * self.itemsize


@dataclass(frozen=True)
class Plan:
    """See `csrc/cuda/group_norm.h`; `items` is what each thread has to read."""

    path: int
    vector: int
    threads: int
    rows: int
    columns: int
    width: int
    repeat: int
    parts: int
    chunks: int
    kept: int
    rounds: int
    blocks: int
    shared: int
    items: int

    @property
    def team(self) -> int:
        return self.parts * self.chunks

    def workspace(self, problem: Problem, operands: int) -> int:
        """Numbers of fp32 that a launch needs: what blocks tell each other, and sums for the gradients of weights."""
        groups = self.width // min(self.width, problem.depth)
        told = 0 if self.path == RESIDENT else 3 * self.blocks * groups * min(2, self.rounds)
        if operands == 1:
            return told
        sums = SUMS * problem.samples * self.chunks * problem.channels
        return sums + 2 * problem.samples * problem.groups + told

    def traffic(self, problem: Problem, operands: int, card: Card) -> int:
        """Bytes that memory moves: each operand read, the result written, and what neither kept nor cached is again."""
        moved = (operands + 1) * problem.bytes
        if self.path == RESIDENT:
            return moved
        again = operands * problem.bytes // self.rounds
        kept = self.blocks * self.kept * self.threads * self.vector * problem.itemsize * operands
        # half of the cache: the other is full of what is written, and of the far half's copies
        return moved + self.rounds * max(0, again - kept - card.cache // 2)


def plan(problem: Problem, operands: int, card: Card, path: int | None = None) -> Plan | None:
    """The plan that should take least time; None where these kernels do not serve, or not by `path`.

    Args:
        operands: 1 forward (x), 2 backward (x and dy).
        path: only plans of this kind.
    """
    made = [one for one in candidates(problem, operands, card) if path in (None, one.path)]
    if path is None and any(one.path == RESIDENT for one in made):
        made = [one for one in made if one.path == RESIDENT]
    elif path is None:
        # two launches need no promise that all blocks run at once, and no newer card than sm_80
        wanted = GRID if card.has_clusters else PLAIN
        made = [one for one in made if one.path == wanted] or made
    return min(made, key=lambda one: (seconds(one, problem, operands, card), one.blocks), default=None)


def seconds(plan: Plan, problem: Problem, operands: int, card: Card) -> float:
    """A rough estimate, to choose among plans: it knows bytes, meetings and waves of blocks."""
    moved = plan.traffic(problem, operands, card)
    at_once = card.at_once(plan.team if plan.path == RESIDENT else 1, plan.threads, plan.shared)
    waves = math.ceil(plan.blocks / at_once)
    busy = min(plan.blocks, card.multiprocessors)
    meeting = {RESIDENT: CLUSTER if plan.team > 1 else 0, GRID: MEETING, PLAIN: MEETING}[plan.path]
    # the last wave takes as long as a full one
    fill = waves * at_once / plan.blocks if waves > 1 else 1
    return plan.rounds * meeting + waves * LATENCY + fill * moved / min(MEMORY, busy * ALONE)


def candidates(problem: Problem, operands: int, card: Card) -> Iterator[Plan]:
    """Every plan worth a look, of all paths."""
    if problem.pixels >= 2**31 or problem.bytes == 0:
        return
    for vector, width, repeat, parts in cuts(problem, card):
        teams = problem.samples * (problem.channels // (width * parts))
        sizes = (problem, operands, card, vector, width, repeat, parts)
        chunks = 1
        # clusters are powers of 2
        even = parts & (parts - 1) == 0
        while (
            even and parts * chunks <= card.cluster and (chunks == 1 or problem.pixels // chunks >= 2 * WARP // vector)
        ):
            yield from filled(RESIDENT, *sizes, chunks, 1, teams * parts * chunks)
            chunks *= 2
        # about four blocks to a multiprocessor
        chunks = max(1, min(4 * card.multiprocessors // (teams * parts), problem.pixels // (8 * WARP)))
        yield from filled(PLAIN, *sizes, chunks, 1, teams * parts * chunks)
        for at_once in sorted({2**i for i in range(8) if 2**i < teams} | {teams}):
            chunks = min(card.multiprocessors // (at_once * parts), problem.pixels)
            if chunks:
                rounds = math.ceil(teams / at_once)
                yield from filled(GRID, *sizes, chunks, rounds, at_once * parts * chunks)


def cuts(problem: Problem, card: Card) -> Iterator[tuple[int, int, int, int]]:
    """(vector, width, repeat, parts): elements of an access, channels of a block, pixels in a row, parts of a group."""
    depth, channels = problem.depth, problem.channels
    vector = ACCESS // problem.itemsize
    if not problem.channels_last:
        vector = vector if problem.aligned and problem.pixels % vector == 0 else 1
        width = next(w for w in range(min(depth, MOST_LINES), 0, -1) if depth % w == 0)
        yield vector, width, 1, depth // width
        return
    if not problem.aligned:
        vector = 1
    if channels % vector:
        # rows of several pixels, where they fill whole accesses
        repeat = vector // math.gcd(channels, vector)
        if problem.pixels % repeat == 0 and channels * repeat <= card.threads * vector and channels <= MOST_WIDTH:
            yield vector, channels, repeat, 1
            return
        vector = 1
    most = min(MOST_WIDTH, card.threads * vector)
    step = math.lcm(vector, depth)
    whole = [w for w in range(step, min(most, channels) + 1, step) if channels % w == 0]
    if not whole:
        # a group is wider than a block
        fitting = [w for w in range(vector, min(most, depth) + 1, vector) if depth % w == 0]
        if not fitting and vector > 1:
            vector, fitting = 1, [w for w in range(1, min(card.threads, depth) + 1) if depth % w == 0]
        yield vector, fitting[-1], 1, depth // fitting[-1]
        return
    # the narrowest that memory serves well, and some wider
    wide = [w for w in whole if w * problem.itemsize >= BURST] or whole[-1:]
    for width in wide[:4]:
        yield vector, width, 1, 1


def filled(path, problem, operands, card, vector, width, repeat, parts, chunks, rounds, blocks) -> Iterator[Plan]:
    """Plans of one cut that have room, for blocks of several sizes where all is kept."""
    unit = repeat if problem.channels_last else vector
    share = math.ceil(problem.pixels // unit / chunks) * unit
    sizes = [card.threads, card.threads // 2, card.threads // 8] if path == RESIDENT else [card.threads]
    for most in sizes:
        rows, columns, items = arrange(problem, vector, width, repeat, share, most)
        if columns > most:
            continue
        threads = math.ceil(rows * columns / WARP) * WARP
        slot = vector * problem.itemsize * operands * threads
        tables = behind(problem, operands, vector, threads, columns, width)
        # tables begin at 16 bytes
        slots = (card.shared - tables - ACCESS) // slot
        if path == RESIDENT:
            kept = items
        else:
            kept = 0 if path == PLAIN else min(items, max(0, slots - AHEAD[operands]))
        taken = kept + (AHEAD[operands] if kept < items else 0)
        if taken <= slots:
            shared = math.ceil(taken * slot / ACCESS) * ACCESS + tables
            geometry = (vector, threads, rows, columns, width, repeat, parts, chunks)
            yield Plan(path, *geometry, kept, rounds, blocks, shared, items)


def arrange(problem, vector, width, repeat, share, most) -> tuple[int, int, int]:
    """Rows and columns of threads, and items of each; columns may be more than there are threads for."""
    if problem.channels_last:
        columns, lines = width * repeat // vector, share // repeat
        rows = min(max(1, most // columns), lines)
        return rows, columns, math.ceil(lines / rows)

    def arranged(columns):
        rows = min(most // columns, 2 ** math.ceil(math.log2(width)))
        return rows, columns, math.ceil(width / rows) * math.ceil(share / (columns * vector))

    def busy(columns):
        rows, _, items = arranged(columns)
        return items, rows * columns, -columns

    return arranged(min((2**i for i in range(most.bit_length()) if 2**i <= most), key=busy))


def behind(problem: Problem, operands: int, vector: int, threads: int, columns: int, width: int) -> int:
    """Bytes of a block's tables: as in csrc/cuda/tables.cuh."""
    depth = min(problem.depth, width)
    groups = width // depth
    if operands == 2:
        scratch = vector * threads if problem.channels_last else SUMS * width * max(1, columns // WARP)
        return 4 * (3 * width + scratch + SUMS * width + 3 * 3 * groups)
    fold = min(vector, depth & -depth)
    scratch = 2 * (vector // fold) * threads if problem.channels_last else 0
    return 4 * (3 * width + groups + scratch + 3 * groups * (max(1, threads // WARP // groups) + 2))
