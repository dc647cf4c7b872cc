"""Whole runs as CUDA graphs: recorded on their own device, proven, safe with threads; on pretended CUDA devices."""

import copy
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from semantica import Stream, UViT
from semantica.sampling.compiled import CompiledDenoiser
from semantica.sampling.graphs import RECORDING, GraphCache, Replays
from semantica.sampling.loop import by_calls, sample
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule
from semantica.weak import Weak


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=64, depth=1, heads=2, emb_dim=32,
        streams={"image": 24}, conditioning="both",
    ).eval().requires_grad_(False)  # fmt: skip
    for p in unet.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    return unet


def conditions(unet, batch=3):
    g = torch.Generator().manual_seed(1)
    stream = Stream(torch.randn(batch, 5, 24, generator=g), torch.randn(batch, 24, generator=g))
    with torch.no_grad():
        return unet.condition({"image": stream}), unet.null(batch)


def noise(seed=7, batch=3):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def settings(guidance=2.0, steps=3, **changes):
    """Schedule and settings of a run."""
    return Schedule(16), Sampling(steps, guidance=guidance, **changes)


class Recorded:
    """A graph for the CPU: it replays on buffers of its own and overwrites its output, as CUDA graphs do."""

    def __init__(self, function, inputs):
        self.function, self.inputs = function, [t.clone() for t in inputs]
        self.output, self.replays = function(*self.inputs), 0

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.output.copy_(self.function(*self.inputs))
        self.replays += 1
        return self.output.clone()


def graphs(faster=True, **options):
    made, times = [], iter(range(1000))

    def record(*arguments):
        made.append(Recorded(*arguments))
        return made[-1]

    # the call is measured first, the replay second
    return GraphCache(record, lambda call: -next(times) if faster else next(times), **options), made


def test_a_graph_is_recorded_once_for_each_kind_of_call():
    found, made = graphs()
    x, y = torch.ones(2), torch.full((2,), 3.0)
    first = found(("a",), lambda t: t * 2, x)
    second = found(("a",), lambda t: t * 2, y)
    assert first.tolist() == [2, 2] and second.tolist() == [6, 6], "results are copied out"
    assert len(made) == 1
    found(("b",), lambda t: t * 3, x)
    found(("a",), lambda t: t * 2, torch.ones(3))
    found(("a",), lambda t: t * 2, x.double())
    assert len(made) == 4


def test_a_graph_that_is_no_faster_is_not_used():
    found, made = graphs(faster=False)
    for value in (1.0, 2.0):
        assert found(("a",), lambda t: t + 1, torch.tensor([value])).tolist() == [value + 1]
    # the one replay is its proof
    assert len(made) == 1 and made[0].replays == 1 and list(found.kept.values()) == [None]


def test_the_kind_unasked_for_longest_goes_first_and_no_capture_meets_it(monkeypatch):
    cache, made = graphs(limit=2)
    monkeypatch.setattr("semantica.sampling.graphs.drain", lambda device: made.append(RECORDING.locked()))
    # b gives way to c, since a was asked for in between; then c to b
    for name in "abacab":
        cache((name,), torch.neg, torch.ones(2))
    assert [key[0] for key in cache.kept] == [key[0] for key in cache.times] == ["a", "b"]
    assert len(made) == 6 and made[3] is made[5] is True


@pytest.mark.parametrize("wrong", ["first result for ever", "one input for ever", "nan"])
def test_a_replay_that_is_not_the_call_is_refused_in_one_line(wrong, caplog):
    def record(function, inputs):
        first = function(*inputs)
        if wrong == "one input for ever":
            return lambda x, y: function(x, inputs[1])
        return lambda *_: first if wrong == "first result for ever" else first * torch.nan

    found = GraphCache(record, lambda call: pytest.fail("what is wrong is not timed"))
    x, y = torch.arange(4.0), torch.ones(4)
    assert torch.equal(found(("a",), torch.add, x, y), x + y)
    # and is not tried again
    assert torch.equal(found(("a",), torch.add, x * 2, y), x * 2 + y)
    (said,) = caplog.messages
    assert "CUDA graph of this run differs from the run itself by" in said and "\n" not in said


def test_a_run_of_no_numbers_proves_no_graph(caplog):
    """Nor does the next one, which has some, then get the wrong ones."""

    def sometimes(x):
        return torch.where(x < 0, torch.nan, x)

    def record(function, inputs):
        first = function(*inputs)
        return lambda *_: torch.where(first.isfinite(), torch.nan, first)

    found = GraphCache(record, lambda call: pytest.fail("what is not proved is not timed"))
    x = torch.arange(1.0, 5.0)
    for given in (x, x * 2):
        assert torch.equal(found(("a",), sometimes, given), given)
    assert "differs from the run itself by inf" in caplog.messages[0]


def test_sixteen_threads_get_their_own_pictures():
    found, made = graphs()

    def slow(x, y):
        # other threads run between the copies in and the result
        threading.Event().wait(0.0005)
        return x * 10 + y

    def one(i):
        x, y = torch.full((2,), float(i)), torch.full((2,), float(-i))
        for _ in range(5):
            results.append((i, found(("a",), slow, x, y).tolist()))

    results, threads = [], [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 80 and len(made) == 1
    assert all(pair == [9.0 * i] * 2 for i, pair in results)


# on devices that are not there


def test_a_graph_is_recorded_on_its_tensors_device_whichever_is_current(cuda):
    with cuda.mode(), torch.no_grad():
        x, y = (torch.tensor([a, 2.0]).to("cuda:1") for a in (1.0, 5.0))
        times = iter((2.0, 1.0))
        found = GraphCache(Replays(x.device).record, lambda call: next(times))
        assert torch.cuda.current_device() == 0
        first, second = (found(("a",), lambda t: (t * 2 + 1).relu(), t) for t in (x, y))
        assert first.inner.tolist() == [3, 5] and second.inner.tolist() == [11, 5]
        assert first.device == second.device == torch.device("cuda:1")
    assert len(cuda.graphs) == 1 and len(cuda.graphs[0].log) == 3 and cuda.replays == 3
    assert cuda.graphs[0].mode == "thread_local" and cuda.races == []


def test_memory_is_there_for_a_graph_after_one_that_was_not_kept(cuda, caplog):
    # slower, then faster
    times = iter((1.0, 2.0, 2.0, 1.0))
    with cuda.mode(), torch.no_grad():
        x = torch.ones(2).to("cuda:0")
        found = GraphCache(Replays(x.device).record, lambda call: next(times))
        for name in "ab":
            assert found((name,), lambda t: t * 2, x).inner.tolist() == [2, 2]
        assert len(cuda.graphs) == 1 and not caplog.messages


def test_what_one_stream_makes_another_waits_for(cuda):
    """Callers with streams of their own, and results that are read on a third one."""
    times = iter((2.0, 1.0))
    with cuda.mode(), torch.no_grad():
        found = GraphCache(Replays(torch.device("cuda:1")).record, lambda call: next(times))
        streams = [torch.cuda.Stream("cuda:1") for _ in range(3)]
        for i in range(6):
            with torch.cuda.stream(streams[i % 2]):
                x = torch.full((2,), float(i), device="cuda:1")
                made = found(("a",), lambda t: t * 3, x)
            streams[2].wait_stream(streams[i % 2])
            with torch.cuda.stream(streams[2]):
                assert (made + 1).inner.tolist() == [3.0 * i + 1] * 2
    assert cuda.races == []
    # the pretence sees what is not waited for
    with cuda.mode(), torch.no_grad():
        with torch.cuda.stream(streams[0]):
            x = torch.ones(2, device="cuda:1")
        with torch.cuda.stream(streams[1]):
            x.add_(1)
    assert len(cuda.races) == 1


def test_threads_with_graphs_on_pretended_devices(cuda):
    cuda.yields = True
    times = iter((2.0, 1.0))
    with cuda.mode(), torch.no_grad():
        found = GraphCache(Replays(torch.device("cuda:1")).record, lambda call: next(times))

    def one(i):
        with cuda.mode(), torch.no_grad(), torch.cuda.stream(torch.cuda.Stream("cuda:1")):
            x, y = (torch.full((2,), value, device="cuda:1") for value in (float(i), float(-i)))
            for _ in range(3):
                results.append((i, found(("a",), lambda x, y: x * 10 + y, x, y).inner.tolist()))

    results, threads = [], [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 48 and len(cuda.graphs) == 1 and cuda.races == []
    assert all(pair == [9.0 * i] * 2 for i, pair in results)


def test_a_full_gpu_costs_the_graph_and_not_the_run(cuda, caplog):
    cuda.full = True
    with cuda.mode(), torch.no_grad():
        found, x = GraphCache(Replays(torch.device("cuda:0")).record), torch.ones(2, device="cuda:0")
        assert found(("a",), lambda t: t * 2, x).inner.tolist() == [2, 2]
        assert torch.cuda.current_stream() is torch.cuda.default_stream(), "nothing stays on the stream of the capture"
    (said,) = caplog.messages
    assert said.startswith("no CUDA graph of this run (") and "\n" not in said


def test_a_graph_that_failed_leaves_room_for_the_next_and_the_kept_one(cuda, caplog):
    """Torch's allocator takes a failed capture for one that goes on."""
    times = iter((2.0, 1.0) * 2)
    with cuda.mode(), torch.no_grad():
        found = GraphCache(Replays(torch.device("cuda:1")).record, lambda call: next(times))
        x = torch.ones(2, device="cuda:1")
        for name, full in (("a", False), ("b", True), ("c", False)):
            cuda.full = full
            assert found((name,), lambda t: t * 2, x).inner.tolist() == [2, 2]
        cuda.full = False
        replays = cuda.replays
        for name in "abc":
            assert found((name,), lambda t: t * 2, x).inner.tolist() == [2, 2]
    (said,) = caplog.messages
    assert "out of memory" in said and cuda.replays == replays + 2 and cuda.recording == [] and cuda.races == []
    # the first graph holds its pool, the last one and its holder another
    assert sorted(filter(None, cuda.pools.values())) == [1, 2]


def test_a_graph_that_may_still_run_is_waited_for_before_it_goes(cuda):
    """Also where nothing was recorded, which waits, in its place; and what failed before its capture has ended too."""
    times, seen = iter((2.0, 1.0)), []
    with cuda.mode(), torch.no_grad():
        replays = Replays(torch.device("cuda:1"))

        def record(function, inputs):
            made = replays.record(function, inputs)
            weakref.finalize(made, lambda: seen.append(len(cuda.waits)))
            return made

        def fails(t):
            if t.cuda_of.current_stream().cuda_stream:
                began.append(len(cuda.waits))
                raise RuntimeError("CUDA out of memory")
            return t * 3

        began, x = [], torch.ones(2, device="cuda:1")
        found = GraphCache(record, lambda call: next(times), limit=1)
        for _ in range(2):
            found(("a",), lambda t: t * 2, x)
        assert found(("b",), fails, x).inner.tolist() == [3, 3]
    (waits,) = seen
    assert list(found.kept.values()) == [None]
    assert cuda.waits[began[0] : waits] == ["stream.synchronize", "synchronize"]


def elsewhere(unet, *values):
    """A network and conditions on cuda:1."""
    return unet.to("cuda:1"), *(v.map(lambda t: t.to("cuda:1")) for v in values)


@pytest.mark.parametrize("graph", [False, True], ids=["calls", "graph"])
def test_a_run_on_the_second_device_is_that_of_the_host_and_waits_for_nothing(cuda, unet, graph):
    condition, null = conditions(unet)
    expected = {seed: sample(CompiledDenoiser(unet, torch.float32, "none"), noise(seed), condition, null, *settings())
                for seed in (7, 8)}  # fmt: skip
    with cuda.mode(), torch.no_grad():
        own, condition, null = elsewhere(copy.deepcopy(unet), condition, null)
        denoiser = CompiledDenoiser(own, torch.float32, "none", graph)
        if graph:
            times = iter((2.0, 1.0))
            denoiser.graphs.measure = lambda call: next(times)
        for seed in (7, 8, 7):
            z = noise(seed).to("cuda:1")
            began = len(cuda.waits)
            made = sample(denoiser, z, condition, null, *settings())
            waited = cuda.waits[began:]
            torch.testing.assert_close(made.inner, expected[seed], rtol=0, atol=2e-4)
            # recording and its proof wait, runs do not
            assert waited == [] or graph and seed == 7 and not cuda.replays > 2, waited
    assert cuda.races == [] and len(cuda.graphs) == graph and cuda.replays == 4 * graph


def test_a_graph_recorded_in_inference_mode_is_used_outside(cuda, unet):
    times = iter((2.0, 1.0))
    condition, null = conditions(unet)
    with cuda.mode(), torch.no_grad():
        own, condition, null = elsewhere(copy.deepcopy(unet), condition, null)
        denoiser = CompiledDenoiser(own, torch.float32, "none")
        denoiser.graphs.measure = lambda call: next(times)
        with torch.inference_mode():
            first = sample(denoiser, noise().to("cuda:1"), condition, null, *settings())
        again = sample(denoiser, noise().to("cuda:1"), condition, null, *settings())
        assert torch.equal(first.inner, again.inner) and not again.is_inference()


def test_conditions_made_in_inference_mode_compile_no_second_time(unet):
    denoiser, counter = CompiledDenoiser(unet, torch.float32, "none"), CompileCounter()
    denoiser.network.compile(backend=counter, fullgraph=True, dynamic=False)
    condition, null = conditions(unet)
    with torch.inference_mode():
        inferred = [c.map(torch.clone) for c in (condition, null)]
        z = noise()
    made = [
        sample(denoiser, noise(), condition, null, *settings()),
        sample(denoiser, noise(), *inferred, *settings()),
        sample(denoiser, z, *inferred, *settings()),
    ]
    with torch.inference_mode():
        made.append(sample(denoiser, z, *inferred, *settings()))
    assert counter.frame_count == 1
    assert all(torch.equal(a, made[0]) for a in made)


def fast(unet, dtype, *arguments):
    """A whole run through the rearranged network, not compiled."""
    return sample(CompiledDenoiser(unet, dtype, "none"), *arguments)


def test_runs_that_differ_in_what_a_graph_bakes_in_have_graphs_of_their_own(unet):
    denoiser = CompiledDenoiser(unet, torch.float32, "none")
    denoiser.graphs, made = graphs()
    condition, null = conditions(unet)
    few = [c.map(lambda t: t[:2]) for c in (condition, null)]
    runs = {
        "first": (noise(), condition, null, *settings(2.0, 3)),
        "same kind, other values": (noise(8), condition.map(lambda t: t * 0.9), null, *settings(2.0, 3)),
        "seed": (noise(), condition, null, *settings(2.0, 3, seed=1)),
        "guidance": (noise(), condition, null, *settings(3.0, 3)),
        "steps": (noise(), condition, null, *settings(2.0, 4)),
        "interval": (noise(), condition, null, *settings(2.0, 3, interval=(0.0, 0.5))),
        "schedule": (noise(), condition, null, Schedule(16, logsnr_min=-9.0), settings(2.0, 3)[1]),
        "batch": (noise(7, 2), *few, *settings(2.0, 3)),
    }
    for name, arguments in runs.items():
        expected = fast(unet, torch.float32, *arguments)
        torch.testing.assert_close(sample(denoiser, *arguments), expected, rtol=0, atol=1e-6, msg=name)
    assert len(made) == len(runs) - 2
    # neither fresh noise in every step nor somebody's guidance is part of a graph
    sample(denoiser, noise(), condition, null, *settings(2.0, 3, solver="ddpm"), noise)
    own = SimpleNamespace(needs=(), predictor=by_calls)
    actual = sample(denoiser, *runs["first"], guidance=own)
    with torch.no_grad():
        torch.testing.assert_close(actual, sample(unet, *runs["first"]), rtol=0, atol=1e-4)
    assert len(made) == len(runs) - 2
    # drawn conditions and shifts are inputs of a graph: other draws replay it
    for seed in (0, 1):
        draw = torch.Generator().manual_seed(seed)
        weak = Weak(
            condition.map(lambda t: t.flip(0)),
            torch.randint(3, (3, 3), generator=draw),
            torch.randn(3, 3, 32, generator=draw),
        )
        with torch.no_grad():
            expected = sample(unet, *runs["first"], weak=weak)
        torch.testing.assert_close(sample(denoiser, *runs["first"], weak=weak), expected, rtol=0, atol=1e-4)
    assert len(made) == len(runs) - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compile", ["none", "network"])
def test_on_a_gpu_nothing_waits_and_replay_equals_eager(compile, unet):
    condition, null = (c.map(lambda t: t.cuda()) for c in conditions(unet))
    unet = copy.deepcopy(unet).cuda()
    arguments = (condition, null, *settings(2.0))
    eager = CompiledDenoiser(unet, torch.bfloat16, compile, graphs=False)
    graphed = CompiledDenoiser(unet, torch.bfloat16, compile)
    # the graph is to be used here whatever the clock says
    times = iter((2.0, 1.0))
    graphed.graphs.measure = lambda call: next(times)
    for seed in (7, 8):
        z = noise(seed).cuda()
        expected = sample(eager, z, *arguments)
        actual = sample(graphed, z, *arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(eager, z, *arguments)
        sample(graphed, z, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("index", [0, 1])
def test_threads_on_a_gpu_get_their_own_pictures(index, unet):
    if index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    place = torch.device("cuda", index)
    condition, null = (c.map(lambda t: t.to(place)) for c in conditions(unet))
    own = copy.deepcopy(unet).to(place)
    eager, graphed = (CompiledDenoiser(own, torch.bfloat16, "none", graphs=g) for g in (False, True))
    times = iter((2.0, 1.0))
    graphed.graphs.measure = lambda call: next(times)
    expected = [sample(eager, noise(i).to(place), condition, null, *settings()).cpu() for i in range(16)]
    torch.cuda.synchronize(place)

    def one(i):
        with torch.cuda.stream(torch.cuda.Stream(place)):
            for _ in range(3):
                results.append((i, sample(graphed, noise(i).to(place), condition, null, *settings()).cpu()))

    results, threads = [], [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 48 and any(graphed.graphs.kept.values())
    for i, made in results:
        torch.testing.assert_close(made, expected[i], rtol=0, atol=0)
