"""CUDA or Triton: the table that chooses, the call that is made of a tensor, and what happens where CUDA cannot.

The kernels are a stand-in that computes in float64 from the addresses, sizes and types that it is given, as they would
lie in a card's memory; the real ones are proved in test_group_norm_cuda.
"""

import ctypes
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from semantica.benchmarks.kernels.implementations import OWN_LEEWAY, by_kernels, cuda_kernels, in_cuda, ours
from semantica.benchmarks.kernels.problems import Problem
from semantica.benchmarks.kernels.traffic import bytes_moved, who_serves
from semantica.benchmarks.kernels.verify import Answers, evaluate, verify
from semantica.kernels import cuda, dispatch
from semantica.kernels.group_norm import cuda as calls
from semantica.kernels.group_norm.cases import CASES, GroupNormCase
from semantica.kernels.group_norm.cuda_plan import CARDS, RESIDENT, plan, seconds
from semantica.kernels.group_norm.op import group_norm, group_norm_ref

CARD = calls.card
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CudaError(RuntimeError):
    pass


def seen(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """The memory at an address as a tensor."""
    if address == 0:
        return None
    count = torch.Size(shape).numel()
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


class GroupNorm:
    """`semantica._cuda.GroupNorm` on the CPU."""

    made: list["GroupNorm"] = []

    def __init__(self, **given):
        self.given = SimpleNamespace(**given)
        self.made.append(self)

    def like_x(self, address):
        """x, or what is like it, as `[samples, channels, pixels]`."""
        g = self.given
        if g.channels_last:
            return seen(address, (g.samples, g.pixels, g.channels), DTYPES[g.type]).transpose(1, 2)
        return seen(address, (g.samples, g.channels, g.pixels), DTYPES[g.type])

    def tensors(self, x, *values):
        """In float64."""
        g, made = self.given, [self.like_x(x).double()]
        for address, f32, stride in zip(values, g.f32, g.strides, strict=True):
            samples = g.samples if len(made) > 2 else 1
            length = (samples - 1) * stride + g.channels
            flat = seen(address, (length,), torch.float32 if f32 else DTYPES[g.type])
            shape = (samples, g.channels) if len(made) > 2 else (g.channels,)
            made.append(None if flat is None else flat.as_strided(shape, (stride, 1)[-len(shape) :]).double())
        return made

    def compute(self, x, weight, bias, scale, shift, addend, eps):
        x = x if addend is None else x + addend[:, :, None]
        y = group_norm_ref(x, self.given.groups, weight, bias, scale, shift, "silu" if self.given.silu else "none", eps)
        return x, y

    def forward(self, stream, x, weight, bias, scale, shift, addend, eps, y, mean, rstd, workspace):
        g = self.given
        added, made = self.compute(*self.tensors(x, weight, bias, scale, shift, addend), eps)
        self.like_x(y).copy_(made)
        grouped = added.reshape(g.samples, g.groups, -1)
        seen(mean, (g.samples, g.groups), torch.float32).copy_(grouped.mean(-1))
        seen(rstd, (g.samples, g.groups), torch.float32).copy_((grouped.var(-1, correction=0) + eps).rsqrt())
        assert (workspace != 0) == (g.path != RESIDENT) and stream == 7

    def backward(self, stream, dy, x, mean, rstd, weight, bias, scale, shift, addend, dx, *rest):
        g, (*gradients, workspace) = self.given, rest
        inputs = self.tensors(x, weight, bias, scale, shift, addend)
        leaves = [a for a in inputs if a is not None]
        for a in leaves:
            a.requires_grad_()
        with torch.enable_grad():
            _, y = self.compute(*inputs, 1e-5)
            found = dict(zip(map(id, leaves), torch.autograd.grad(y, leaves, self.like_x(dy).double())))
        self.like_x(dx).copy_(found[id(inputs[0])])
        for a, address, f32 in zip(inputs[1:], gradients, g.f32, strict=True):
            assert (a is None) == (address == 0)
            if a is not None:
                seen(address, tuple(a.shape), torch.float32 if f32 else DTYPES[g.type]).copy_(found[id(a)])
        assert workspace != 0 and stream == 7


def no_code(device):
    raise CudaError("code: no kernel image is available for execution on the device (cudaErrorNoKernelImageForDevice)")


@pytest.fixture
def card(monkeypatch):
    """A card whose memory is the host's."""
    module = SimpleNamespace(GroupNorm=GroupNorm, CudaError=CudaError, code=lambda device: 90)
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(calls, "card", lambda device: CARDS["sm_90"])
    monkeypatch.setattr(calls, "stream", lambda device: 7)
    monkeypatch.setattr(calls, "index", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    caches = (cuda.code, cuda.choice, calls.planned, calls.call)
    for cache in caches:
        cache.cache_clear()
    GroupNorm.made.clear()
    yield module
    for cache in caches:
        cache.cache_clear()


def inputs_of(case: GroupNormCase, dtype: torch.dtype) -> dict:
    inputs = case.inputs(dtype)
    # weights stay in fp32 in training, and one of FiLM's halves may be in another type than the other
    inputs["weight"] = inputs["weight"].float()
    if inputs["scale"] is not None:
        inputs["scale"] = inputs["scale"].float()
    return inputs


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_addresses_sizes_and_types_are_those_of_the_call(card, name, dtype):
    inputs = inputs_of(CASES[name], dtype)
    x, rest = inputs.pop("x"), inputs
    assert calls.can(x, rest["groups"], 1) and calls.can(x, rest["groups"], 2)
    leaves = {k: v.detach().requires_grad_() for k, v in {"x": x, **rest}.items() if isinstance(v, torch.Tensor)}
    y = by_kernels("cuda")(**{**rest, **leaves})
    # strides of x, whatever they are
    assert y.stride() == torch.empty_like(x).stride() and y.dtype == x.dtype
    wide = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    truth = group_norm_ref(**{**rest, **wide})
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), truth, rtol=tolerance, atol=tolerance)
    # a consumer whose gradient lies otherwise in memory
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    exact = torch.autograd.grad(truth, list(wide.values()), dy.double())
    for key, gradient, expected in zip(leaves, found, exact, strict=True):
        assert gradient.dtype == leaves[key].dtype and gradient.shape == leaves[key].shape
        torch.testing.assert_close(gradient.double(), expected, rtol=4 * tolerance, atol=4 * tolerance, msg=key)
    # what is alike is made once
    by_kernels("cuda")(**{"x": x, **rest})
    assert len(GroupNorm.made) == 2


def test_views_of_one_tensor_and_odd_addresses_are_served_as_they_are(card):
    x = torch.randn(2 * 5 * 3 * 8 + 1)[1:].view(2, 5, 3, 8).movedim(-1, 1)
    film, weight = torch.randn(2, 16), torch.randn(8)
    scale, shift = film.chunk(2, 1)
    assert calls.can(x, 4, 1) and not calls.problem(x, 4).aligned
    y, mean, rstd = calls.forward(x, 4, weight, weight, scale, shift.T.contiguous().T, "silu", 1e-5)
    torch.testing.assert_close(y, group_norm_ref(x, 4, weight, weight, scale, shift, "silu"))
    (made,) = GroupNorm.made
    # a view keeps its rows apart, what has gaps between channels is copied
    assert (made.given.strides, made.given.vector) == ((0, 0, 16, 8, 0), 1)


@pytest.mark.parametrize(("answers", "team"), [((33, 16, 8), 16), ((33, 16, 0), 8), ((33, 0, 0), 4)])
def test_clusters_are_as_large_as_the_card_says(card, monkeypatch, answers, team):
    """Multiprocessors are grouped otherwise on each card, and on each part of one: no size above 1 may be taken for
    granted, and 16 is refused unless it is there."""
    asked = []

    def clusters(*, device, blocks, threads, shared):
        asked.append((device, threads, shared))
        return {2: 66, **dict(zip((4, 8, 16), answers))}[blocks]

    card.clusters = clusters
    limits = dict(multi_processor_count=132, shared_memory_per_block_optin=227 << 10, L2_cache_size=50 << 20)
    limits = SimpleNamespace(**limits, shared_memory_per_multiprocessor=228 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    found = CARD.__wrapped__(torch.device("cuda", 0))
    assert found.clusters == (132, 66, *answers) and found.cluster == team
    # of blocks that fill a multiprocessor
    assert set(asked) == {(0, 512, 227 << 10)}
    problem = calls.Problem(1, 320, 32, 4096, 2, True)
    made = plan(problem, 1, found)
    assert (made.path, made.team, made.blocks) == (RESIDENT, team, 8 * team)
    # fewer at once than multiprocessors would permit: in turns
    few = dataclasses.replace(found, clusters=tuple(min(count, 1) for count in found.clusters))
    assert seconds(made, problem, 1, few) > seconds(made, problem, 1, found)
    monkeypatch.setattr(card, "code", lambda device: 80)
    cuda.code.cache_clear()
    assert CARD.__wrapped__(torch.device("cuda", 0)).clusters == (132,)


def test_addends_have_gradients_and_absent_ones_are_empty(card):
    x, weight = torch.randn(2, 5, 3, 8).movedim(-1, 1), torch.ones(8)
    addend = torch.randn(2, 8)
    y, mean, rstd = calls.forward(x, 4, weight, weight, None, None, "silu", 1e-5, addend)
    torch.testing.assert_close(y, group_norm_ref(x + addend[:, :, None, None], 4, weight, weight, None, None, "silu"))
    made = calls.backward(y, x, mean, rstd, 4, weight, weight, None, None, "silu", addend)
    assert [tuple(g.shape) for g in made] == [x.shape, (8,), (8,), (0,), (0,), (2, 8)]
    torch.testing.assert_close(made[5], made[0].sum((2, 3)))


@pytest.mark.parametrize(
    ("what", "x", "groups"),
    [
        ("channels of a larger tensor", torch.zeros(2, 8, 8, 128).movedim(-1, 1)[:, :64], 8),
        ("channels between pixels", torch.zeros(2, 8, 64, 8).movedim(2, 1), 8),
    ],
)
def test_what_the_kernels_cannot_do_is_tritons(card, what, x, groups):
    assert not calls.can(x, groups, 1)


def test_the_table_chooses_by_architecture_layout_and_size(card, tmp_path, monkeypatch):
    path = tmp_path / "choice.json"
    rows = [{"layout": "channels_last", "bytes": [1000, 40000], "use": "cuda"}]
    path.write_text(json.dumps({"forward": {"sm_90": rows}, "backward": {}}))
    monkeypatch.setattr(calls, "CHOICE", path)
    monkeypatch.setattr(calls.launch, "architecture", lambda device: "sm_90")
    small, fits, large = (torch.zeros(1, n, n, 16).movedim(-1, 1) for n in (2, 16, 64))
    assert [calls.serves_forward(x, 4) for x in (small, fits, large)] == [False, True, False]
    assert not calls.serves_forward(fits.contiguous(), 4) and not calls.serves_backward(fits, fits, None, None, 4)
    assert cuda.has_rows(path) and cuda.status(path) == "CUDA kernels serve sizes measured on sm_90"
    monkeypatch.setattr(calls.launch, "architecture", lambda device: "sm_80")
    assert not calls.serves_forward(fits, 4)
    # the same under the operator: the rival is asked first, and what it leaves goes on
    asked = []

    def kernel(name):
        return lambda *arguments: asked.append(name) or name

    monkeypatch.setattr(dispatch, "load", lambda target: {"wants": lambda first: first > 1}.get(target, kernel(target)))
    served = dispatch.lazy_kernel("triton", lambda first: first > 0, kernel("plain"), ("cuda", "wants"))
    monkeypatch.setattr(dispatch.launch, "modern", lambda device: True)

    class Number(int):
        device = None

    assert [served(Number(n)) for n in (0, 1, 2)] == ["plain", "triton", "cuda"]


def test_rows_say_which_kernels_serve_them_and_what_these_move(card, tmp_path, monkeypatch):
    path = tmp_path / "choice.json"
    served = {"sm_90": [{"layout": "channels_last", "bytes": [1000, 400000], "use": "cuda"}]}
    path.write_text(json.dumps({"forward": served, "backward": {}}))
    monkeypatch.setattr(calls, "CHOICE", path)
    monkeypatch.setattr(calls.launch, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(dispatch.REGISTERED["group_norm"], "cuda", ("Triton", ""))

    def problem(*shape: int, last: bool = True) -> Problem:
        return Problem("group_norm", GroupNormCase(shape, 32, channels_last=last), torch.bfloat16, "cuda")

    small, cache = problem(2, 64, 16, 16), 1000
    assert [who_serves(small, way) for way in ("forward", "backward", "both")] == ["CUDA", "Triton", "CUDA, Triton"]
    assert who_serves(problem(2, 64, 16, 16, last=False), "forward") == "Triton"
    # held in shared memory, x is read once and y written
    assert {bytes_moved(small, name, "forward", cache) for name in ("cuda", "fused")} == {2 * (2 * 64 * 256 * 2)}
    both = [bytes_moved(small, "fused", way, cache) for way in ("forward", "backward")]
    assert bytes_moved(small, "fused", "both", cache) == sum(both)
    pytest.importorskip("triton")
    # in registers too: however small the cache, no second walk
    assert bytes_moved(small, "triton", "backward", cache) == small.effective_bytes("backward")
    wide = problem(1, 128, 256, 256)
    assert bytes_moved(wide, "triton", "forward", cache) == wide.effective_bytes("forward") + 128 * 65536 * 2
    assert bytes_moved(wide, "triton", "forward", 50 << 20) == wide.effective_bytes("forward")


def test_where_cuda_has_no_code_triton_serves_and_it_is_said(card, monkeypatch, capsys):
    x = torch.zeros(1, 16, 16, 16).movedim(-1, 1)
    card.code = no_code
    version, why = cuda.code(x.device)
    assert version == 0 and "no kernel image is available" in why and not calls.can(x, 4, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ImportError, match="no kernel image"):
        cuda_kernels()
    monkeypatch.setattr(cuda, "_cuda", None)
    cuda.code.cache_clear()
    with pytest.raises(ImportError, match="is not built"):
        cuda_kernels()


def test_the_shipped_table_leaves_everything_to_triton_until_a_gpu_has_measured():
    content = json.loads(calls.CHOICE.read_text())
    assert content["forward"] == content["backward"] == {} and "Not yet measured on a GPU" in content["about"]
    assert [i.name for i in ours("group_norm")] == ["fused", "triton", "cuda"]
    assert [i.name for i in ours("cross_attention")] == ["fused"]
    assert group_norm(torch.zeros(1, 4, 2), 2, torch.ones(4), torch.zeros(4)).shape == (1, 4, 2)


# beyond the table: one block, clusters of several sizes, a grid, and a tensor of which a part is read twice
LARGE = [
    GroupNormCase(shape, 6 if shape[1] == 18 else 32, channels_last=last)
    for shape in ((8, 64, 16, 16), (2, 320, 64, 64), (1, 128, 8, 128, 128), (3, 96, 61, 43), (2, 18, 512, 512))
    for last in (False, True)
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE], ids=lambda c: f"{c.description} {c.layout}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_on_a_gpu_they_are_as_right_as_eager_and_repeat_their_bits(case, dtype):
    problem = Problem("group_norm", case, dtype, "cuda")
    # what was left out by mistake must not pass
    assert cuda.code(torch.device("cuda", 0))[1] == "" and in_cuda(problem)
    function, answers = cuda_kernels(), Answers.of(problem, gradients=True)
    verify(function, answers, gradients=True, leeway=OWN_LEEWAY)
    cotangent = torch.ones_like(problem.operator.output(case, dtype), device="cuda")
    first, second = (evaluate(function, problem.inputs(0), cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
