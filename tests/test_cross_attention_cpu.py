"""The C++ loops of `cross_attention`: every instruction set that runs here, hard values, memory around it."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0

from semantica.fused.processors import FusedAttnProcessor, FusedIPAdapterAttnProcessor, fast
from semantica.kernels import cross_attention, implementations
from semantica.kernels.cross_attention import op
from semantica.kernels.cross_attention.cases import CASES as PROVEN
from semantica.kernels.cross_attention.cases import CrossAttentionCase
from semantica.kernels.dispatch import cpp_instructions

TARGETS = cpp_instructions("cross_attention")
TYPES = [torch.float32, torch.bfloat16]
# several pieces of queries, and vectors of keys by twos and threes
CASES = PROVEN | {
    "many queries": CrossAttentionCase(1, 2501, 2, 40, (77, 4), gates=True),
    "many keys": CrossAttentionCase(1, 3, 2, 64, (257, 77, 512), gates=True),
    "pieces of heads": CrossAttentionCase(2, 9, 20, 16, (2, 16, 17, 33)),
}
pytestmark = pytest.mark.skipif(not TARGETS, reason="no loops for this processor")


def loops(target, **inputs):
    from semantica.kernels.cross_attention.cpu import forward

    return forward(**inputs, target=target)


def as_double(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_every_target_is_as_accurate_as_torch(name, target, dtype):
    inputs = CASES[name].inputs(dtype)
    truth, eager = (op.forward_plain(**given, return_lse=True) for given in (as_double(inputs), inputs))
    for what, a, e, t in zip(("o", "lse"), loops(target, **inputs, return_lse=True), eager, truth, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and a.is_contiguous()
        there = t.isfinite()
        assert torch.equal(a[~there].double(), t[~there])
        a, e, t = (x[there].double() for x in (a, e, t))
        ulp = torch.finfo(dtype if what == "o" else torch.float32).eps * t.abs().max()
        assert (a - t).abs().max() <= 2 * (e - t).abs().max() + ulp, what
        assert (a - t).abs().mean() <= 1.5 * (e - t).abs().mean() + ulp, what


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_neither_threads_nor_neighbours_change_a_bit(target, dtype):
    inputs = CASES["many queries"].inputs(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(loops(target, **inputs, return_lse=True))
    finally:
        torch.set_num_threads(before)
    # a query by itself goes through another loop
    alone = loops(target, **{**inputs, "q": inputs["q"][:, 5:6]}, return_lse=True)
    for o, lse in results:
        assert torch.equal(o, results[0][0]) and torch.equal(lse, results[0][1])
        assert torch.equal(o[:, 5:6], alone[0]) and torch.equal(lse[..., 5:6], alone[1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_touched_beside_the_output_and_tokens_that_are_not_there_are_not_read(target, dtype):
    from semantica import _C
    from semantica.kernels.cross_attention.cpu import shape

    case = CrossAttentionCase(2, 11, 3, 24, (21, 5), ((13, 0), (0, 5)), gates=True)
    inputs = case.inputs(dtype)
    q, k, v, sizes, lengths, gates, weight = inputs.values()
    for row, counts in enumerate(case.lengths):
        for begin, size, count in zip((0, 21), sizes, counts):
            k[row, begin + count : begin + size] = v[row, begin + count : begin + size] = torch.nan
    guard = 64
    # one value off, so that nothing is aligned
    memory = torch.full((q.numel() + 2 * guard + 1,), torch.nan, dtype=dtype)
    o = memory[guard + 1 : -guard].view(q.shape)
    sums = torch.full((guard + 2 * 3 * 2 * 11 + guard,), torch.nan)
    given = q, k, v, o, sums[guard:-guard], lengths, gates.float(), weight.float()
    strides = (a.stride()[:3] for a in (q, k, v))
    described = shape(q.shape, sizes, *strides, dtype == torch.bfloat16, 2, target)
    _C.cross_attention_forward(described, *(a.data_ptr() for a in given))
    assert memory[: guard + 1].isnan().all() and memory[-guard:].isnan().all() and not o.isnan().any()
    assert sums[:guard].isnan().all() and sums[-guard:].isnan().all()
    clean = {**inputs, "k": k.nan_to_num(1.0), "v": v.nan_to_num(1.0)}
    expected, lse = loops(target, **clean, return_lse=True)
    assert torch.equal(o, expected) and torch.equal(sums[guard:-guard].view(lse.shape), lse)
    assert torch.equal(lse == -torch.inf, (lengths == 0)[:, None, :, None].expand_as(lse))


@pytest.mark.parametrize("target", TARGETS)
def test_lengths_beyond_a_stream_count_as_its_size_and_a_nan_stays_in_its_query(target):
    case = CrossAttentionCase(2, 9, 2, 40, (7, 12))
    inputs = case.inputs(torch.float32)
    whole = loops(target, **inputs)[0]
    for dtype in (torch.int32, torch.int64):
        lengths = torch.tensor([[7, 99], [2**31 - 1, 12]], dtype=dtype)
        assert torch.equal(loops(target, **{**inputs, "lengths": lengths})[0], whole)
    inputs["q"][1, 3, 1, 5] = torch.nan
    o = loops(target, **inputs)[0]
    assert o[1, 3, 1].isnan().all() and o.isnan().sum() == 40


@pytest.mark.parametrize("target", TARGETS)
def test_any_strides_give_the_bits_of_the_dense_tensors(target):
    inputs = CrossAttentionCase(2, 19, 4, 32, (33,), q_norm=False).inputs(torch.bfloat16)
    dense = loops(target, **inputs)[0]
    q, k, v = (inputs[name] for name in "qkv")
    views = {
        "heads first": [a.transpose(1, 2).contiguous().transpose(1, 2) for a in (q, k, v)],
        "dims apart": [a.repeat_interleave(2, -1)[..., ::2] for a in (q, k, v)],
        "one of many": [torch.stack([a, a], 2)[:, :, 1] for a in (q, k, v)],
    }
    for name, (q, k, v) in views.items():
        assert torch.equal(loops(target, **{**inputs, "q": q, "k": k, "v": v})[0], dense), name
    shared = {**inputs, "k": k[:1].expand(2, -1, -1, -1), "v": v[:1].expand(2, -1, -1, -1)}
    same = {**inputs, "k": shared["k"].contiguous(), "v": shared["v"].contiguous()}
    assert torch.equal(loops(target, **shared)[0], loops(target, **same)[0])


@pytest.mark.parametrize("target", TARGETS)
def test_a_softmax_of_hard_logits(target):
    """Differences beyond the range of an exponential, and logits that differ by less than fp32 tells apart from 0."""
    logits = torch.tensor([0.0, -1e-3, -1, -20, -80, -87, -88, -104, -1e4, -3e38, 3.0, 3.0, -0.0])
    # the first number of a key times 1 / sqrt(16) is its logit
    k = torch.zeros(1, len(logits), 1, 16)
    k[0, :, 0, 0] = 4 * logits.clamp(min=-5e37)
    q, v = torch.zeros(1, 1, 1, 16), torch.zeros_like(k)
    q[..., 0] = 1
    v[0, torch.arange(13), 0, torch.arange(13)] = 1
    o, lse = loops(target, q=q, k=k, v=v, sizes=[13], lengths=None, gates=None, q_weight=None, return_lse=True)
    expected = logits.double().softmax(0)
    torch.testing.assert_close(o[0, 0, 0, :13].double(), expected, rtol=2e-6, atol=1e-36)
    torch.testing.assert_close(lse.double().item(), logits.double().logsumexp(0).item(), rtol=2e-7, atol=0)


def test_the_operator_asks_the_loops_and_gradients_are_those_of_plain_torch(monkeypatch):
    name, reason = implementations()["cross_attention"]["cpu"]
    assert name == "C++" and TARGETS[0] in reason and "gradients" in reason
    inputs = CASES["two streams"].inputs(torch.float32)
    q = inputs["q"].requires_grad_()
    out = cross_attention(**inputs)
    assert torch.equal(out, loops(TARGETS[0], **inputs)[0])
    (found,) = torch.autograd.grad(out.square().sum(), q)
    wide = as_double(inputs)
    (expected,) = torch.autograd.grad(op.cross_attention_ref(**wide).square().sum(), wide["q"])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    # fp16, fp64, nothing at all, and a processor with AMX
    assert not any(op.cpp(torch.empty(1, dtype=dtype)) for dtype in (torch.float16, torch.float64))
    assert not op.cpp(torch.empty(0)) and not op.cpp(torch.empty(1, device="meta"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert op.cpp_types() == (torch.float32,)


def test_bad_shapes_are_refused():
    from semantica import _C

    triple = (640, 64, 32)
    fine = dict(batch=1, queries=3, heads=2, dim=32, sizes=[5], q=triple, k=triple, v=triple, bfloat16=False, threads=1)
    _C.CrossAttentionShape(**fine, target=TARGETS[0])
    for wrong in ({"sizes": []}, {"sizes": [3, 0]}, {"queries": 0}, {"dim": 15}, {"threads": 0}):
        with pytest.raises(ValueError, match="sizes must be positive"):
            _C.CrossAttentionShape(**{**fine, **wrong}, target=TARGETS[0])
    with pytest.raises(ValueError, match="does not run here"):
        _C.CrossAttentionShape(**fine, target="AVX2")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_attention_of_diffusers_takes_the_loops_where_no_gradient_is_wanted(dtype, monkeypatch):
    """Text alone, and text beside an IP-Adapter, whose scale is a gate."""
    torch.manual_seed(0)
    attn = Attention(64, cross_attention_dim=48, heads=2, dim_head=32).eval()
    adapters = dict(hidden_size=64, cross_attention_dim=48, num_tokens=(4,), scale=0.6)
    both = {"stock": IPAdapterAttnProcessor2_0(**adapters), "fused": FusedIPAdapterAttnProcessor(**adapters)}
    both["fused"].load_state_dict(both["stock"].state_dict())
    hidden, text, picture = torch.randn(2, 30, 64), torch.randn(2, 77, 48), torch.randn(2, 1, 4, 48)
    calls = []
    run = op.run
    monkeypatch.setattr(op, "run", lambda *arguments: calls.append(arguments[3]) or run(*arguments))
    for given, processors in (
        (text, {"stock": AttnProcessor2_0(), "fused": FusedAttnProcessor()}),
        ((text, [picture]), both),
    ):
        results = {}
        for name, processor in processors.items():
            attn.set_processor(processor)
            attn.to(dtype)
            tokens = (given[0].to(dtype), [given[1][0].to(dtype)]) if isinstance(given, tuple) else given.to(dtype)
            with torch.no_grad():
                results[name] = attn(hidden.to(dtype), tokens)
        atol = 2e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(results["fused"], results["stock"], rtol=0, atol=atol)
    assert calls == [[77], [77, 4]]
    # weights want a gradient: diffusers' own
    attn(hidden.to(dtype), tokens)
    assert len(calls) == 2
    # self-attention, which PyTorch is as fast at in fp32
    attn, results = Attention(64, heads=2, dim_head=32).eval().to(dtype), []
    for processor in (AttnProcessor2_0(), FusedAttnProcessor()):
        attn.set_processor(processor)
        with torch.no_grad():
            results.append(attn(hidden.to(dtype)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=atol)
    assert calls[2:] == [[30]] * (dtype == torch.bfloat16)
    with torch.no_grad():
        assert fast(hidden) and not torch.func.vmap(lambda a: a + fast(a))(torch.zeros(2, 3)).any()
