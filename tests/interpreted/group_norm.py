"""The Triton kernels of group_norm in Triton's interpreter: run by tests/test_group_norm_triton.py, in a process of its own.

`TRITON_INTERPRET` has to be set before triton is imported, and pytest does not collect this file by its name.
"""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semantica.kernels import group_norm_triton as kernels
from semantica.kernels import launch
from semantica.kernels.cases import GROUP_NORM, GroupNormCase
from semantica.kernels.group_norm import group_norm_ref

oracle = runpy.run_path(str(Path(__file__).parents[1] / "test_kernels.py"))
run, widen, assert_accurate = (oracle[name] for name in ("run", "widen", "assert_accurate"))
group_norm_exact = oracle["group_norm_exact"]

CASES = GROUP_NORM | {
    "prime": GroupNormCase((1, 14, 13, 11), 7),
    "prime last": GroupNormCase((2, 26, 11, 13), 2, channels_last=True),
    "ten channels a group": GroupNormCase((1, 320, 6, 6), 32, channels_last=True),
    "ten channels a group, contiguous": GroupNormCase((1, 320, 6, 6), 32),
    "one channel each, contiguous": GroupNormCase((2, 12, 5, 9), 12),
    "one group last": GroupNormCase((2, 40, 6, 9), 1, channels_last=True),
    "no activation": GroupNormCase((2, 24, 9, 5), 4, activation="none", channels_last=True),
    "one value a group": GroupNormCase((2, 5, 1), 5),
    "mean 1000": GroupNormCase((2, 32, 12, 12), 4, mean=1000.0),
}
# every tensor of these tests is split, over channels too, and merged by a launch of its own, in several rounds
SPLIT = {"block": 64, "lanes": 16, "tiles": 1, "programs": [6, 400], "pieces": 0, "warps": 1, "stages": 2}
SMALL = {
    **{name: {"default": [{"width": 0, "warps": 1}]} for name in ("resident", "resident_backward")},
    **{name: {"default": [{"width": 1, **SPLIT}]} for name in ("partial", "partial_backward", "apply_backward")},
    "apply": {"default": [{"width": 1, **SPLIT, "block": 128}]},
    "merge": {"default": [{"width": 1, "block": 4, "warps": 1}]},
    "merge_backward": {"default": [{"width": 1, "lanes": 4, "block": 16, "warps": 1}]},
}
# as above, but the second pass merges
INLINE = SMALL | {"apply": {"default": [{"width": 1, **SPLIT, "pieces": 4096}]}}
LADDERS = {"shipped": launch.table("group_norm"), "split": SMALL, "split, merged inline": INLINE}


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, scale, shift, activation, eps):
        y, mean, rstd = kernels.forward(x, groups, weight, bias, scale, shift, activation, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
        ctx.settings = groups, activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, mean, rstd, *affine = ctx.saved_tensors
        groups, activation = ctx.settings
        dx, dweight, dbias, *film = kernels.backward(dy, x, mean, rstd, groups, *affine, activation)
        assert all(d.numel() == 0 for d, a in zip(film, affine[2:]) if a is None)
        dscale, dshift = (d if a is not None else None for d, a in zip(film, affine[2:]))
        return dx, None, dweight, dbias, dscale, dshift, None, None


def group_norm(x, groups, weight, bias, scale, shift, activation, eps=1e-5):
    return Norm.apply(x, groups, weight, bias, scale, shift, activation, eps)


@pytest.fixture(params=LADDERS)
def ladder(request, monkeypatch):
    monkeypatch.setattr(launch, "table", lambda operator: LADDERS[request.param])
    return request.param


def both_layouts(case):
    inputs = case.inputs(torch.float64)
    return [dataclasses.replace(case, channels_last=last) for last in (False, True) if inputs["x"].ndim > 3 or not last]


def check(inputs, dtype):
    """Output and gradients against float64, beside eager torch on contiguous input; and the strides of the output."""
    actual = run(group_norm, inputs, dtype)
    eager = run(group_norm_ref, {**inputs, "x": inputs["x"].contiguous(), "eps": 1e-5}, dtype)
    truth = run(group_norm_ref, {**widen(inputs), "eps": 1e-5}, dtype)
    assert actual["out"].stride() == torch.empty_like(inputs["x"]).stride()
    assert_accurate(actual, eager, truth, dtype)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cases_are_accurate_in_both_layouts_however_they_are_cut(name, dtype, ladder):
    if ladder != "shipped" and dtype is torch.float16 and name not in ("odd channels", "large mean"):
        pytest.skip("what is cut does not depend on the type")
    for case in both_layouts(CASES[name]):
        check(case.inputs(dtype), dtype)


def test_the_reference_itself_is_right():
    inputs = CASES["ten channels a group"].inputs(torch.float64)
    exact, reference = group_norm_exact(**inputs), group_norm_ref(**inputs, eps=1e-5)
    torch.testing.assert_close(reference, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [100.0, 300.0, 1000.0])
def test_the_digits_stay_where_the_mean_is_large(ratio, channels_last, ladder):
    case = GroupNormCase((1, 32, 24, 24), 8, False, "none", channels_last, ratio)
    inputs = case.inputs(torch.float32)
    error = (group_norm(**inputs).double() - group_norm_exact(**widen(inputs))).abs().max()
    # the input itself is rounded to ratio * 2^-24 of its standard deviation
    assert error < 4 * ratio * 2**-24


def test_large_half_precision_values_do_not_overflow(ladder):
    inputs = CASES["odd channels"].inputs(torch.float16)
    inputs["x"] = inputs["x"] * 1e4
    check(inputs, torch.float16)


def guarded(launches):
    """The launches with every tensor inside a larger buffer of NaN, values too where the kernels are to write.

    Returns:
        The launches, and for each tensor the original, its guarded copy, the buffer and whether it is an input.
    """
    tensors = {id(a): a for run in launches for a in run.arguments.values() if isinstance(a, torch.Tensor)}
    copies = {}
    for key, tensor in tensors.items():
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        buffer = torch.full((extent + 128,), torch.nan, dtype=tensor.dtype)
        copies[key] = tensor, buffer.as_strided(tensor.shape, tensor.stride(), 64), buffer
    moved = [
        dataclasses.replace(
            run, arguments={k: copies[id(a)][1] if id(a) in copies else a for k, a in run.arguments.items()}
        )
        for run in launches
    ]
    return moved, list(copies.values())


@pytest.mark.parametrize("name", ["tiny", "odd channels", "one pixel", "volume", "ten channels a group", "prime"])
def test_nothing_else_is_written_nothing_stays_unwritten_and_runs_are_bit_equal(name, ladder):
    inputs = CASES[name].inputs(torch.float32)
    x, batch, channels = inputs["x"], *inputs["x"].shape[:2]
    # the two halves of one tensor, whose rows are not dense
    inputs["scale"], inputs["shift"] = torch.cat([torch.randn(batch, channels)] * 2, 1).chunk(2, 1)
    arguments = [inputs[k] for k in ("groups", "weight", "bias", "scale", "shift", "activation")]
    _, mean, rstd = kernels.forward(x, *arguments, 1e-5)
    dy = torch.randn_like(x)
    given = [x, dy, mean, rstd, *(a for a in arguments if isinstance(a, torch.Tensor))]
    for plan in (
        lambda: kernels.plan_forward(x, *arguments, 1e-5),
        lambda: kernels.plan_backward(dy, x, mean, rstd, *arguments),
    ):
        results = []
        for _ in range(2):
            launches, outputs = plan()
            inputs_here = given if any(o.shape == dy.shape for o in outputs[:1]) and len(outputs) > 3 else [x, *given[4:]]
            launches, tensors = guarded(launches)
            sources = {id(a) for a in inputs_here}
            for original, copy, _ in tensors:
                if id(original) in sources:
                    copy.copy_(original)
            befores = [buffer.clone() for _, _, buffer in tensors]
            launch.run(launches)
            for (original, copy, buffer), before in zip(tensors, befores):
                if id(original) in sources:
                    torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)
                else:
                    assert not copy.isnan().any()
                    assert buffer.isnan().sum() == buffer.numel() - copy.numel()
            results.append([copy for original, copy, _ in tensors if any(original is o for o in outputs)])
        assert len(results[0]) == len(outputs)
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


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_any_strides(data):
    batch, groups, width = (data.draw(st.integers(1, n)) for n in (3, 5, 5))
    spatial = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    case = GroupNormCase(
        (batch, groups * width, *spatial), groups, True, data.draw(st.sampled_from(["silu", "none"]))
    )
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "table", lambda operator, table=LADDERS[data.draw(st.sampled_from([*LADDERS]))]: table)
        arguments = [inputs[k] for k in ("groups", "weight", "bias", "scale", "shift", "activation")]
        y, mean, rstd = kernels.forward(inputs["x"], *arguments, eps)
        gradients = kernels.backward(dy, inputs["x"], mean, rstd, *arguments)
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


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty_input_launches_nothing(shape):
    x, weight, film = torch.empty(shape), torch.ones(8), torch.ones(shape[0], 8)
    launches, (y, mean, rstd) = kernels.plan_forward(x, 4, weight, weight, film, None, "silu", 1e-5)
    assert launches == [] and y.shape == shape and mean.abs().sum() == rstd.abs().sum() == 0
    launches, gradients = kernels.plan_backward(x, x, mean, rstd, 4, weight, weight, film, None, "silu")
    assert launches == [] and all(d.abs().sum() == 0 for d in gradients)
    assert [d.shape for d in gradients] == [x.shape, weight.shape, weight.shape, film.shape, (0,)]
