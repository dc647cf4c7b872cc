"""The CUDA kernels of group_norm, from their own text, on the bench of tests/cuda_host; and how they are planned.

On a GPU the same cases run through the operator: see test_kernels.
"""

import dataclasses
import itertools
import math
import re
import runpy
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from semantica.kernels.group_norm.cases import CASES, GroupNormCase
from semantica.kernels.group_norm.cuda_plan import (
    CARDS,
    GRID,
    PLAIN,
    RESIDENT,
    Card,
    Plan,
    Problem,
    candidates,
    plan,
)
from semantica.kernels.group_norm.op import group_norm_ref, plus

sys.path.insert(0, str(Path(__file__).parent / "cuda_host"))
import building as cuda_host

needs_compiler = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")
oracle = runpy.run_path(str(Path(__file__).with_name("test_kernels.py")))
run, widen, assert_accurate, exact = (oracle[k] for k in ("run", "widen", "assert_accurate", "group_norm_exact"))

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NAMES = ("out", "mean", "rstd", "x", "weight", "bias", "scale", "shift", "addend")
# blocks small enough for many of them to meet, and for what they read not to fit
SMALL = Card((9, 0), 5, 20 << 10, 21 << 10, 0, threads=64)
MORE = {
    "wide": GroupNormCase((2, 320, 12, 11), 32, channels_last=True),
    "a wide group": GroupNormCase((1, 1100, 4, 2), 2, channels_last=True),
    "a group in parts": GroupNormCase((1, 100, 3, 3), 1, channels_last=True),
    "pixels side by side": GroupNormCase((2, 18, 8, 12), 6, channels_last=True),
    "single channels": GroupNormCase((1, 16, 61, 43), 16, channels_last=True),
    "long channels": GroupNormCase((1, 6, 64, 40), 2),
    "many channels": GroupNormCase((2, 96, 4, 6), 2),
    "odd": GroupNormCase((2, 14, 5, 7), 2),
    "an outlier": GroupNormCase((1, 16, 24, 16), 2, channels_last=True, mean=3.0),
}
PROVEN = CASES | MORE


@dataclass(frozen=True)
class Trial:
    """One problem, and the plans that are to solve it."""

    name: str
    case: GroupNormCase
    dtype: torch.dtype
    plans: tuple[Plan, Plan]
    fp32: bool = False
    offset: int = 0

    @property
    def inputs(self) -> dict:
        inputs = self.case.inputs(self.dtype)
        if self.name == "an outlier":
            inputs["x"][0, 3, 0, 0] = 2000.0
        if self.fp32:
            names = ("weight", "bias", "scale", "shift", "addend")
            inputs |= {name: inputs[name].float() for name in names if inputs.get(name) is not None}
        return inputs


def sizes(case: GroupNormCase, dtype: torch.dtype, aligned: bool = True) -> Problem:
    batch, channels, *spatial = case.shape
    return Problem(batch, channels, case.groups, math.prod(spatial), dtype.itemsize, case.channels_last, aligned)


def planned(case, dtype, path, card=SMALL, aligned=True) -> tuple[Plan, Plan] | None:
    found = [plan(sizes(case, dtype, aligned), operands, card, path) for operands in (1, 2)]
    return None if None in found else tuple(found)


def in_memory(tensor: torch.Tensor | None, case: GroupNormCase) -> bytes:
    if tensor is None:
        return b""
    if tensor.ndim > 2:
        tensor = tensor.flatten(2).transpose(1, 2) if case.channels_last else tensor
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def request(trial: Trial, seeds: int) -> bytes:
    case, inputs = trial.case, trial.inputs
    problem = sizes(case, trial.dtype)
    # rows of FiLM further apart than they are long, as views of one tensor have them
    gap = case.shape[1] + 3
    film = {name: inputs.get(name) for name in ("scale", "shift", "addend")}
    strides = [0 if value is None else gap for value in film.values()]
    resident = max(made.blocks if made.path == GRID else 8 for made in trial.plans)
    flags = [trial.fp32, trial.fp32, case.channels_last, case.activation == "silu"]
    head = [*dataclasses.astuple(problem)[:4], DTYPES[trial.dtype], *flags, *strides, seeds, resident, trial.offset]
    for operands, made in enumerate(trial.plans, 1):
        head += [*dataclasses.astuple(made)[:-1], made.workspace(problem, operands)]
    g = torch.Generator().manual_seed(7)
    cotangent = torch.randn(inputs["x"].shape, generator=g, dtype=torch.float64).to(trial.dtype)
    skipped = b"\xff" * (trial.offset * trial.dtype.itemsize)
    body = [skipped + in_memory(a, case) for a in (inputs["x"], cotangent)]
    body += [in_memory(inputs[name], case) for name in ("weight", "bias")]
    padded = (None if a is None else torch.cat([a, torch.full_like(a[:, :3], math.nan)], 1) for a in film.values())
    body += [in_memory(a, case) for a in padded]
    return struct.pack(f"{len(head)}q", *map(int, head)) + b"".join(body)


def answers(data: memoryview, trial: Trial) -> tuple[dict, memoryview]:
    case, inputs = trial.case, trial.inputs
    batch, channels, *_ = case.shape
    pixels = math.prod(case.shape[2:])
    like_x = (batch, pixels, channels) if case.channels_last else (batch, channels, pixels)
    shapes = {"out": like_x, "mean": (batch, case.groups), "rstd": (batch, case.groups), "x": like_x}
    shapes |= {name: tuple(inputs[name].shape) for name in NAMES[4:] if inputs.get(name) is not None}
    found = {}
    for name, shape in shapes.items():
        dtype = torch.float32 if name in ("mean", "rstd") or (trial.fp32 and name in NAMES[4:]) else trial.dtype
        count = math.prod(shape) * dtype.itemsize
        value = torch.from_numpy(np.frombuffer(data[:count], np.uint8).copy()).view(dtype).reshape(shape)
        if name in ("out", "x"):
            value = (value.transpose(1, 2) if case.channels_last else value).reshape(case.shape)
        found[name], data = value, data[count:]
    return found, data


def start(program: Path, trials: list[Trial], seeds: int, *arguments: str) -> subprocess.CompletedProcess:
    given = b"".join(request(trial, seeds) for trial in trials)
    return cuda_host.run(program, *arguments, input=given, limit=600, text=False)


def on_the_bench(program: Path, trials: list[Trial], seeds: int) -> list[dict]:
    """Results of each, the same under all seeds."""
    done = start(program, trials, seeds)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    data, results = memoryview(done.stdout), []
    for trial in trials:
        found, data = answers(data, trial)
        results.append(found)
    assert not len(data)
    return results


def prove(trial: Trial, actual: dict):
    """At most twice the error of eager torch on contiguous input plus one ulp; and the statistics by themselves."""
    inputs, dtype = trial.inputs, trial.dtype
    contiguous = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    eager = run(group_norm_ref, contiguous, dtype)
    truth = run(exact, widen(inputs), dtype)
    assert_accurate(actual, eager, truth, dtype)
    x = plus(widen(inputs)["x"], widen(inputs).get("addend"))
    variance, mean = torch.var_mean(x.reshape(x.shape[0], trial.case.groups, -1), -1, correction=0)
    # of what x's own size in fp32 allows
    size = x.abs().max().item() * 2**-23
    assert (actual["mean"].double() - mean).abs().max() <= size + 1e-6
    torch.testing.assert_close(actual["rstd"].double(), (variance + 1e-5).rsqrt(), rtol=3e-6, atol=0)


@pytest.fixture(scope="module")
def programs():
    """The program in a flavour."""
    return lambda flavour: cuda_host.build("run_group_norm.cu", flavour)[flavour]


def trials(dtype: torch.dtype, names=PROVEN, card=SMALL) -> list[Trial]:
    """Every case in both layouts by every path that serves it; FiLM's types, addends and offsets by turns."""
    found = []
    for name in names:
        case = PROVEN[name]
        for last in (False, True) if len(case.shape) > 3 else (False,):
            for path in (RESIDENT, GRID, PLAIN):
                turn = len(found)
                addend, aligned = case.addend or (turn % 2 == 0 and name in MORE), turn % 7 != 3
                one = dataclasses.replace(case, channels_last=last, addend=addend)
                if plans := planned(one, dtype, path, card, aligned):
                    mixed = dtype != torch.float32 and turn % 5 == 2
                    found.append(Trial(name, one, dtype, plans, mixed, int(not aligned)))
    return found


@needs_compiler
@pytest.mark.parametrize("part", ["every fourth", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_accurate(programs, dtype, part):
    given = trials(dtype)[:: 1 if part == "all" else 4]
    assert {path for trial in given for path in (made.path for made in trial.plans)} == {RESIDENT, GRID, PLAIN}
    for trial, actual in zip(given, on_the_bench(programs("plain"), given, 1), strict=True):
        try:
            prove(trial, actual)
        except AssertionError as error:
            raise AssertionError(f"{trial}: {error}") from error


# little room: blocks of one warp or two that form clusters and rounds, keep a part, and pass the rest through rings
TIGHT = Card((9, 0), 4, 12 << 10, 13 << 10, 0, threads=64)
RACED = ("one group", "odd channels", "pixels side by side", "a group in parts", "long channels")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("flavour, seeds", [("plain", 20), ("asan", 2), ("tsan", 1)])
def test_every_order_gives_the_same_bits_and_no_race_or_overrun(programs, flavour, seeds):
    given = trials(torch.bfloat16, RACED, TIGHT)
    plans = [made for trial in given for made in trial.plans]
    for holds in (
        lambda made: made.path == RESIDENT and made.chunks > 1,
        lambda made: made.path == RESIDENT and made.parts > 1,
        lambda made: made.path == GRID and made.rounds > 2,
        lambda made: made.path == GRID and 0 < made.kept < made.items,
        lambda made: made.path == GRID and made.chunks > 1,
        lambda made: made.path == PLAIN and made.chunks > 1,
        lambda made: made.path == PLAIN and made.items > 8,
        lambda made: made.repeat > 1,
    ):
        assert any(map(holds, plans))
    on_the_bench(programs(flavour), given, seeds)


MEETS = re.compile(r"__syncthreads\(|grid_sync\(|cp_async_wait<|\.sync\(|\.barrier_(arrive|wait)\(")


@needs_compiler
@pytest.mark.slow
def test_no_barrier_or_wait_can_be_left_out(programs):
    given = trials(torch.bfloat16, RACED, TIGHT)
    reached = start(programs("plain"), given, 1, "list").stdout.decode().split()
    kernels = [path for path in cuda_host.CUDA.glob("*.cu*") if path.name != "device.cuh"]
    assert set(reached) == {
        f"{path.name}:{i}"
        for path in kernels
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if MEETS.search(line)
    }
    for place in reached:
        # other bits in another order, or a fault; else a race, which takes longer to find
        noticed = (
            start(programs(flavour), given, seeds, *place.split(":")).returncode in (code, cuda_host.FAULT)
            for flavour, seeds, code in (("plain", 8, 5), ("tsan", 1, 66))
        )
        assert any(noticed), f"nobody notices that {place} is left out"


@needs_compiler
def test_a_plan_without_room_is_refused(programs):
    case = CASES["tiny"]
    forward, backward = planned(case, torch.float32, RESIDENT)
    for plans in (
        (dataclasses.replace(forward, shared=forward.shared - 16), backward),
        (forward, dataclasses.replace(backward, shared=backward.shared - 16)),
        (dataclasses.replace(forward, vector=8), backward),
    ):
        with pytest.raises(AssertionError, match="launch: error 1"):
            on_the_bench(programs("plain"), [Trial("tiny", case, torch.float32, plans)], 1)


# shape, groups, channels last -> path, blocks, microseconds of memory at 4.3 TB/s for bf16: forward, backward
FLOORS = {
    ((1, 320, 4096), 32, True): ((RESIDENT, 128, 1.22), (RESIDENT, 128, 1.83)),
    ((8, 320, 4096), 32, True): ((RESIDENT, 128, 9.8), (RESIDENT, 256, 14.6)),
    ((8, 320, 4096), 32, False): ((RESIDENT, 256, 9.8), (RESIDENT, 256, 14.6)),
    ((1, 128, 20 * 65536), 32, True): ((GRID, 132, 191.3), (GRID, 132, 347.6)),
    ((1, 128, 20 * 65536), 32, False): ((GRID, 132, 156.1), (GRID, 132, 234.1)),
    ((13, 18, 512 * 512), 6, True): ((GRID, 132, 57.1), (GRID, 132, 85.6)),
}


@pytest.mark.parametrize("shape, groups, last", FLOORS)
def test_an_h100_reads_once_what_fits_and_little_of_the_rest_again(shape, groups, last):
    problem = Problem(shape[0], shape[1], groups, shape[2], 2, last)
    for operands, (path, blocks, floor) in enumerate(FLOORS[shape, groups, last], 1):
        made = plan(problem, operands, CARDS["sm_90"])
        assert (made.path, made.blocks, made.vector) == (path, blocks, 8)
        assert made.traffic(problem, operands, CARDS["sm_90"]) / 4.3e6 == pytest.approx(floor, rel=0.01)
        plain = plan(problem, operands, CARDS["sm_90"], PLAIN)
        assert plain.traffic(problem, operands, CARDS["sm_90"]) >= made.traffic(problem, operands, CARDS["sm_90"])


def test_every_candidate_can_be_launched():
    sizes = (1, 2048, 1, 4096), (2, 1001, 1, 49), (3, 18, 6, 1000), (64, 320, 32, 64), (2, 30, 3, 35), (1, 8192, 2, 16)
    drawn = itertools.product(sizes, (2, 4), (True, False), (1, 2), CARDS.values())
    for size, itemsize, last, operands, card in drawn:
        problem, paths = Problem(*size, itemsize, last), set()
        for made in candidates(problem, operands, card):
            paths.add(made.path)
            assert made.threads % 32 == 0 and made.rows * made.columns <= made.threads <= card.threads
            assert made.shared <= card.shared and made.blocks % made.team == 0
            together = made.width * made.parts
            assert together == problem.depth if made.parts > 1 else made.width % problem.depth == 0
            if last:
                # a row of threads is a row of memory, which begins at 16 bytes where vectors do
                assert made.columns * made.vector == made.width * made.repeat
                assert made.width % made.vector == 0 or made.width == problem.channels
            else:
                assert made.columns & (made.columns - 1) == 0 and problem.pixels % made.vector == 0
            teams = problem.samples * problem.channels // together
            assert made.blocks // made.team * made.rounds >= teams
            if made.path == GRID:
                assert made.blocks <= card.multiprocessors
            elif made.path == RESIDENT:
                assert made.kept == made.items and made.team <= card.cluster and made.team & (made.team - 1) == 0
        assert paths >= {PLAIN, GRID}
