"""The benchmark harness: whoever cheats or errs is caught, the protocol and its statistics are right."""

import dataclasses
import random
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness.store import OURS, Replay
from semantica.benchmarks.kernels import verify
from semantica.benchmarks.kernels.implementations import Implementation, implementations
from semantica.benchmarks.kernels.problems import Problem
from semantica.benchmarks.kernels.suite import ProblemRace, contender, returned
from semantica.kernels import OPERATORS
from semantica.kernels.cross_attention.cases import CrossAttentionCase
from semantica.kernels.group_norm.cases import GroupNormCase

PROBLEM = Problem("group_norm", GroupNormCase((2, 16, 8, 8), 4, channels_last=True), torch.float32, "cpu")
ATTENTION = Problem("cross_attention", CrossAttentionCase(2, 8, 2, 32, (5, 3), gates=True), torch.float32, "cpu")
eager = OPERATORS["group_norm"].reference
FEW = timing.Protocol(warmup=1, least=5, most=5, seconds=0.0)


class Cached:
    """Computes once, then returns that."""

    def __init__(self):
        self.result = None

    def __call__(self, **arguments):
        if self.result is None:
            self.result = eager(**arguments)
        return self.result


class CachedByAddress:
    """Computes once for each input buffer."""

    def __init__(self):
        self.results = {}

    def __call__(self, x, **arguments):
        return self.results.setdefault(x.data_ptr(), eager(x=x, **arguments))


class TiresLater:
    """Right while it is looked at; after that, repeats itself."""

    def __init__(self):
        self.calls, self.result = 0, None

    def __call__(self, **arguments):
        self.calls += 1
        if self.calls <= 3:
            self.result = eager(**arguments)
        return self.result


def wrong(**arguments):
    return eager(**arguments) * 1.001


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.001


def wrong_backward(**arguments):
    return WrongGradient.apply(eager(**arguments))


def unwritten(**arguments):
    y = torch.empty_like(arguments["x"])
    right = eager(**arguments)
    y[:-1] = right[:-1]
    # all but the last row of the last sample
    y[-1, :, :-1] = right[-1, :, :-1]
    return y


def in_place(x, **arguments):
    result = eager(x=x, **arguments)
    with torch.no_grad():
        x.data[0, 0, 0, 0] += 1
    return result


def late(**arguments):
    """Returns at once; another thread writes the result."""
    x = arguments["x"]
    y = torch.empty_like(x)
    kept = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

    def work():
        time.sleep(0.1)
        y.copy_(eager(**kept))

    threading.Thread(target=work).start()
    return y


def half(**arguments):
    return eager(**arguments).bfloat16()


def broken(**arguments):
    raise RuntimeError("no kernel image is available")


def race_of(function, directions=("forward",), problem=PROBLEM, leeway=2.0) -> ProblemRace:
    return ProblemRace(problem, [Implementation("it", problem.op, lambda: function, leeway=leeway)], directions)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Cached(), "out is wrong"),
        (CachedByAddress(), "out is wrong"),
        (TiresLater(), "while it was timed: out is wrong"),
        (wrong, "out is wrong"),
        (unwritten, "out is wrong"),
        (in_place, "it changed its input x"),
        (late, "out changed after the call had returned"),
        (half, "expected"),
        (broken, "RuntimeError: no kernel image is available"),
    ],
)
def test_bad_implementations_are_caught(function, reason, monkeypatch):
    # longer than any thread may be kept from running, so that the late one ends between the two looks
    monkeypatch.setattr(verify, "PATIENCE", 0.5 if function is late else verify.PATIENCE)
    found = race_of(function)
    times, _ = found.race("forward", timing.CpuClock(), FEW)
    assert reason in found.wrong["it", "forward"]
    # caught before the race, they are not in it
    assert ("it" in times) == ("while it was timed" in reason)


def test_a_wrong_gradient_costs_the_backward_alone():
    found = race_of(wrong_backward, ("forward", "backward"))
    clock = timing.CpuClock()
    assert "it" in found.race("forward", clock, FEW)[0] and "it" not in found.race("backward", clock, FEW)[0]
    assert set(found.wrong) == {("it", "backward")} and "is wrong" in found.wrong["it", "backward"]


def test_memory_that_was_never_written_is_not_a_number():
    with verify.poisoned("cpu", [4096], fill=True):
        assert torch.empty(1024).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("problem", [PROBLEM, ATTENTION], ids=["group_norm", "cross_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_operators_and_eager_are_fair_in_every_direction(problem, dtype):
    problem = dataclasses.replace(problem, dtype=dtype)
    entrants = [i for i in implementations(problem.op) if i.name in ("fused", "eager")]
    directions = ("forward", "backward", "both")
    found = ProblemRace(problem, entrants, directions)
    for direction in directions:
        times, ceilings = found.race(direction, timing.CpuClock(), FEW)
        assert set(times) == {"fused", "eager", "copy", "matrix"} and not found.wrong
        assert all(len(t.device) == 5 and min(t.device) > 0 for t in times.values())
        assert min(ceilings.values()) > 0
        assert found.accuracy["eager", direction != "forward"].error > 0


def test_leeway_is_a_factor_of_eagers_error():
    answers = verify.Answers.of(PROBLEM, gradients=False)
    exact, plain = answers.truth[0]["out"], answers.eager[0]["out"]
    own = (plain.double() - exact).abs().max()
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    for factor, fair in ((1.9, True), (2.2, False)):
        off = exact.float().clone()
        off[0, 0, 0, 0] += factor * (own + ulp / 2)
        if fair:
            accuracy = answers.judge(0, {"out": off}, 2.0)
            assert accuracy.tensor == "out" and accuracy.eager == own.item()
        else:
            with pytest.raises(verify.Wrong):
                answers.judge(0, {"out": off}, 2.0)
    with pytest.raises(verify.Wrong):
        answers.judge(0, {"out": torch.full_like(plain, torch.nan)}, 1e9)


def test_every_call_has_other_buffers_filled_anew():
    answers = verify.Answers.of(PROBLEM, gradients=True)
    seen = []

    def spy(**arguments):
        seen.append((arguments["x"].data_ptr(), arguments["x"].sum().item(), arguments["x"]._version))
        return eager(**arguments)

    prepare = contender(spy, answers, "both")
    for number in range(7):
        result = prepare(number)()
        answers.judge(number % 2, returned(result, answers), 2.0)
    addresses, contents, versions = zip(*seen)
    assert len(set(addresses)) == 3 and addresses[:3] == addresses[3:6]
    assert len(set(contents)) == 2 and contents[0] != contents[1]
    # filled again before each use, though it is the same buffer
    assert versions[0] < versions[3] < versions[6]


def test_a_race_is_interleaved_in_random_order_and_warms_up_all_alike():
    calls = []

    def runner(name):
        return lambda number: lambda: calls.append((name, number)) or name

    names = ["a", "b", "c"]
    clock, protocol = timing.CpuClock(), timing.Protocol(warmup=2, least=12, most=12, seconds=0.0)
    times, last = timing.race({name: runner(name) for name in names}, clock, protocol)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 14 and all(sorted(n for n, _ in r) == names for r in rounds)
    assert all({number for _, number in r} == {i} for i, r in enumerate(rounds))
    assert len({tuple(n for n, _ in r) for r in rounds}) > 3
    assert all(len(t.device) == len(t.wall) == 12 for t in times.values())
    assert last == {name: (13, name) for name in names}


def test_rounds_follow_from_the_time_that_a_race_may_take(monkeypatch):
    now = 0.0

    def nap():
        nonlocal now
        now += 0.01

    def runs(protocol):
        times, _ = timing.race({"nap": lambda number: nap}, Instant(), protocol)
        return len(times["nap"].device)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))

    class Instant(timing.CpuClock):
        def __init__(self):
            self.sweep = torch.zeros(1, dtype=torch.int32)

    assert runs(timing.Protocol(1, 3, 100, seconds=0.0)) == 3
    assert runs(timing.Protocol(1, 3, 5, seconds=1.0)) == 5
    assert runs(timing.Protocol(1, 3, 100, seconds=0.105)) == 10


class Gpu:
    """torch.cuda in miniature: streams that run behind a host whose time only moves when something takes time."""

    def __init__(self):
        self.now, self.streams, self.current, self.swept = 0.0, {"main": 0.0, "side": 0.0}, "main", []
        self.cuda = SimpleNamespace(
            Event=lambda enable_timing=False: self.event(),
            synchronize=self.synchronize,
            _sleep=lambda cycles: self.launch(cycles / timing.CLOCK_RATE),
            get_device_properties=lambda index: SimpleNamespace(L2_cache_size=4 << 20),
        )
        self.int32 = torch.int32
        self.nan = torch.nan

    def zeros(self, count, dtype, device):
        return SimpleNamespace(amax=lambda: self.swept.append(count * 4) or self.launch(100e-6))

    def launch(self, seconds: float, host: float = 5e-6) -> None:
        self.now += host
        self.streams[self.current] = max(self.streams[self.current], self.now) + seconds

    def synchronize(self) -> None:
        self.now = max(self.now, *self.streams.values()) + 5e-6

    def event(self):
        gpu = self

        class Event:
            def record(self):
                gpu.now += 1e-6
                self.at = max(gpu.streams["main"], gpu.now)

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for module in (timing, verify):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=gpu.perf_counter))
    monkeypatch.setattr(timing, "torch", gpu)
    return gpu


def test_gpu_time_is_that_of_the_kernels_and_wall_time_that_of_the_host_too(gpu):
    clock = timing.CudaClock()

    def kernels(count, seconds, host):
        return lambda number: lambda: [gpu.launch(seconds, host) for _ in range(count)]

    # 10 kernels of 2 us each, which the host needs 300 us to enqueue; and one long kernel
    contenders = {"small": kernels(10, 2e-6, 30e-6), "large": kernels(1, 500e-6, 30e-6)}
    times, _ = timing.race(contenders, clock, timing.Protocol(2, 8, 8, 0.0))
    for name, device, wall in (("small", 20e-6, 300e-6), ("large", 500e-6, 530e-6)):
        assert times[name].device == pytest.approx([device] * 8, abs=2e-6)
        assert times[name].wall == pytest.approx([wall] * 8, abs=10e-6)
    # the caches are swept before every call, by more than they hold
    assert len(gpu.swept) == 2 * 2 * 10 and min(gpu.swept) >= 2 * (4 << 20)


def test_work_on_a_side_stream_is_seen_when_the_clock_does_not_see_it(gpu, monkeypatch):
    monkeypatch.setattr(verify, "torch", SimpleNamespace(cuda=gpu.cuda, nan=torch.nan))

    def call(stream):
        def evaluate(function, buffers, cotangent):
            gpu.current = stream
            gpu.launch(20e-3)
            gpu.current = "main"
            return {"out": torch.ones(1)}

        monkeypatch.setattr(verify, "evaluate", evaluate)
        return verify.call_late(None, {"x": torch.zeros(1)}, {"x": torch.ones(1)}, None, "cuda")[2]

    assert call("main") < verify.LATE < call("side")


def test_quantiles_and_replayed_samples_are_exact():
    rng = random.Random(3)
    for count in (1, 2, 5, 16):
        values = [rng.random() for _ in range(count)]
        for q in (0.2, 0.5, 0.8):
            assert timing.quantile(values, q) == pytest.approx(float(np.quantile(values, q)), rel=1e-12)
    replay, read = Replay(), []

    class Fixture:
        def pedantic(self, target, setup, rounds, iterations):
            for _ in range(rounds):
                setup()
                began = replay()
                target()
                read.append(replay() - began)

    replay.play(Fixture(), values)
    assert read == values


def test_adapters_compute_the_operators_from_what_rivals_offer(monkeypatch):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def nhwc(x, groups, weight, bias, eps, act=""):
        y = F.group_norm(x.contiguous(), groups, weight, bias, eps)
        return F.silu(y) if act else y

    offered = {
        "flash_attn": {"flash_attn_func": attend},
        "xformers": {}, "xformers.ops": {"memory_efficient_attention": attend},
        "liger_kernel": {}, "liger_kernel.ops": {},
        "liger_kernel.ops.group_norm": {"LigerGroupNormFunction": SimpleNamespace(
            apply=lambda x, weight, bias, channels, groups, eps: F.group_norm(x, groups, weight, bias, eps))},
        "apex": {}, "apex.contrib": {}, "apex.contrib.group_norm": {},
        "apex.contrib.group_norm.group_norm": {
            "cuda_group_norm_nhwc_one_pass": nhwc, "cuda_group_norm_nhwc_two_pass": nhwc},
    }  # fmt: skip
    for name, members in offered.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    plain = dataclasses.replace(PROBLEM.case, film=False)
    cases = [PROBLEM, dataclasses.replace(PROBLEM, case=plain), ATTENTION]
    for problem in cases:
        answers = verify.Answers.of(problem, gradients=True)
        rivals = [i for i in implementations(problem.op) if i.name not in (*OURS, "eager", "compile", "native")]
        assert len(rivals) == 2
        for rival in rivals:
            verify.verify(rival.load(), answers, gradients=True, leeway=rival.leeway)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnGpu:
    PROBLEM = dataclasses.replace(PROBLEM, device="cuda", case=GroupNormCase((8, 64, 128, 128), 32))

    @pytest.mark.parametrize("joins", [False, True])
    def test_work_on_a_side_stream_must_wait_and_be_waited_for(self, joins):
        side = torch.cuda.Stream()

        def elsewhere(**arguments):
            if joins:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y = eager(**arguments)
            if joins:
                torch.cuda.current_stream().wait_stream(side)
            return y

        found = race_of(elsewhere, problem=self.PROBLEM)
        times, _ = found.race("forward", timing.CudaClock(), FEW)
        assert ("it" in times) == joins and bool(found.wrong) != joins

    def test_cheats_are_caught(self):
        for function in (Cached(), CachedByAddress(), TiresLater(), wrong, unwritten, in_place):
            found = race_of(function, problem=self.PROBLEM)
            found.race("forward", timing.CudaClock(), FEW)
            assert found.wrong, function

    def test_gpu_time_is_that_of_the_copy_it_times(self):
        clock = timing.CudaClock()
        copy, moved = timing.copy_contender("cuda")

        def slow_host(number):
            def call():
                # many small launches: on the wall the host is the bottleneck, on the device it is not
                for _ in range(200):
                    tiny.add_(1)

            return call

        tiny = torch.zeros(1, device="cuda")
        times, _ = timing.race({"copy": copy, "host": slow_host}, clock, FEW)
        assert times["host"].quantile(0.5) < timing.quantile(times["host"].wall, 0.5)
        seconds = times["copy"].quantile(0.5)
        assert moved / seconds < 20e12 and seconds < timing.quantile(times["copy"].wall, 0.5)

    def test_the_fused_operators_are_accurate_where_they_are_timed(self):
        for problem in (self.PROBLEM, dataclasses.replace(ATTENTION, device="cuda", dtype=torch.bfloat16)):
            answers = verify.Answers.of(problem, gradients=True)
            fused = next(i for i in implementations(problem.op) if i.name == "fused")
            found = verify.verify(fused.load(), answers, gradients=True, leeway=fused.leeway)
            assert 0 < found.error < 0.1
