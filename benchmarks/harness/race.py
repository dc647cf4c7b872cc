"""The race of operators: contenders in random order within rounds, warmed up alike, every call timed by itself.

Before each call the L2 cache is filled with other data. A processor's L3 is left as the last calls left it: an operator
usually reads what another has just written.

A GPU has two times, each taken in calls of its own. The device's: between two events around the call, enqueued behind a
kernel that spins, so that the device never waits for the host. The one on the wall: from an idle device to an idle one.
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

# ceilings are the rates of a product of square matrices with this side, and of a copy of so many bytes
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
# an upper bound of GPU clocks in Hz, those of consumer cards: spinning takes at least the asked time
CLOCK_RATE = 3.2e9


@dataclass(frozen=True)
class Protocol:
    """How often everything is run: as often as fits into some seconds, between a least and a most number of rounds."""

    warmup: int = 3
    least: int = 15
    most: int = 100
    seconds: float = 2.0

    def rounds(self, seconds: float) -> int:
        """How many rounds there are, of so many seconds each."""
        return min(max(int(self.seconds / seconds), self.least), self.most)


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
        # twice the L2 of all cores in use: each thread reads its own part
        self.sweep = torch.zeros(2 * cache_bytes(2) * torch.get_num_threads() // 4, dtype=torch.int32)

    def time(self, call: Callable[[], Any], kind: int) -> tuple[float, Any]:
        # only read: modified lines would have to be written back during the call
        self.sweep.amax()
        began = time.perf_counter()
        result = call()
        return time.perf_counter() - began, result

    def calibrate(self, calls: int) -> None:
        """Calls are done when they return: there is no lead to choose."""


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

    def calibrate(self, calls: int) -> None:
        """Choose for how long the device spins: twice what the host took to enqueue the slowest of the last calls."""
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


class Failed(RuntimeError):
    """A contender's call raised while it was raced; its cause is what it raised.

    Attributes:
        name: the contender's.
    """

    def __init__(self, name: str):
        super().__init__(f"{name} failed while it was raced")
        self.name = name


def race(
    contenders: dict[str, Contender], clock: CpuClock | CudaClock, protocol: Protocol
) -> tuple[dict[str, Times], dict[str, tuple[int, Any]]]:
    """Times of each contender, and `(number of its last call, what that returned)`, to be judged again.

    Args:
        contenders: from the number of a call to the call; what must precede it untimed is done when it is asked for.

    Raises:
        Failed: by one of them there are no times.
    """
    times = {name: Times() for name in contenders}
    last: dict[str, tuple[int, Any]] = {}
    order, rng, number = list(contenders), random.Random(0), 0

    def round_of_all(record: bool) -> None:
        nonlocal number
        for kind in range(clock.kinds):
            rng.shuffle(order)
            for name in order:
                # a caller would have dropped the result of the call before: its memory is free for the next
                last.pop(name, None)
                try:
                    seconds, result = clock.time(contenders[name](number), kind)
                except Exception as error:
                    raise Failed(name) from error
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
        clock.calibrate(len(contenders))
        for _ in range(protocol.rounds(time.perf_counter() - began)):
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
    """A large matrix product of random numbers, and its operations: the ceiling of what multiplies matrices.

    On a CPU as the convolution of one pixel that it is: oneDNN makes that in any type with the processor's widest
    instructions, while MKL's product in fp32 uses half of them on AMD (measured: 207 and 441 GFLOP/s).
    """
    side = MATRIX_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    if device != "cpu":
        return lambda number: lambda: a @ b, 2 * side**3
    pixels, weight = a.view(1, 1, side, side).permute(0, 3, 1, 2), b.view(side, side, 1, 1)
    return lambda number: lambda: torch.nn.functional.conv2d(pixels, weight), 2 * side**3


class Ceilings:
    """Rates of a copy and of matrix products, between the rounds of a race of whole runs: the highest of all calls."""

    @staticmethod
    def bytes(device: str) -> int:
        """What they hold of the device: two buffers, and three matrices in each of two types."""
        return 2 * COPY_BYTES[device] + 3 * (4 + 2) * MATRIX_SIDE[device] ** 2

    def __init__(self, device: str):
        self.clock = clock(device)
        self.runners = {"copy": copy_contender(device)}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            self.runners[name] = matrix_contender(device, dtype)
        self.times: dict[str, list[float]] = {name: [] for name in self.runners}

    def measure(self) -> None:
        for name, (contender, _) in self.runners.items():
            call = contender(0)
            # untimed: threads sleep and clocks are low after the runs of other processes
            call()
            self.times[name] += [self.clock.time(call, 0)[0] for _ in range(3)]

    def rates(self) -> dict[str, float]:
        """Empty where nothing was measured."""
        if not self.times["copy"]:
            return {}
        rate = {name: amount / min(self.times[name]) for name, (_, amount) in self.runners.items()}
        return {
            "copy_gbps": rate["copy"] / 1e9,
            "matrix_tflops": rate["bf16"] / 1e12,
            "matrix_tflops_fp32": rate["fp32"] / 1e12,
        }
