"""The Triton kernels of group_norm in Triton's interpreter, run by tests/test_group_norm_triton.py in its own process.

`TRITON_INTERPRET` has to be set before triton is imported, and pytest does not collect this file by its name.
"""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from semantica.kernels import group_norm, launch
from semantica.kernels.group_norm.backward import backward, plan_backward
from semantica.kernels.group_norm.cases import CASES as GROUP_NORM
from semantica.kernels.group_norm.cases import GroupNormCase
from semantica.kernels.group_norm.forward import forward, plan_forward
from semantica.kernels.group_norm.op import group_norm_ref
from semantica.kernels.group_norm.specimens import planners
from semantica.kernels.group_norm.tiles import place

oracle = runpy.run_path(str(Path(__file__).parents[1] / "test_kernels.py"))
run, widen, assert_accurate = (oracle[name] for name in ("run", "widen", "assert_accurate"))
group_norm_exact = oracle["group_norm_exact"]
run_guarded = runpy.run_path(str(Path(__file__).with_name("guards.py")))["run_guarded"]

BOTH = [torch.float32, torch.float16]
LAYOUTS = {"contiguous": False, "channels-last": True}
# the interpreter takes about 10 ms per program, so what is cut into many is small
CASES = {
    "odd channels": GROUP_NORM["odd channels"],
    "volume": GROUP_NORM["volume"],
    "prime": GroupNormCase((1, 14, 13, 11), 7),
    "two samples, one group": GroupNormCase((2, 40, 6, 9), 1),
    "one value each": GroupNormCase((2, 5, 1), 5),
    "no activation": GroupNormCase((2, 24, 9, 5), 4, film=False, activation="none"),
}
# what else the shipped ladder meets
SHIPPED = [
    *((case, layout, dtype) for case in GROUP_NORM.values() for layout in LAYOUTS for dtype in BOTH),
    (GroupNormCase((1, 320, 6, 6), 32), "channels-last", torch.float16),
    (GroupNormCase((1, 40, 20, 26), 2), "channels-last", torch.float32),
    (GroupNormCase((1, 6, 130, 64), 1), "contiguous", torch.float16),
]
# everything is split, over channels too, and merged by a launch of its own, in several rounds
SPLIT = {"block": 512, "lanes": 16, "tiles": 1, "programs": [6, 12], "pieces": 0, "warps": 1, "stages": 2}
SMALL = {
    **{name: {"default": [{"width": 0, "warps": 1}]} for name in ("resident", "resident_backward")},
    **{name: {"default": [{"width": 1, **SPLIT}]} for name in ("partial", "partial_backward", "apply_backward")},
    "apply": {"default": [{"width": 1, **SPLIT, "block": 256}]},
    "merge": {"default": [{"width": 1, "block": 2, "warps": 1}]},
    "merge_backward": {"default": [{"width": 1, "lanes": 8, "block": 32, "warps": 1}]},
}
# as above, but the second pass merges
INLINE = SMALL | {"apply": {"default": [{"width": 1, **SPLIT, "block": 1024, "pieces": 4096}]}}
LADDERS = {"shipped": launch.table("group_norm"), "split": SMALL, "merged inline": INLINE}


def use(ladder, monkeypatch):
    monkeypatch.setattr(launch, "table", lambda operator: LADDERS[ladder])
    launch.forget_plans()


@pytest.fixture(autouse=True)
def shipped(monkeypatch):
    use("shipped", monkeypatch)


@pytest.fixture(params=LADDERS)
def ladder(request, monkeypatch, shipped):
    use(request.param, monkeypatch)
    return request.param


def check(inputs, dtype):
    """Output and gradients against float64, beside eager torch on contiguous input; and the strides of the output."""
    actual = run(group_norm, inputs, dtype)
    eager = run(group_norm_ref, {**inputs, "x": inputs["x"].contiguous()}, dtype)
    truth = run(group_norm_ref, widen(inputs), dtype)
    assert actual["out"].stride() == torch.empty_like(inputs["x"]).stride()
    assert_accurate(actual, eager, truth, dtype)
    return actual


def laid_out(case, layout):
    return dataclasses.replace(case, channels_last=LAYOUTS[layout] and len(case.shape) > 3)


@pytest.mark.parametrize("case, layout, dtype", SHIPPED, ids=str)
def test_the_shipped_cuts_are_accurate(case, layout, dtype):
    check(laid_out(case, layout).inputs(dtype), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", ["split", "merged inline"])
def test_any_cut_is_accurate(name, layout, cut, monkeypatch):
    use(cut, monkeypatch)
    check(laid_out(CASES[name], layout).inputs(torch.float32), torch.float32)


def test_the_reference_itself_is_right():
    inputs = CASES["odd channels"].inputs(torch.float64)
    exact, reference = group_norm_exact(**inputs), group_norm_ref(**inputs)
    torch.testing.assert_close(reference, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_digits_stay_where_the_mean_is_large(channels_last, ladder):
    ratio = 1000.0
    case = GroupNormCase((1, 16, 20, 20), 2, False, "none", channels_last, ratio)
    inputs = case.inputs(torch.float32)
    actual, truth = run(group_norm, inputs), run(group_norm_exact, widen(inputs), torch.float32)
    for name, exact in truth.items():
        # the input itself is rounded to ratio * 2^-24 of its standard deviation
        bound = 4 * ratio * 2**-24 * (1 if name == "out" else exact.abs().max())
        assert (actual[name].double() - exact).abs().max() < bound, name


def test_large_half_precision_values_do_not_overflow():
    inputs = CASES["odd channels"].inputs(torch.float16)
    inputs["x"] = inputs["x"] * 1e4
    check(inputs, torch.float16)


@pytest.mark.parametrize("name", ["odd channels", "volume"])
def test_nothing_else_is_written_nothing_stays_unwritten_and_runs_are_bit_equal(name, ladder):
    inputs = CASES[name].inputs(torch.float32)
    x = inputs["x"]
    # the two halves of one tensor, whose rows are not dense
    inputs["scale"], inputs["shift"] = torch.cat([inputs["scale"], inputs["shift"]], 1).chunk(2, 1)
    rest = [inputs[k] for k in ("groups", "weight", "bias", "scale", "shift", "activation")]
    _, mean, rstd = forward(x, *rest, 1e-5)
    dy = torch.empty_like(x).copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    given = [x, dy, mean, rstd, *(a for a in rest if isinstance(a, torch.Tensor))]
    for plan, arguments in ((plan_forward, (x, *rest, 1e-5)), (plan_backward, (dy, x, mean, rstd, *rest))):
        results = [run_guarded(launches, given, outputs) for launches, outputs in (plan(*arguments) for _ in range(2))]
        assert len(results[0]) == len(plan(*arguments)[1])
        assert all(torch.equal(a, b) for a, b in zip(*results))


def strided(tensor, how):
    """The same values, elsewhere in memory."""
    if how == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if how == "permuted":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "swapped":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_shape_and_any_strides(data):
    batch, groups, width = (data.draw(st.integers(1, n)) for n in (3, 5, 5))
    spatial = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    case = GroupNormCase((batch, groups * width, *spatial), groups, True, data.draw(st.sampled_from(["silu", "none"])))
    ways = st.sampled_from(["contiguous", "last", "sliced", "permuted", "swapped"])
    inputs = case.inputs(dtype)
    for name in ("x", "scale", "shift"):
        inputs[name] = strided(inputs[name], data.draw(ways))
    for name in ("scale", "shift"):
        inputs[name] = inputs[name] if data.draw(st.booleans()) else None
    for name in ("weight", "bias"):
        inputs[name] = inputs[name].float() if data.draw(st.booleans()) else inputs[name]
    eps = 1e-2 if groups * width == groups else 1e-5
    dy = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    dy = strided(dy, data.draw(ways)) if data.draw(st.booleans()) else dy[:1, :1].sum().expand(dy.shape)
    ladder = data.draw(st.sampled_from([*LADDERS]))
    with pytest.MonkeyPatch.context() as patch:
        use(ladder, patch)
        arguments = [inputs[k] for k in ("groups", "weight", "bias", "scale", "shift", "activation")]
        y, mean, rstd = forward(inputs["x"], *arguments, eps)
        gradients = backward(dy, inputs["x"], mean, rstd, *arguments)
    exact = widen(inputs)
    names = [n for n in ("x", "weight", "bias", "scale", "shift") if inputs[n] is not None]
    leaves = [exact[n].requires_grad_() for n in names]
    truth = group_norm_ref(**exact, eps=eps)
    # the statistics of one or two values have a variance near 0: there the input's own rounding is amplified by rstd
    loose = float(rstd.max()) ** 2
    small = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    assert y.stride() == torch.empty_like(inputs["x"]).stride()
    torch.testing.assert_close(y.double(), truth.detach(), rtol=small, atol=small * max(1, loose))
    given = dict(zip(("x", "weight", "bias", "scale", "shift"), gradients))
    for name, d in zip(names, torch.autograd.grad(truth, leaves, dy.double())):
        assert given[name].dtype == inputs[name].dtype and given[name].shape == inputs[name].shape
        assert given[name].stride() == torch.empty_like(inputs[name]).stride(), name
        bound = small * max(1, d.abs().max().item()) * max(1, loose)
        torch.testing.assert_close(given[name].double(), d, rtol=small, atol=bound)
    assert all(given[n].numel() == 0 for n in ("scale", "shift") if inputs[n] is None)


def test_the_tuner_gets_the_plans_of_a_call():
    forward, backward = planners(**CASES["odd channels"].inputs(torch.float32))
    assert (len(forward()), len(backward())) == (1, 2)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty_input_launches_nothing(shape):
    x, weight, film = torch.empty(shape), torch.ones(8), torch.ones(shape[0], 8)
    launches, (y, mean, rstd) = plan_forward(x, 4, weight, weight, film, None, "silu", 1e-5)
    assert launches == [] and y.shape == shape and mean.abs().sum() == rstd.abs().sum() == 0
    launches, gradients = plan_backward(x, x, mean, rstd, 4, weight, weight, film, None, "silu")
    assert launches == [] and all(d.abs().sum() == 0 for d in gradients)
    assert [d.shape for d in gradients] == [x.shape, weight.shape, weight.shape, film.shape, (0,)]


@triton.jit
def place_kernel(out, program, steps, chunk, splits, LAST: tl.constexpr):
    _, _, _, _, _, _, length, origin, offsets, _ = place(program, steps, chunk, splits, 64, 64, 1, LAST, 16, 1, 512)
    tl.store(out, origin)
    tl.store(out + 1, tl.max(tl.max(offsets, 1), 0))
    tl.store(out + 2, length)


@pytest.mark.parametrize("last", [False, True])
def test_addresses_do_not_overflow(last):
    pixels, chunk, splits = 2**31 + 16 * 5, 2**20, 2**11 + 1
    out = torch.zeros(3, dtype=torch.int64)
    # the last chunk of the last channel of the third sample
    place_kernel[(1,)](out, 3 * 64 * splits - 1, pixels // 16, chunk, splits, last)
    start = (splits - 1) * chunk
    origin = (2 * pixels + start) * 64 + 63 if last else (2 * 64 + 63) * pixels + start
    assert out.tolist() == [origin, 511 * (64 if last else 1), pixels - start]
