"""The Triton kernels of attention_moments and attention_columns interpreted, run by tests/test_attention_maps.py.

`TRITON_INTERPRET` has to be set before triton is imported, and pytest does not collect this file by its name.
"""

import runpy
from pathlib import Path

import pytest
import torch

from semantica.benchmarks.kernels.implementations import ours
from semantica.benchmarks.kernels.problems import Problem
from semantica.benchmarks.kernels.suite import ProblemRace
from semantica.kernels import OPERATORS, attention_moments, replay
from semantica.kernels.attention_columns import backward as columns_backward
from semantica.kernels.attention_columns import forward as columns_forward
from semantica.kernels.attention_moments import backward as moments_backward
from semantica.kernels.attention_moments import forward as moments_forward
from semantica.kernels.attention_moments.cases import AttentionMomentsCase

oracle = runpy.run_path(str(Path(__file__).parents[1] / "test_kernels.py"))
run_guarded = runpy.run_path(str(Path(__file__).with_name("guards.py")))["run_guarded"]
MODULES = {
    "attention_moments": (moments_forward, moments_backward, (True, True, True)),
    "attention_columns": (columns_forward, columns_backward, (True, True)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("case", ["tiny", "absent", "views", "wide head"])
def test_nothing_is_read_or_written_outside_and_nothing_left_unwritten(name, case):
    forward, backward, needs = MODULES[name]
    q, k, lse, fourth, lengths, _ = OPERATORS[name].cases[case].inputs(torch.float16).values()
    batched = name == "attention_columns" and fourth.ndim == 2 or fourth.ndim == 3
    fourth = fourth if batched else fourth[None]
    if lengths is not None:
        for b, length in enumerate(lengths.tolist()):
            # what stands in the tokens that are not there does not matter
            k[b, length:] = float("nan")
    given = [a for a in (q, k, lse, fourth, lengths) if a is not None]
    launches, outputs = forward.plan_forward(q, k, lse, fourth, lengths)
    (out,) = run_guarded(launches, given, outputs)
    assert torch.equal(out, forward.forward(q, k, lse, fourth, lengths))
    cotangent = torch.randn(out.shape)
    launches, outputs = backward.plan_backward(cotangent, q, k, lse, fourth, lengths, needs)
    results = run_guarded(launches, [*given, cotangent], outputs)
    again = [a for a in backward.backward(cotangent, q, k, lse, fourth, lengths, needs) if a.numel()]
    assert len(results) == len(again) and all(torch.equal(a, b) for a, b in zip(results, again))


@pytest.mark.parametrize("name", MODULES)
def test_benches_time_them_in_16_bits(name):
    """They make P in the features' type, which fp32 results are not asked to hide."""
    problem = Problem(name, OPERATORS[name].cases["tiny"], torch.float16, "cpu")
    race = ProblemRace(problem, ours(name), ("forward", "backward"))
    for direction in ("forward", "backward"):
        race.check("fused", direction)
    assert not race.wrong and race.accuracy["fused", True].error > 0


def test_a_later_call_plans_nothing(monkeypatch):
    case = AttentionMomentsCase(1, 20, 2, 32, 9)
    attention_moments(**case.inputs(torch.float32, seed=1))
    monkeypatch.setattr(replay, "Replay", None)
    inputs = case.inputs(torch.float32, seed=2)
    expected = OPERATORS["attention_moments"].reference(**inputs)
    torch.testing.assert_close(attention_moments(**inputs), expected, rtol=0, atol=1e-5)


def test_offsets_beyond_32_bits():
    """Samples 2^31 values apart: pages that nothing touches take no memory."""
    inputs = AttentionMomentsCase(2, 5, 1, 16, 3).inputs(torch.float32)
    q = torch.empty(2**31 + 4096).as_strided(inputs["q"].shape, (2**31, 16, 16, 1)).copy_(inputs["q"])
    assert torch.equal(attention_moments(**{**inputs, "q": q}), attention_moments(**inputs))
