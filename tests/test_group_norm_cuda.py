"""The CUDA kernels of group_norm, from their own text, on the bench of tests/cuda_host; and how they are planned.

On a GPU the same cases run through the operator: see test_kernels.
"""

import dataclasses
import itertools
import math
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from semantica.kernels.group_norm.cases import CASES, GroupNormCase
from semantica.kernels.group_norm.cuda_plan import Limits, Plan, plan
from semantica.kernels.group_norm.op import group_norm_ref, plus

sys.path.insert(0, str(Path(__file__).parent / "cuda_host"))
import building as cuda_host

needs_compiler = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")
oracle = runpy.run_path(str(Path(__file__).with_name("test_kernels.py")))
run, widen, assert_accurate = (oracle[name] for name in ("run", "widen", "assert_accurate"))
group_norm_exact = oracle["group_norm_exact"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
H100 = Limits(132, 227 << 10, 16)
# cards on which little fits, so that clusters are large, rings run round and grids meet
CARDS = {
    "one block": Limits(1, 227 << 10, 1),
    "clusters": Limits(16, 64 << 10, 8),
    "grid": Limits(8, 20 << 10, 1),
}
EXTRA = {
    "wide": GroupNormCase((2, 320, 12, 11), 32, channels_last=True),
    "no activation": GroupNormCase((2, 24, 9, 5), 4, film=False, activation="none", channels_last=True),
    "many pixels": GroupNormCase((1, 16, 61, 43), 2, channels_last=True, addend=True),
    "large values": GroupNormCase((1, 32, 16, 24), 4, channels_last=True, mean=3000.0, addend=True),
}
PROVEN = CASES | EXTRA
NAMES = ("out", "mean", "rstd", "x", "weight", "bias", "scale", "shift", "addend")


def sizes(case: GroupNormCase) -> tuple[int, int, int, int]:
    batch, channels, *spatial = case.shape
    return batch, channels, case.groups, math.prod(spatial)


def planned(case: GroupNormCase, dtype: torch.dtype, operands: int, card: Limits) -> Plan:
    """With the fewest threads that will do, and as much memory as they need: a thread of the bench costs time."""
    few = (
        dataclasses.replace(card, threads=threads, shared=card.shared * more)
        for more in (1, 4)
        for threads in (32, 64, 160, 320, 512)
    )
    made = (plan(*sizes(case), dtype.itemsize, operands, limits) for limits in few)
    return next(found for found in made if found is not None)


def packed(case: GroupNormCase, dtype: torch.dtype, inputs: dict, card: Limits, seeds: int) -> bytes:
    plans = [planned(case, dtype, operands, card) for operands in (1, 2)]
    kind, present = DTYPES[dtype], [inputs.get(name) is not None for name in ("scale", "shift", "addend")]
    blocks = max(made.blocks(case.shape[0], case.shape[1]) for made in plans)
    head = [*sizes(case), kind, kind, kind, case.activation == "silu", *present, seeds, max(blocks, 8), 0]
    for made in plans:
        head += dataclasses.astuple(made)
    g = torch.Generator().manual_seed(7)
    cotangent = torch.randn(inputs["x"].shape, generator=g, dtype=torch.float64).to(dtype)
    arrays = [inputs["x"], cotangent, *(inputs.get(name) for name in ("weight", "bias", "scale", "shift", "addend"))]
    return struct.pack("28q", *map(int, head)) + b"".join(map(raw, arrays))


def raw(tensor: torch.Tensor | None) -> bytes:
    """As it lies in memory, channels last."""
    if tensor is None:
        return b""
    flat = tensor.flatten(2).transpose(1, 2) if tensor.ndim > 2 else tensor
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


def unpacked(data: memoryview, case: GroupNormCase, dtype: torch.dtype, inputs: dict) -> tuple[dict, memoryview]:
    batch, channels, groups, pixels = sizes(case)
    whole, each = (batch, pixels, channels), (batch, groups)
    shapes = {"out": whole, "mean": each, "rstd": each, "x": whole}
    shapes |= {name: tuple(inputs[name].shape) for name in NAMES[4:] if inputs.get(name) is not None}
    found = {}
    for name, shape in shapes.items():
        kind = torch.float32 if name in ("mean", "rstd") else dtype
        count = math.prod(shape) * kind.itemsize
        flat = torch.from_numpy(np.frombuffer(data[:count], np.uint8).copy()).view(kind).reshape(shape)
        found[name] = flat.transpose(1, 2).reshape(case.shape) if name in ("out", "x") else flat
        data = data[count:]
    return found, data


def on_the_bench(program: Path, problems: list[tuple], seeds: int) -> list[dict]:
    """Results of `(case, dtype, inputs, card)`, each the same under all seeds."""
    given = b"".join(packed(*problem, seeds) for problem in problems)
    done = subprocess.run(
        [program], input=given, capture_output=True, timeout=600, env={"PATH": "/usr/bin:/bin"} | cuda_host.ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    data, results = memoryview(done.stdout), []
    for case, dtype, inputs, _ in problems:
        found, data = unpacked(data, case, dtype, inputs)
        results.append(found)
    assert not len(data)
    return results


@pytest.fixture(scope="module")
def programs():
    return cuda_host.build("run_group_norm.cu", *cuda_host.FLAVOURS)


def check(case: GroupNormCase, dtype: torch.dtype, inputs: dict, actual: dict) -> None:
    contiguous = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    eager, truth = run(group_norm_ref, contiguous, dtype), run(group_norm_exact, widen(inputs), dtype)
    assert_accurate(actual, eager, truth, dtype)
    wide = widen(inputs)
    grouped = plus(wide["x"], wide.get("addend")).reshape(len(wide["x"]), case.groups, -1)
    variance, mean = torch.var_mean(grouped, -1, correction=0)
    torch.testing.assert_close(actual["mean"].double(), mean, rtol=3e-7, atol=1e-6)
    # the addend and the pivot, of the mean's size, meet in fp32
    torch.testing.assert_close(actual["rstd"].double(), (variance + 1e-5).rsqrt(), rtol=5e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_accurate(programs, dtype, card):
    problems = [
        (case, dtype, case.inputs(dtype), CARDS[card])
        # fp16 differs from bf16 in two conversions
        for case in list(PROVEN.values())[:: 1 if dtype != torch.float16 else 4]
    ]
    for given, actual in zip(problems, on_the_bench(programs["plain"], problems, 1)):
        check(*given[:3], actual)


FEW = [
    (GroupNormCase((1, 16, 22, 21), 2, addend=True), "clusters"),
    (GroupNormCase((1, 16, 40, 33), 2, addend=True), "grid"),
    (GroupNormCase((2, 6, 5, 4), 2, film=False), "grid"),
]


@needs_compiler
@pytest.mark.parametrize("flavour, seeds", [("plain", 20), ("asan", 2), ("tsan", 2)])
def test_the_same_bits_in_every_order_and_no_race_or_overrun(programs, flavour, seeds):
    tight = {"clusters": Limits(16, 8 << 10, 8), "grid": Limits(4, 8 << 10, 1)}
    problems = [(case, torch.bfloat16, case.inputs(torch.bfloat16), tight[card]) for case, card in FEW]
    plans = [planned(*given[:2], operands, given[3]) for given in problems for operands in (1, 2)]
    assert {made.grid for made in plans if made.chunks > 1} == {True, False}
    assert any(made.reread(*given[0].shape[:2], sizes(given[0])[3]) for made, given in zip(plans[::2], problems))
    for given, actual in zip(problems, on_the_bench(programs[flavour], problems, seeds)):
        check(*given[:3], actual)


SHAPES = {
    # shape, groups -> blocks of a unit, channels of a unit, share that is read again; bf16, forward
    (1, 320, 4096, 32): (16, 40, 0.0),
    (8, 320, 4096, 32): (4, 40, 0.0),
    (8, 640, 1024, 32): (2, 40, 0.0),
    (1, 128, 20 * 65536, 32): (132, 128, 0.92),
}


def test_plans_fill_a_card_and_read_once_where_a_unit_fits():
    for (samples, channels, pixels, groups), (chunks, width, reread) in SHAPES.items():
        made = plan(samples, channels, groups, pixels, 2, 1, H100)
        assert (made.chunks, made.width) == (chunks, width) and made.vector == 8
        assert made.reread(samples, channels, pixels) == pytest.approx(reread, abs=0.005)
        assert made.blocks(samples, channels) >= 120 and made.grid == (chunks > 16)
        assert made.shared <= H100.shared and made.threads <= H100.threads and made.threads % 32 == 0


def test_plans_are_possible_for_every_size():
    cards = (H100, Limits(108, 163 << 10, 1), Limits(128, 99 << 10, 1), Limits(188, 99 << 10, 8))
    for channels, groups in ((32, 32), (30, 3), (18, 6), (320, 32), (960, 32), (1, 1), (512, 1), (2560, 32)):
        drawn = itertools.product((1, 3, 64), (1, 63, 4096), (2, 4), (1, 2), cards)
        for samples, pixels, itemsize, operands, card in drawn:
            made = plan(samples, channels, groups, pixels, itemsize, operands, card)
            if made is None:
                continue
            assert channels % made.width == 0 and made.width % (channels // groups) == 0
            assert made.width % made.vector == 0 and made.rows & (made.rows - 1) == 0
            assert made.threads % 32 == 0 and made.threads <= card.threads and made.shared <= card.shared
            if made.grid:
                assert made.blocks(samples, channels) <= card.multiprocessors
            else:
                assert made.chunks <= card.cluster and made.reread(samples, channels, pixels) == 0
    # what a Stable Diffusion or a U-ViT block asks for is served
    for channels in (128, 256, 320, 512, 640, 960, 1280, 1920, 2560):
        assert plan(2, channels, 32, 1024, 2, 1, H100) and plan(2, channels, 32, 1024, 2, 2, H100)
