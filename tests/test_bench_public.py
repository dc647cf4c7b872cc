"""`semantica bench kernels --models`: the shapes of public models, counted; sums of an evaluation."""

import dataclasses

import pytest
import torch

from semantica.benchmarks.harness.summary import evaluations
from semantica.benchmarks.kernels import problems
from semantica.benchmarks.kernels.implementations import group_norm_native
from semantica.benchmarks.kernels.public import counts
from semantica.benchmarks.kernels.suite import KernelBench
from semantica.cli import main
from semantica.kernels import group_norm_ref
from semantica.kernels.cross_attention.cases import CrossAttentionCase
from semantica.kernels.group_norm.cases import GroupNormCase


def test_shapes_of_stable_diffusion_are_counted():
    unet, decoder = counts("sd-1.5").values()
    assert list(counts("sd-1.5")) == ["sd-1.5 UNet, 512 px", "sd-1.5 decoder, 512 px"]
    # 22 residual blocks of two norms, one before each of 16 transformers, the last; 14 blocks, an attention, the last
    norms = {case: count for (op, case), count in unet.items() if op == "group_norm"}
    assert sum(norms.values()) == 2 * 22 + 16 + 1 and sum(decoder.values()) == 2 * 14 + 1 + 1
    assert sum(count for case, count in norms.items() if case.addend) == 22
    assert sum(count for case, count in norms.items() if case.activation == "none") == 16
    # the widest: up-sampled 640 channels beside a skip of 320
    wide = GroupNormCase((2, 960, 64, 64), 32, film=False, channels_last=True)
    assert norms[wide] == 1 and not any(case.film for case in norms)
    crossings = {case: count for (op, case), count in unet.items() if op == "cross_attention"}
    assert {(c.queries, c.heads, c.dim, c.sizes): n for c, n in crossings.items()} == {
        (4096, 8, 40, (77,)): 5, (1024, 8, 80, (77,)): 5, (256, 8, 160, (77,)): 5, (64, 8, 160, (77,)): 1,
    }  # fmt: skip
    assert decoder["group_norm", GroupNormCase((1, 256, 512, 512), 32, film=False, channels_last=True)] == 1


def test_adapters_are_a_stream_and_sdxl_has_heads_of_64():
    unet, _ = counts("sdxl-base+ip-adapter-plus").values()
    crossings = {case: count for (op, case), count in unet.items() if op == "cross_attention"}
    # 1, 2 and 10 blocks in each transformer
    assert crossings == {
        CrossAttentionCase(2, 4096, 10, 64, (77, 16), gates=True, q_norm=False): 2 * 2 + 3 * 2,
        CrossAttentionCase(2, 1024, 20, 64, (77, 16), gates=True, q_norm=False): 10 * (2 + 3 + 1),
    }


def test_a_bench_of_models_and_what_memory_does_not_hold(monkeypatch):
    bench = KernelBench(device="cpu", quick=True, models=("sd-1.5",), directions=("forward",))
    assert len({problem for problem, _ in bench.races}) == len(bench.calls) == len(set(bench.calls)) == 33
    assert sum(calls.get("sd-1.5 UNet, 512 px", 0) for calls in bench.calls.values()) == 77
    # 120 bytes for each of 2^25 elements and a half more
    monkeypatch.setattr(problems.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 180 << 25)
    small = KernelBench(device="cpu", quick=True, models=("sd-1.5",), directions=("forward",))
    gone = [problem.case.shape for problem in bench.calls if problem.name in small.absent]
    assert gone == [(1, 256, 512, 512)] and "GiB" in str(small.absent)
    # what is left out counts among all the calls, so that a sum without it says that it is one
    asked = [small.asked(problem) for problem in small.calls if problem.name not in small.absent]
    decoder = [found for found in asked if "sd-1.5 decoder, 512 px" in found["calls"]]
    assert {found["calls_of_all"]["sd-1.5 decoder, 512 px"] for found in decoder} == {30}
    assert sum(found["calls"]["sd-1.5 decoder, 512 px"] for found in decoder) == 29


def test_an_evaluation_is_the_sum_over_its_calls():
    row = dict(op="group_norm", dtype="float32", direction="forward", layout="contiguous")
    both, one = {"UNet": 2, "decoder": 1}, {"UNet": 3}
    times = [("a", "fused", 1e3, one), ("a", "eager", 4e3, one), ("b", "fused", 5e3, both), ("b", "eager", 7e3, both)]
    times += [("b", "native", 6e3, both)]
    row["calls_of_all"] = {"UNet": 5, "decoder": 4}
    rows = [row | dict(shape=shape, impl=impl, median_us=us, calls=calls) for shape, impl, us, calls in times]
    assert evaluations(rows) == [
        ("UNet", "group_norm", "float32", "forward", "5", "13.00", "", "26.00", "", "24.00"),
        # of three calls no row tells
        ("decoder", "group_norm", "float32", "forward", "1 of 4", "5.00", "6.00", "7.00", "", "6.00"),
    ]
    assert evaluations([row | dict(shape="a", impl="fused", median_us=1.0)]) == []


@pytest.mark.parametrize("addend", [True, False])
def test_rivals_without_an_addend_add_it_themselves(addend):
    case = dataclasses.replace(GroupNormCase((2, 8, 4, 4), 4, channels_last=True), addend=addend)
    given = case.inputs(torch.float64)
    torch.testing.assert_close(group_norm_native(**given), group_norm_ref(**given), rtol=1e-9, atol=1e-9)


def test_unknown_models_are_one_line(capsys):
    assert main(["bench", "kernels", "--quick", "--models", "sd-9"]) == 2
    said = capsys.readouterr().err
    assert "--models sd-9: neither one of sd-1.5" in said and said.count("\n") == 1
    # their calls would be added up
    assert main(["bench", "kernels", "--quick", "--models", "sd-1.5,elsewhere/sd-1.5"]) == 2
    assert "two are called alike" in capsys.readouterr().err
