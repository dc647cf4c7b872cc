"""The operators against float64 closed forms, and as citizens of torch."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semantica.benchmarks.kernels.implementations import available
from semantica.benchmarks.kernels.problems import problems
from semantica.benchmarks.kernels.verify import Answers, verify
from semantica.kernels import (
    OPERATORS,
    Case,
    Operator,
    cross_attention,
    group_norm,
    group_norm_ref,
    implementations,
    register_operator,
)
from semantica.kernels.cross_attention.cases import CASES as CROSS_ATTENTION
from semantica.kernels.cross_attention.cases import CrossAttentionCase
from semantica.kernels.group_norm.cases import CASES as GROUP_NORM
from semantica.kernels.group_norm.cases import GroupNormCase
from semantica.kernels.registry import normal

ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]


def group_norm_exact(x, groups, weight, bias, scale, shift, activation, eps=1e-5, addend=None):
    """From the definition, without torch's own norm; laid out as x."""
    given = x if addend is None else (x.flatten(2) + addend[:, :, None]).reshape(x.shape)
    grouped = given.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = (grouped - mean).square().mean(-1, keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape[0], x.shape[1], -1)
    y = y * weight[:, None] + bias[:, None]
    if scale is not None:
        y = y * (1 + scale[:, :, None]) + shift[:, :, None]
    return torch.empty_like(x).copy_((y / (1 + (-y).exp()) if activation == "silu" else y).reshape(x.shape))


def cross_attention_exact(q, k, v, sizes, lengths, gates, q_weight, return_lse=False):
    """From the definition, sample by sample, over the valid tokens only."""
    batch, queries, heads, dim = q.shape
    if q_weight is not None:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * q_weight
    samples, masses = [], []
    for b in range(batch):
        # zero times q, so that a sample without any token still has (zero) gradients
        total, start, lse = 0 * q[b], 0, []
        for s, size in enumerate(sizes):
            count = size if lengths is None else int(lengths[b, s])
            if count:
                keys, values = k[b, start : start + count], v[b, start : start + count]
                logits = torch.einsum("nhd,mhd->hnm", q[b], keys) / math.sqrt(dim)
                weights = (logits - logits.amax(-1, keepdim=True)).exp()
                lse.append(weights.sum(-1).log() + logits.amax(-1))
                part = torch.einsum("hnm,mhd->nhd", weights / weights.sum(-1, keepdim=True), values)
                total = total + (part if gates is None else part * gates[b, s, :, None])
            else:
                lse.append(0 * q[b, :, :, 0].T - math.inf)
            start += size
        samples.append(total)
        masses.append(torch.stack(lse, 1))
    return (torch.stack(samples), torch.stack(masses)) if return_lse else torch.stack(samples)


def attention_map_exact(q, k, lse, lengths, q_weight):
    """From the definition: `[H, N, M]` of each sample, over its valid keys only."""
    if q_weight is not None:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * q_weight
    for b in range(q.shape[0]):
        count = k.shape[1] if lengths is None else int(lengths[b])
        logits = torch.einsum("nhd,mhd->hnm", q[b], k[b, :count]) / math.sqrt(q.shape[-1])
        yield (logits - lse[b, :, :, None]).exp() if count else logits


def attention_moments_exact(q, k, lse, features, lengths, q_weight):
    samples = []
    for b, p in enumerate(attention_map_exact(q, k, lse, lengths, q_weight)):
        moments = torch.einsum("hnm,nf->hmf", p, features if features.ndim == 2 else features[b])
        samples.append(torch.nn.functional.pad(moments, (0, 0, 0, k.shape[1] - p.shape[-1])))
    return torch.stack(samples)


def attention_columns_exact(q, k, lse, tokens, lengths, q_weight):
    samples = []
    for b, p in enumerate(attention_map_exact(q, k, lse, lengths, q_weight)):
        chosen = (tokens if tokens.ndim == 1 else tokens[b]).tolist()
        nothing = torch.zeros_like(lse[b])
        samples.append(torch.stack([p[..., t] if 0 <= t < p.shape[-1] else nothing for t in chosen], -1))
    return torch.stack(samples)


def with_lse(function):
    """The same function with its log-sum-exp as a second output, 0 where a stream is absent."""

    def both(*arguments, **inputs):
        out, lse = function(*arguments, **inputs, return_lse=True)
        lengths = arguments[4] if arguments else inputs["lengths"]
        absent = lse.isneginf()
        assert absent.any() == (lengths is not None and (lengths <= 0).any())
        return out, lse.masked_fill(absent, 0)

    return both


def run(function, inputs, cotangent_dtype=None):
    """Outputs and gradients of every floating-point input, with random cotangents."""
    leaves = {
        # no copy, which would lose the strides of views
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    outs = function(**{**inputs, **leaves})
    outs = outs if isinstance(outs, tuple) else (outs,)
    g = torch.Generator().manual_seed(7)
    cotangents = [
        torch.randn(out.shape, generator=g, dtype=torch.float64).to(cotangent_dtype or out.dtype).to(out)
        for out in outs
    ]
    gradients = torch.autograd.grad(outs, list(leaves.values()), cotangents, materialize_grads=True)
    named = {name: out.detach() for name, out in zip(("out", "lse"), outs)}
    return {**named, **dict(zip(leaves, gradients, strict=True))}


def widen(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def assert_accurate(actual, eager, truth, dtype, ulps=1):
    """At most twice the error of eager torch on contiguous input in that dtype, plus one unit in the last place."""
    for name, exact in truth.items():
        ulp = ulps * ULP[dtype] * max(exact.abs().max().item(), 1e-6)
        error, allowed = (actual[name].double() - exact).abs(), (eager[name].double() - exact).abs()
        assert error.max() <= 2 * allowed.max() + ulp, f"{name}: {error.max():.3g} against {allowed.max():.3g}"
        assert error.mean() <= 1.5 * allowed.mean() + ulp, (
            f"{name}: mean {error.mean():.3g} against {allowed.mean():.3g}"
        )
        assert actual[name].dtype == eager[name].dtype


# operator, the definition it is held to, and what makes a function of both that is compared
FORMS = {
    "group_norm": ("group_norm", group_norm_exact, lambda function: function),
    "cross_attention": ("cross_attention", cross_attention_exact, lambda function: function),
    "attention_moments": ("attention_moments", attention_moments_exact, lambda function: function),
    "attention_columns": ("attention_columns", attention_columns_exact, lambda function: function),
    "cross_attention with lse": ("cross_attention", cross_attention_exact, with_lse),
}
PROVEN = [(form, name) for form, (op, *_) in FORMS.items() for name in OPERATORS[op].cases]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form, name", PROVEN)
def test_values_and_gradients_are_accurate(form, name, dtype, device):
    op, exact, wrap = FORMS[form]
    operator = OPERATORS[op]
    inputs = operator.cases[name].inputs(dtype, device)
    contiguous = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    actual, eager = run(wrap(operator.function), inputs, dtype), run(wrap(operator.reference), contiguous, dtype)
    truth = run(wrap(exact), widen(inputs), dtype)
    assert actual["out"].stride() == truth["out"].stride()
    assert_accurate(actual, eager, truth, dtype)
    if device == "cuda":
        # no atomics and a fixed order of sums: the same bits again
        again = run(wrap(operator.function), inputs, dtype)
        assert all(torch.equal(actual[name], again[name]) for name in actual)


def test_every_operator_is_held_to_its_definition():
    assert {op for op, *_ in FORMS.values()} == set(OPERATORS)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [100.0, 300.0, 1000.0])
def test_group_norm_keeps_its_digits_where_the_mean_is_large(ratio, channels_last):
    inputs = GroupNormCase((2, 64, 32, 32), 32, False, "none", channels_last, ratio).inputs(torch.float32)
    error = (group_norm(**inputs).double() - group_norm_exact(**widen(inputs))).abs().max()
    # the input itself is rounded to ratio * 2^-24 of its standard deviation
    assert error < 4 * ratio * 2**-24


def test_one_softmax_per_stream_and_nothing_from_an_absent_one():
    inputs = CROSS_ATTENTION["two streams"].inputs(torch.float64)
    q, k, v, gates, weight = (inputs[n] for n in ("q", "k", "v", "gates", "q_weight"))
    parts = [(k[:, :7], v[:, :7]), (k[:, 7:], v[:, 7:])]
    separate = sum(
        cross_attention(q, ks, vs, (ks.shape[1],), gates=gates[:, s : s + 1], q_weight=weight)
        for s, (ks, vs) in enumerate(parts)
    )
    torch.testing.assert_close(cross_attention(**inputs), separate, rtol=0, atol=1e-13)
    lengths = torch.tensor([[7, 0]] * 3)
    first = cross_attention(q, *parts[0], (7,), gates=gates[:, :1], q_weight=weight)
    # whatever stands in the absent keys must not matter
    k2 = k.clone()
    k2[:, 7:] = 1e30
    assert torch.equal(cross_attention(q, k2, v, (7, 12), lengths, gates, weight), first)


def test_a_repeated_token_has_the_same_softmax():
    inputs = CrossAttentionCase(2, 16, 2, 64, (1,)).inputs(torch.float64)
    many = {**inputs, "k": inputs["k"].expand(-1, 9, -1, -1), "v": inputs["v"].expand(-1, 9, -1, -1), "sizes": (9,)}
    torch.testing.assert_close(cross_attention(**many), cross_attention(**inputs), rtol=0, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), groups=st.integers(1, 5), width=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    film=st.booleans(), silu=st.booleans(), last=st.booleans(), addend=st.booleans(),
)  # fmt: skip
def test_group_norm_any_shape(batch, groups, width, spatial, film, silu, last, addend):
    case = GroupNormCase(
        (batch, groups * width, *spatial), groups, film, "silu" if silu else "none", last and len(spatial) > 1,
        addend=addend,
    )  # fmt: skip
    inputs = case.inputs(torch.float64)
    actual, truth = run(group_norm, inputs), run(group_norm_exact, inputs)
    for name in truth:
        # groups of one value have a variance of eps: gradients there are sums of nearly equal numbers
        torch.testing.assert_close(actual[name], truth[name], rtol=1e-7, atol=1e-8)
    if width * math.prod(spatial) > 1:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = case.inputs(dtype)
            eager = run(group_norm_ref, {**inputs, "x": inputs["x"].contiguous(), "eps": 1e-5}, dtype)
            truth = run(group_norm_exact, widen(inputs), dtype)
            # of a handful of values, eager's error may happen to be none
            assert_accurate(run(group_norm, inputs, dtype), eager, truth, dtype, ulps=4)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_cross_attention_any_streams(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    batch = data.draw(st.integers(1, 3))
    lengths = tuple(tuple(data.draw(st.integers(0, size)) for size in sizes) for _ in range(batch))
    masked, gates, norm, strided = (data.draw(st.booleans()) for _ in range(4))
    queries, heads = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    case = CrossAttentionCase(batch, queries, heads, 32, sizes, lengths if masked else None, gates, norm, strided)
    inputs = case.inputs(torch.float64)
    actual, truth = run(with_lse(cross_attention), inputs), run(with_lse(cross_attention_exact), inputs)
    for name in truth:
        torch.testing.assert_close(actual[name], truth[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["tiny", "plain", "volume", "addend and film"])
def test_group_norm_passes_opcheck_and_gradcheck(name):
    case = GROUP_NORM[name]
    inputs = GroupNormCase(
        (2, 8, *[3] * (len(case.shape) - 2)), 4, case.film, case.activation, case.channels_last, addend=case.addend
    ).inputs(torch.float64)
    addend = inputs.pop("addend", None)
    arguments = [*inputs.values(), 1e-5, addend]
    arguments = [v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments]
    torch.library.opcheck(torch.ops.semantica.group_norm.default, tuple(arguments))
    assert torch.autograd.gradcheck(group_norm, arguments)


@pytest.mark.parametrize("name", ["tiny", "no norm", "absent stream"])
def test_cross_attention_passes_opcheck_and_gradcheck(name):
    case = CROSS_ATTENTION[name]
    lengths = ((2, 0), (1, 3)) if case.lengths else None
    small = CrossAttentionCase(2, 3, 2, 32, (2, 3), lengths, case.gates, case.q_norm)
    floats = [
        v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for v in small.inputs(torch.float64).values()
    ]
    floats[3] = list(floats[3])
    torch.library.opcheck(torch.ops.semantica.cross_attention.default, tuple(floats))
    torch.library.opcheck(torch.ops.semantica.cross_attention.default, (*floats, True))
    assert torch.autograd.gradcheck(with_lse(cross_attention), floats)
    q_k = [v.detach().requires_grad_() for v in floats[:2]]
    assert torch.autograd.gradcheck(lambda q, k: with_lse(cross_attention)(q, k, *floats[2:])[1], q_k, fast_mode=True)


def test_the_map_is_what_lse_says_and_an_absent_stream_has_none():
    inputs = CROSS_ATTENTION["absent stream"].inputs(torch.float32)
    plain, (out, lse) = cross_attention(**inputs), cross_attention(**inputs, return_lse=True)
    assert torch.equal(out, plain) and lse.dtype == torch.float32 and lse.shape == (3, 2, 2, 20)
    assert torch.equal(lse.isneginf(), (inputs["lengths"] == 0)[:, None, :, None].expand_as(lse))
    q = torch.nn.functional.rms_norm(inputs["q"], (64,), inputs["q_weight"], 1e-6)
    logits = torch.einsum("nhd,mhd->hnm", q[0], inputs["k"][0, :7]) / 8
    torch.testing.assert_close((logits - lse[0, :, 0, :, None]).exp().sum(-1), torch.ones(2, 20))


def test_the_operators_compile_whole_with_gradients():
    gn, ca = GROUP_NORM["tiny"].inputs(torch.float32), CROSS_ATTENTION["absent stream"].inputs(torch.float32)

    def both(x, q):
        out, lse = cross_attention(**{**ca, "q": q}, return_lse=True)
        out = out + cross_attention(**{**ca, "q": q})
        return group_norm(**{**gn, "x": x}).sum() + out.square().sum() + lse[:, :, 0].exp().sum()

    leaves = [gn["x"].clone(memory_format=torch.preserve_format).requires_grad_(), ca["q"].clone().requires_grad_()]
    expected = torch.autograd.grad(both(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(both, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
        assert a.stride() == e.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_inputs_are_left_alone_and_autocast_changes_nothing(operator, dtype):
    inputs = operator.cases["tiny"].inputs(dtype)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    plain = operator.function(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator.function(**inputs), plain)
    assert all(torch.equal(inputs[k], v) for k, v in before.items())


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty_input_gives_empty_output_and_zero_gradients(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    y = group_norm(x, 4, weight, bias)
    y.sum().backward()
    assert y.shape == shape and weight.grad.abs().sum() == 0 and x.grad.shape == shape
    q = torch.randn(0, 5, 2, 32)
    assert cross_attention(q, torch.randn(0, 3, 2, 32), torch.randn(0, 3, 2, 32), (3,)).shape == q.shape


def test_wrong_arguments_are_named():
    gn = GROUP_NORM["tiny"].inputs(torch.float32)
    q, k = torch.randn(2, 4, 2, 32), torch.randn(2, 6, 2, 32)
    wrong = [
        (group_norm, {**gn, "groups": 7}, "groups=7 does not divide"),
        (group_norm, {**gn, "groups": 0}, "groups=0"),
        (group_norm, {**gn, "x": gn["x"][0, 0]}, "x has shape"),
        (group_norm, {**gn, "x": gn["x"].int()}, "x has dtype"),
        (group_norm, {**gn, "x": gn["x"].to(torch.float8_e4m3fn)}, "x has dtype"),
        (group_norm, {**gn, "groups": 2.0}, "groups=2.0"),
        (group_norm, {**gn, "weight": None}, "weight is None"),
        (group_norm, {**gn, "bias": None}, "bias is None"),
        (group_norm, {**gn, "weight": gn["weight"][:5]}, "weight has shape"),
        (group_norm, {**gn, "bias": gn["bias"].half()}, "bias has dtype"),
        (group_norm, {**gn, "shift": gn["shift"].to("meta")}, "shift is on meta"),
        (group_norm, {**gn, "activation": "gelu"}, "activation='gelu'"),
        (cross_attention, dict(q=q[0], k=k, v=k, sizes=(6,)), "q has shape"),
        (cross_attention, dict(q=q[..., :20], k=k[..., :20], v=k[..., :20], sizes=(6,)), "head dim 20"),
        (cross_attention, dict(q=q, k=k, v=k, sizes=(5,)), r"sizes=\[5\]"),
        (cross_attention, dict(q=q, k=k, v=k, sizes=(6, 0)), "must be positive"),
        (cross_attention, dict(q=q, k=k, v=k, sizes=(6.0,)), "whole number"),
        (cross_attention, dict(q=q, k=k, v=k, sizes=6), "whole number"),
        (cross_attention, dict(q=q, k=k, v=k[:1], sizes=(6,)), "v has shape"),
        (cross_attention, dict(q=q, k=k.half(), v=k, sizes=(6,)), "k has dtype"),
        (cross_attention, dict(q=q, k=k, v=k, sizes=(6,), lengths=torch.ones(2, 1)), "lengths has dtype"),
        (cross_attention, dict(q=q, k=k, v=k, sizes=(6,), gates=torch.ones(2, 2, 2)), "gates has shape"),
        (cross_attention, dict(q=q.int(), k=k, v=k, sizes=(6,)), "q has dtype"),
    ]
    for function, arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_implementations_names_every_operator_on_every_device():
    table = implementations()
    assert list(table) == ["group_norm", "cross_attention", "attention_moments", "attention_columns"] == list(OPERATORS)
    assert all(set(devices) == {"cpu", "cuda"} and all(map(all, devices.values())) for devices in table.values())


@dataclass(frozen=True)
class DoubleCase(Case):
    width: int

    @property
    def description(self):
        return f"W{self.width}"

    def inputs(self, dtype, device="cpu", seed=0):
        return {"x": normal((4, self.width), torch.Generator().manual_seed(seed), dtype, device)}

    def flops(self, direction):
        return 4 * self.width * {"forward": 1, "backward": 1, "both": 2}[direction]


def double(x):
    return x * 2


def test_an_operator_from_outside_is_one_row_of_the_table(request):
    register_operator(Operator("double", double, lambda x: x + x, {"tiny": DoubleCase(8)}))
    request.addfinalizer(lambda: OPERATORS.pop("double"))
    assert implementations()["double"]["cpu"][0] == "plain torch"
    assert OPERATORS["double"].sources(gpu=True) == OPERATORS["double"].sources(gpu=False) == [Path(__file__)]
    (problem,) = (p for p in problems("cpu", quick=True) if p.op == "double")
    assert problem.name == "double W8 contiguous float32" and problem.operations("both") == 64
    assert (problem.effective_bytes("forward"), problem.effective_bytes("backward")) == (2 * 128, 3 * 128)
    assert problem.two_pass_bytes("both", cache=1) == problem.effective_bytes("both")
    present, absent = available(["double"], "cpu", ())
    assert [i.name for i in present] == ["fused", "eager", "compile"] and not absent
    for implementation in present[:2]:
        found = verify(implementation.load(), Answers.of(problem, gradients=True), True, implementation.leeway)
        assert found.error == 0
    with pytest.raises(AssertionError, match="double"):
        register_operator(replace(OPERATORS["double"]))
