"""The C++ loops of `group_norm`: every instruction set that runs here, every way of cutting a tensor, hard values."""

import pytest
import torch
import torch.nn.functional as F

from semantica import _C
from semantica.kernels import group_norm, implementations
from semantica.kernels.group_norm.cases import GroupNormCase
from semantica.kernels.group_norm.cpu import address, backward, dense, forward, shape
from semantica.kernels.group_norm.op import backward_plain, forward_plain

TARGETS = _C.group_norm_targets()
# how each is cut is in csrc/group_norm.cpp: chunks of 32768 values, units of up to 1 MiB in one thread's cache
CASES = {
    "whole groups": GroupNormCase((3, 40, 9, 7), 8),
    "channels in several chunks": GroupNormCase((1, 32, 60, 60), 1),
    "spans of one channel": GroupNormCase((1, 3, 190, 181), 3),
    "many spans": GroupNormCase((1, 2, 1500, 1501), 2, film=False),
    "rows": GroupNormCase((3, 40, 9, 7), 8, channels_last=True),
    "rows in several chunks": GroupNormCase((2, 48, 50, 31), 16, channels_last=True),
    "samples beyond the cache": GroupNormCase((2, 37, 97, 89), 37, channels_last=True),
    "few wide rows": GroupNormCase((1, 40000, 3, 1), 4, channels_last=True),
    "addend": GroupNormCase((3, 40, 9, 7), 8, addend=True),
    # five channels in chunks of four and one
    "addend in several chunks": GroupNormCase((1, 15, 95, 85), 3, addend=True),
    "addend of rows": GroupNormCase((2, 48, 50, 31), 16, channels_last=True, addend=True),
    "mean 1000": GroupNormCase((2, 48, 50, 31), 16, channels_last=True, mean=1000.0),
}


def both(inputs, dy, eps=1e-5, target=None):
    """Forward and backward through the loops, or through plain torch."""
    x, groups, weight, bias, scale, shift, activation, *addend = inputs.values()
    keywords = {} if target is None else {"target": target}
    f, b = (forward_plain, backward_plain) if target is None else (forward, backward)
    y, mean, rstd = f(x, groups, weight, bias, scale, shift, activation, eps, *addend, **keywords)
    return y, mean, rstd, *b(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, *addend, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_every_target_is_as_accurate_as_torch_on_contiguous_input(name, target, dtype):
    inputs = CASES[name].inputs(dtype)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(inputs["x"].shape, generator=g).to(dtype)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    names = ("y", "mean", "rstd", "dx", "dweight", "dbias", "dscale", "dshift", "daddend")
    truth, eager = both(wide, dy.double()), both(inputs, dy)
    actual = both(inputs, dy, target=target)
    for what, a, e, t in zip(names, actual, eager, truth, strict=True):
        if not t.numel():
            assert not a.numel()
            continue
        assert a.dtype == e.dtype and a.stride() == e.stride()
        # a mean may be near zero: what counts is its error beside the standard deviation
        size = torch.maximum(t.abs(), 1 / truth[2]).max() if what == "mean" else t.abs().max()
        ulp = torch.finfo(a.dtype).eps * size
        error, allowed = (a.double() - t).abs(), (e.double() - t).abs()
        assert error.max() <= 2 * allowed.max() + ulp, f"{what}: {error.max():.3g} against {allowed.max():.3g}"
        assert error.mean() <= 1.5 * allowed.mean() + ulp, f"{what}: {error.mean():.3g} against {allowed.mean():.3g}"


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_no_bit(name):
    inputs = CASES[name].inputs(torch.float32)
    dy = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(both(inputs, dy, target=TARGETS[0]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_is_touched_beside_the_output_and_all_of_it_is_written(channels_last, dtype, target):
    case = GroupNormCase((2, 21, 5, 7), 3, channels_last=channels_last, addend=True)
    inputs = case.inputs(dtype)
    x, groups, weight, bias, scale, shift, activation, addend = inputs.values()
    guard, n = 64, x.numel()
    # one value off, so that nothing is aligned
    memory = torch.full((3, n + 2 * guard + 1), torch.nan, dtype=dtype)
    source, result, gradient = (row[guard + 1 : guard + 1 + n].as_strided(x.shape, x.stride()) for row in memory)
    source.copy_(x)
    parameters = [a.float().contiguous() for a in (weight, bias, scale, shift, addend)]
    mean, rstd = torch.empty(2, 2, groups)
    s = shape(source, groups, dense(source)[1], activation, target)
    _C.group_norm_forward(s, *map(address, (source, result, mean, rstd, *parameters)), 1e-5)
    gradients = [torch.full_like(a, torch.nan) for a in parameters[:4]]
    _C.group_norm_backward(s, *map(address, (source, source, mean, rstd, *parameters, gradient, *gradients)))
    assert memory[:, : guard + 1].isnan().all() and memory[:, guard + 1 + n :].isnan().all()
    assert torch.equal(source, x)
    given = groups, weight, bias, scale, shift, activation
    y, m, r = forward(x, *given, 1e-5, addend, target=target)
    expected = backward(x, x, m, r, *given, addend, target=target)
    assert torch.equal(result, y) and torch.equal(gradient, expected[0])
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(gradients, expected[1:5], strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_silu_of_hard_values(dtype, target):
    # constant channels have x_hat = 0: the result is silu(bias)
    values = torch.tensor([0, -0.0, 1, -1, 20, -20, 80, -80, 88, -88, 104, -104, 1e4, -1e4, 3e38, -3e38, torch.inf])
    y, _, _ = forward(
        torch.ones(1, len(values), 3, dtype=dtype), len(values), torch.ones_like(values), values, None, None, "silu",
        1e-5, target=target,
    )  # fmt: skip
    expected = F.silu(values.double())
    # below -87 the loops give the value at -87
    rtol = 2e-7 + 1e-8 * 87 + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(y[0, :, 0].double(), expected, rtol=rtol, atol=2e-36)
    y, _, _ = forward(
        torch.ones(1, 1, 3, dtype=dtype), 1, torch.ones(1), torch.full((1,), torch.nan), None, None, "silu", 1e-5,
        target=target,
    )  # fmt: skip
    assert y.isnan().all()


@pytest.mark.parametrize("target", TARGETS)
def test_rounding_to_bf16_is_torchs(target):
    g = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(4000, generator=g) * 10 ** (8 * torch.rand(4000, generator=g) - 4)])
    # halfway cases, both ways of rounding to even
    ties = (torch.randint(0x3F80, 0x4480, (500,), generator=g, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    values = torch.cat([values, ties])
    x = torch.ones(1, len(values), 2, dtype=torch.bfloat16)
    y, _, _ = forward(x, len(values), torch.ones(len(values)), values, None, None, "none", 1e-5, target=target)
    assert torch.equal(y[0, :, 1], values.bfloat16())


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_stays_in_its_group_and_stays_a_nan(dtype, bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for last in (False, True):
        inputs = GroupNormCase((2, 32, 4, 4), 4, channels_last=last).inputs(dtype)
        inputs["x"][0, 9, 2, 1] = torch.nan
        y = group_norm(**inputs)
        assert y[0, 8:16].isnan().all() and y.isnan().sum() == 8 * 16
        inputs = GroupNormCase((2, 32, 4, 4), 4, channels_last=last).inputs(dtype)
        inputs["bias"] = inputs["bias"].float()
        inputs["bias"][5] = nan
        y = group_norm(**inputs)
        assert y[:, 5].isnan().all() and y.isnan().sum() == 2 * 16
        # an addend is of one sample, and its group's statistics are NaN
        inputs = GroupNormCase((2, 32, 4, 4), 4, channels_last=last, addend=True).inputs(dtype)
        inputs["x"].requires_grad_()
        inputs["addend"] = inputs["addend"].float()
        inputs["addend"][0, 9] = nan
        y = group_norm(**inputs)
        (dx,) = torch.autograd.grad(y, inputs["x"], torch.ones_like(y))
        assert all(a[0, 8:16].isnan().all() and a.isnan().sum() == 8 * 16 for a in (y, dx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_give_the_bits_of_the_dense_tensor(dtype):
    inputs = GroupNormCase((2, 24, 6, 10), 4).inputs(dtype)
    x = inputs["x"]
    wide = x.repeat_interleave(2, 1)
    views = {
        "sliced channels": (wide[:, ::2], x),
        "transposed": (x.transpose(2, 3), x.transpose(2, 3).contiguous()),
        "expanded": (x[:, :, :1].expand(-1, -1, 6, -1), x[:, :, :1].expand(-1, -1, 6, -1).contiguous()),
        "tokens": (x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2), None),
    }
    for name, (view, same) in views.items():
        y = group_norm(**{**inputs, "x": view})
        assert y.stride() == torch.empty_like(view).stride(), name
        if same is not None:
            assert torch.equal(y, group_norm(**{**inputs, "x": same})), name
        leaf = view.detach().requires_grad_()
        # the gradient of a sum is an expanded one
        (dx,) = torch.autograd.grad(group_norm(**{**inputs, "x": leaf}).sum(), leaf)
        dense_leaf = view.detach().contiguous().requires_grad_()
        (expected,) = torch.autograd.grad(group_norm(**{**inputs, "x": dense_leaf}).sum(), dense_leaf)
        tolerance = 0 if same is not None else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(dx, expected, rtol=tolerance, atol=tolerance)


def test_who_serves_is_told_and_bad_shapes_are_refused():
    name, reason = implementations()["group_norm"]["cpu"]
    assert name == "C++" and TARGETS[0] in reason
    fine = dict(batch=1, channels=8, spatial=4, groups=2, channels_last=False, silu=True, bfloat16=False, threads=1)
    _C.GroupNormShape(**fine, target=TARGETS[0])
    for wrong in ({"groups": 3}, {"spatial": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="sizes must be positive"):
            _C.GroupNormShape(**{**fine, **wrong}, target=TARGETS[0])
    with pytest.raises(ValueError, match="does not run here"):
        _C.GroupNormShape(**fine, target="AVX-1024")
