"""The Triton kernels of cross_attention in Triton's interpreter, run by tests/test_cross_attention_triton.py.

`TRITON_INTERPRET` has to be set before triton is imported, and pytest does not collect this file by its name.
"""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semantica.kernels import cross_attention
from semantica.kernels.cross_attention.cases import CASES as CROSS_ATTENTION
from semantica.kernels.cross_attention.cases import CrossAttentionCase
from semantica.kernels.cross_attention.specimens import planners

oracle = runpy.run_path(str(Path(__file__).parents[1] / "test_kernels.py"))
run, widen, with_lse = (oracle[name] for name in ("run", "widen", "with_lse"))
run_guarded = runpy.run_path(str(Path(__file__).with_name("guards.py")))["run_guarded"]


def gradients(inputs):
    """o, lse (0 where absent) and every gradient, with cotangents that are exact in fp16."""
    return list(run(with_lse(cross_attention), inputs, torch.float16).values())


@pytest.mark.parametrize("name", ["one token", "views", "absent stream", "several tiles"])
def test_nothing_is_read_or_written_outside_and_nothing_left_unwritten(name):
    from semantica.kernels.cross_attention.backward import plan_backward
    from semantica.kernels.cross_attention.forward import plan_forward

    inputs = CROSS_ATTENTION[name].inputs(torch.float16)
    expected = cross_attention(**inputs, return_lse=True)
    if inputs["lengths"] is not None:
        # what stands in the tokens that are not there does not matter
        start = 0
        for s, size in enumerate(inputs["sizes"]):
            for b, length in enumerate(inputs["lengths"][:, s].tolist()):
                inputs["k"][b, start + length : start + size] = float("nan")
                inputs["v"][b, start + length : start + size] = float("nan")
            start += size
    tensors = [a for a in inputs.values() if isinstance(a, torch.Tensor)]
    launches, outputs = plan_forward(**inputs)
    o, lse = run_guarded(launches, tensors, outputs)
    assert torch.equal(o, expected[0]) and torch.equal(lse, expected[1])
    do, dlse = torch.randn(o.shape).half(), torch.randn(lse.shape)
    q, k, v, *rest = inputs.values()
    o, lse = o.clone(), lse.clone()
    launches, outputs = plan_backward(do, q, k, v, o, lse, dlse, *rest)
    assert len(run_guarded(launches, [*tensors, do, dlse, o, lse], outputs)) > 2


@pytest.mark.parametrize("batch", [1, 8], ids=["queries split", "whole"])
def test_two_runs_are_bit_equal(batch):
    case = CrossAttentionCase(batch, 40 if batch == 1 else 16, 9, 32, (16,), ((13,),) * batch, gates=True)
    inputs = case.inputs(torch.float16)
    first, second = gradients(inputs), gradients(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for a, b in zip(first, gradients(widen(inputs))):
        assert (a.double() - b).abs().max() <= 0.01 * b.abs().max()


def test_lengths_are_clamped_and_any_layout_is_taken():
    case = CrossAttentionCase(2, 9, 2, 32, (5, 20), ((5, 20), (0, 3)), gates=True)
    inputs = case.inputs(torch.float32)
    expected = gradients(inputs)
    others = {
        "lengths": torch.tensor([[99, 20], [-4, 3]], dtype=torch.int32),
        "q": inputs["q"].permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        "k": inputs["k"].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
        "v": torch.cat([inputs["v"], inputs["v"]], -1)[..., :32],
        "gates": inputs["gates"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    for a, b in zip(gradients({**inputs, **others}), expected):
        assert torch.equal(a, b)


def test_the_tuner_gets_the_plans_of_a_call():
    forward, backward = planners(**CROSS_ATTENTION["absent stream"].inputs(torch.float16))
    assert (len(forward()), len(backward())) == (1, 3)


def test_other_types_are_left_to_plain_torch():
    inputs = CROSS_ATTENTION["one token"].inputs(torch.float32)
    op = torch.ops.semantica.cross_attention
    for dtype, fused in ((torch.float32, True), (torch.float16, True), (torch.bfloat16, False), (torch.float64, False)):
        q, k, v = (inputs[name].to(dtype) for name in "qkv")
        assert (op(q, k, v, [1], None, None, None)[1].numel() > 0) == fused


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_streams(data):
    sizes = tuple(data.draw(st.lists(st.sampled_from([1, 7, 16, 33, 70]), min_size=1, max_size=3)))
    batch, heads, queries = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40))
    lengths = tuple(tuple(data.draw(st.integers(0, size)) for size in sizes) for _ in range(batch))
    masked, gates, norm, strided = (data.draw(st.booleans()) for _ in range(4))
    dim = data.draw(st.sampled_from([32, 48, 80]))
    case = CrossAttentionCase(batch, queries, heads, dim, sizes, lengths if masked else None, gates, norm, strided)
    inputs = case.inputs(torch.float32)
    for a, b in zip(gradients(inputs), gradients(widen(inputs))):
        assert (a.double() - b).abs().max() <= 2e-6 * max(1, b.abs().max().item())


def far_apart(tensor, axis, step, path):
    """The same values with `step` elements between neighbours along an axis, in a file with holes for the others."""
    shape, strides = tensor.shape, [step if i == axis else n for i, n in enumerate(tensor.contiguous().stride())]
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    with path.open("wb") as file:
        file.truncate(count * tensor.element_size())
    whole = torch.from_file(str(path), shared=True, size=count, dtype=tensor.dtype)
    return whole.as_strided(shape, strides).copy_(tensor)


@pytest.mark.parametrize("axis, step", [(2, 1 << 30), (1, 36_000_000)], ids=["heads", "tokens"])
def test_offsets_beyond_32_bits_are_right(axis, step, tmp_path):
    """Every stride fits 32 bits, and no product of it with a head or a row of a tile does."""
    case = CrossAttentionCase(1, 61, 3, 32, (64,))
    inputs = case.inputs(torch.float16)
    expected = gradients(inputs)
    names = ("q", "k", "v") if axis == 1 else ("k", "v")
    far = {name: far_apart(inputs[name], axis, step, tmp_path / name) for name in names}
    assert all((a.shape[axis] - 1) * step >= 2**31 for name, a in far.items() if name != "q")
    for a, b in zip(gradients({**inputs, **far}), expected, strict=True):
        assert torch.equal(a, b)
