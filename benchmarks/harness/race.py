"""The protocol: contenders in random order within rounds, warmed up alike, L2 cold, every call timed by itself.

On a processor with an L3 that stays as the calls leave it: there, what an operator reads was just written by another.

On a GPU the time of the device (events around the call, enqueued behind a kernel that spins, so that the device never
waits for the host) and the time on the wall (the device idle before and after) are taken in calls of their own.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# the matrix product whose rate is the ceiling: its side
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
# an upper bound of GPU clocks in Hz: spinning takes at least the asked time
CLOCK_RATE = 2.2e9


@dataclass(frozen=True)
class Protocol:
    """How often: rounds follow from the seconds that a race may take, within bounds that are alike for everyone."""

    warmup: int = 3
    least: int = 15
    most: int = 100
    seconds: float = 2.0


QUICK = Protocol(warmup=2, least=7, most=15, seconds=0.3)


@dataclass
class Times:
    """Seconds of every call of one contender."""

    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        return quantile(self.device, q)


def quantile(values: list[float], q: float) -> float:
    """Linear between order statistics, as numpy's default."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class CpuClock:
    """One kind of time: `perf_counter` around a call."""

    kinds = 1

    def __init__(self):
        self.cache = cache_bytes()
        # every thread sweeps the cache of its own core
        self.sweep = torch.zeros(2 * cache_bytes(2) * torch.get_num_threads() // 4, dtype=torch.int32)

    def time(self, call: Callable[[], Any], kind: int) -> tuple[float, Any]:
        # read, not written: lines to write back would be charged to the call
        self.sweep.amax()
        began = time.perf_counter()
        result = call()
        return time.perf_counter() - began, result

    def settle(self, calls: int) -> None:
        """Nothing runs ahead of the host."""


class CudaClock:
    """Two kinds of time: of the device, and on the wall."""

    kinds = 2

    def __init__(self):
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.sweep = torch.zeros(4 * self.cache // 4, dtype=torch.int32, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.lead, self.hosts = 1e-3, []

    def time(self, call: Callable[[], Any], kind: int) -> tuple[float, Any]:
        torch.cuda.synchronize()
        self.sweep.amax()
        if kind == 0:
            torch.cuda._sleep(int(self.lead * CLOCK_RATE))
            began = time.perf_counter()
            self.start.record()
            result = call()
            self.end.record()
            self.hosts.append(time.perf_counter() - began)
            self.end.synchronize()
            return self.start.elapsed_time(self.end) * 1e-3, result
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        return time.perf_counter() - began, result

    def settle(self, calls: int) -> None:
        """Spin for twice as long as the host needed for the slowest of the last calls: all is enqueued by then."""
        self.lead = min(max(2 * max(self.hosts[-calls:]), 50e-6), 20e-3)
        self.hosts.clear()


def clock(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def cache_bytes(level: int | None = None) -> int:
    """Bytes of a cache of the first core, by default of the last level; 1 MiB (L2), 32 MiB where nobody knows."""
    found = {}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = path.read_text().strip()
        if size.endswith("K") and size[:-1].isdigit():
            found[int(path.with_name("level").read_text())] = int(size[:-1]) << 10
    return found.get(level or max(found, default=0), 1 << 20 if level == 2 else 32 << 20)


Contender = Callable[[int], Callable[[], Any]]


def race(
    contenders: dict[str, Contender], clock: CpuClock | CudaClock, protocol: Protocol
) -> tuple[dict[str, Times], dict[str, tuple[int, Any]]]:
    """Times of each contender, and `(number of its last call, what that returned)`, to be judged again.

    Args:
        contenders: from the number of a call to the call: what must be done before, and not be timed, is done then.
    """
    times = {name: Times() for name in contenders}
    last: dict[str, tuple[int, Any]] = {}
    order, rng, number = list(contenders), random.Random(0), 0

    def round_of_all(record: bool) -> None:
        nonlocal number
        for kind in range(clock.kinds):
            rng.shuffle(order)
            for name in order:
                # what a caller would have dropped by now must not keep its memory from the next result
                last.pop(name, None)
                seconds, result = clock.time(contenders[name](number), kind)
                last[name] = number, result
                if record and kind == 0:
                    times[name].device.append(seconds)
                if record and kind == clock.kinds - 1:
                    times[name].wall.append(seconds)
            number += 1

    with collector_off():
        for _ in range(protocol.warmup):
            began = time.perf_counter()
            round_of_all(record=False)
        clock.settle(len(contenders))
        rounds = int(protocol.seconds / (time.perf_counter() - began))
        for _ in range(min(max(rounds, protocol.least), protocol.most)):
            round_of_all(record=True)
    return times, last


@contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection in the middle of a call."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def copy_contender(device: str) -> tuple[Contender, int]:
    """A copy of a large buffer, and the bytes it reads and writes: the ceiling of what only moves data."""
    source = torch.zeros(COPY_BYTES[device] // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source).fill_(1)
    return lambda number: lambda: target.copy_(source), 2 * source.nbytes


def matrix_contender(device: str, dtype: torch.dtype) -> tuple[Contender, int]:
    """A large matrix product of random numbers, and its operations: the ceiling of what multiplies matrices."""
    side = MATRIX_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    return lambda number: lambda: a @ b, 2 * side**3
