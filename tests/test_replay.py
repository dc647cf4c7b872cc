"""Plans that are kept and filled in, calls past torch's dispatcher: the same results; what must see an op sees it."""

import re
import threading
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from semantica.kernels import OPERATORS, cross_attention, dispatch, group_norm, launch, replay
from semantica.kernels.attention_columns import op as columns
from semantica.kernels.attention_moments import op as moments
from semantica.kernels.cross_attention import op as attention
from semantica.kernels.group_norm import op as norm
from semantica.kernels.launch import Launch


class Compiled:
    """A kernel that Triton has compiled, in its interface: `compiled[grid](*arguments)`."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def start(*arguments):
            self.kernel.started.append("compiled")
            self.kernel.function(grid, *arguments)

        return start


class Kernel:
    """A `triton.jit` function in its interface; runs on the CPU."""

    arg_names = ("a", "b", "out", "count", "EXTRA")

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        def start(*arguments, **options):
            assert options == {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
            self.started.append("planned")
            self.function(grid, *arguments)
            return Compiled(self)

        return start

    @staticmethod
    def function(grid, a, b, out, count, EXTRA):
        assert grid == (5, 1, 1) and count == a.numel()
        out.copy_(a - b + EXTRA)


@pytest.fixture
def plan():
    """`a - b + 1`, and how often it was planned and started."""

    def plan(a, b, extra):
        plan.planned += 1
        a = a.contiguous()
        out = torch.empty_like(a)
        arguments = {"count": a.numel(), "out": out, "a": a, "b": b}
        return [Launch(plan.kernel, (5,), arguments, {"EXTRA": extra}, 2)], (out,)

    plan.planned, plan.kernel = 0, Kernel()
    yield plan
    launch.forget_plans()


def test_a_kept_plan_is_filled_with_the_tensors_of_the_call(plan):
    results = []
    for _ in range(3):
        a, b = torch.randn(2, 3, 4)
        kept, (out,) = replay.run(plan, (a, b, 1))
        assert kept and torch.equal(out, a - b + 1)
        results.append(out)
    assert plan.planned == 1 and plan.kernel.started == ["planned", "compiled", "compiled"]
    assert len({out.data_ptr() for out in results}) == 3
    replay.run(plan, (a, b, 2))
    replay.run(plan, (a.double(), b, 1))
    replay.run(plan, (torch.randn(4, 3), torch.randn(4, 3), 1))
    # the compiler is told which addresses are multiples of 16
    replay.run(plan, (torch.randn(13)[1:].view(3, 4), b, 1))
    assert plan.planned == 5
    launch.forget_plans()
    replay.run(plan, (a, b, 1))
    assert plan.planned == 6


def test_one_tensor_as_two_arguments_is_no_rule_for_the_next_call(plan):
    a, b = torch.randn(2, 3, 4)
    assert torch.equal(replay.run(plan, (a, a, 1))[1][0], torch.ones(3, 4))
    assert torch.equal(replay.run(plan, (a, b, 1))[1][0], a - b + 1) and plan.planned == 1


def test_a_plan_that_copies_its_input_is_made_for_every_call(plan, monkeypatch):
    # Triton's own way to start what is not kept
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: {(5,): lambda **given: given["out"].copy_(
        given["a"] - given["b"] + given["EXTRA"]
    )})  # fmt: skip
    for _ in range(2):
        a, b = torch.randn(4, 3).T, torch.randn(3, 4)
        kept, (out,) = replay.run(plan, (a, b, 1))
        assert not kept and torch.equal(out, a - b + 1)


def test_kept_plans_do_not_fill_the_memory(plan, monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 4)
    for extra in range(11):
        replay.run(plan, (torch.ones(2), torch.ones(2), extra))
    assert len(replay.KEPT) <= 4


def test_sixteen_threads_share_kept_plans(plan):
    wrong = []

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(50):
            a, b = torch.randn(2, 3, 4, generator=g)
            if not torch.equal(replay.run(plan, (a, b, 1))[1][0], a - b + 1):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_allocates_what_its_plan_did():
    """The Triton plans of both operators: every shape, stride and type, and no plan made anew."""
    pytest.importorskip("triton")
    from semantica.kernels.cross_attention.forward import forward as attend
    from semantica.kernels.group_norm.backward import backward
    from semantica.kernels.group_norm.forward import forward

    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    w, film = torch.ones(8), torch.randn(2, 16).chunk(2, 1)
    q, k = torch.randn(2, 6, 2, 64), torch.randn(2, 7, 2, 64)
    with replay.idle():
        for _ in range(2):
            y, mean, rstd = forward(x, 4, w, w, *film, "silu", 1e-5)
            gradients = backward(y, x, mean, rstd, 4, w, w, *film, "silu")
            o, lse = attend(q, k, k, [7], None, None, None)
            assert len(replay.KEPT) == 3 and all(replay.KEPT.values())
    assert y.stride() == x.stride() and mean.shape == rstd.shape == (2, 4)
    assert [tuple(a.shape) for a in gradients] == [x.shape, (8,), (8,), (2, 8), (2, 8), (0,)]
    assert o.shape == q.shape and lse.shape == (2, 2, 1, 6) and lse.dtype == torch.float32
    assert not replay.KEPT


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


PAIRS = [
    ("group_norm", norm),
    ("cross_attention", attention),
    ("attention_moments", moments),
    ("attention_columns", columns),
]


@pytest.fixture(params=PAIRS, ids=lambda pair: pair[0])
def operator(request, monkeypatch):
    """Inputs of an operator, the module of its op, and how often a fast kernel was called past the dispatcher."""
    name, module = request.param
    inputs, calls = OPERATORS[name].cases["tiny"].inputs(torch.float32), []

    def counted(function):
        def kernel(*arguments):
            calls.append(function.__name__)
            return function(*arguments)

        return kernel

    monkeypatch.setitem(dispatch.KERNELS, (module.op, "cpu"), counted(module.forward_plain))
    monkeypatch.setitem(dispatch.KERNELS, (module.op_backward, "cpu"), counted(module.backward_plain))
    return getattr(module, name), inputs, f"semantica::{name}", calls


def test_past_the_dispatcher_values_and_gradients_are_the_same(operator):
    function, inputs, name, calls = operator
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    out = function(**inputs)
    gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    assert calls == ["forward_plain", "backward_plain"]
    with Seen() as seen:
        slow = function(**inputs)
        expected = torch.autograd.grad(slow.square().sum(), list(leaves.values()))
    assert calls == ["forward_plain", "backward_plain"] and {name, f"{name}_backward"} <= set(seen.names)
    torch.testing.assert_close((out, *gradients), (slow, *expected))
    with torch.no_grad():
        assert not function(**inputs).requires_grad and len(calls) == 3
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(function(**inputs).square().sum(), list(leaves.values())[:1], create_graph=True)
        torch.autograd.grad(g.sum(), list(leaves.values())[:1])


def test_what_must_see_an_operator_sees_it(operator):
    function, inputs, name, calls = operator
    first = next(iter(inputs))

    def of(x):
        return function(**{**inputs, first: x})

    graph = make_fx(of)(inputs[first])
    assert any(getattr(node.target, "name", str)() == name for node in graph.graph.nodes if callable(node.target))
    with torch.profiler.profile() as profile:
        of(inputs[first])
    assert name in {event.name for event in profile.events()}
    torch.compile(of, backend="aot_eager", fullgraph=True)(inputs[first])

    class Own(torch.Tensor):
        seen = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    of(inputs[first].as_subclass(Own))
    assert any(name.replace("::", ".") in text for text in Own.seen)
    assert not calls
    # a tensor whose sign is yet to be changed
    lazy = torch.complex(torch.zeros_like(inputs[first]), -inputs[first]).conj().imag
    assert lazy.is_neg()
    torch.testing.assert_close(of(lazy), of(inputs[first]))
    assert calls == ["forward_plain"]


@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_and_forward_mode_give_the_derivatives_of_reverse_mode(name):
    """torch would give custom operators forward derivatives of zero, and refuse them the transforms of torch.func."""
    inputs, function = OPERATORS[name].cases["tiny"].inputs(torch.float64), OPERATORS[name].function
    first = next(iter(inputs))
    x, along = inputs[first], torch.randn_like(inputs[first])

    def of(x):
        return function(**{**inputs, first: x})

    leaf = x.clone().requires_grad_()
    out = of(leaf)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    _, tangent = torch.func.jvp(of, (x,), (along,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(of(forward_ad.make_dual(x, along))).tangent
    assert tangent.abs().max() > 1e-3
    torch.testing.assert_close(tangent, dual)
    torch.testing.assert_close((2 * out * tangent).sum(), (gradient * along).sum())
    torch.testing.assert_close(torch.func.grad(lambda x: of(x).square().sum())(x), gradient)
    many = torch.stack([x, along])
    torch.testing.assert_close(torch.func.vmap(of)(many), torch.stack([of(x), of(along)]))


def test_public_functions_are_those_of_the_ops():
    assert group_norm is norm.group_norm and cross_attention is attention.cross_attention


def test_host_cost_times_the_triton_path_and_leaves_no_trace(monkeypatch):
    pytest.importorskip("triton")
    from semantica.benchmarks.kernels import host_cost

    monkeypatch.setattr(host_cost, "CALLS", 2)
    before = dict(dispatch.KERNELS), launch.DEVICE
    rows = host_cost.run("cpu", tuple(OPERATORS), ("tiny",))
    assert [(row["op"], row["call"]) for row in rows] == [
        (name, call) for name in OPERATORS for call in ("forward", "forward + backward")
    ]
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in rows)
    assert (dispatch.KERNELS, launch.DEVICE) == before and not replay.KEPT


def test_what_memory_and_race_checkers_watch_is_every_triton_kernel(monkeypatch):
    pytest.importorskip("triton")
    from semantica.benchmarks.kernels import exercise
    from semantica.benchmarks.kernels.host_cost import planned_on

    started = set()

    class Start(replay.Start):
        def __init__(self, planned, slots):
            started.add(planned.kernel.__name__)
            super().__init__(planned, slots)

    monkeypatch.setattr(replay, "Start", Start)
    monkeypatch.setattr(exercise, "noise", lambda *arguments: started.add("noise_kernel"))
    with planned_on("cpu"):
        exercise.exercise("cpu")
    kernel, sources = r"@triton.jit\ndef (\w+_kernel)\(", Path(launch.__file__).parent.rglob("*.py")
    assert started == {name for path in sources for name in re.findall(kernel, path.read_text())}
