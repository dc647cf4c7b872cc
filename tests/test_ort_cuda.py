"""ONNX Runtime for GPUs over a stand-in on pretended devices: streams, threads, copies, and where it computes."""

import ctypes
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state

from semantica.engines import load_engine, open_bundle, ort_bound
from semantica.engines.ort_bound import ELEMENTS, BoundEngine
from semantica.errors import UserError
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule, noise

STORED = Path(__file__).parent / "stored" / "bundle"
SIZES = {number: dtype.itemsize for dtype, number in ELEMENTS.values()}
Real = onnxruntime.InferenceSession


class StandIn:
    """A session for CUDA whose arithmetic is ONNX Runtime's on the host, at the addresses that are bound.

    providers: those that it says it has. cuda: the pretended devices.
    """

    made: list["StandIn"] = []
    cuda, providers = None, ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def __init__(self, path, options, providers, provider_options, enable_fallback):
        self.real = Real(path, options, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        self.wanted, self.settings, self.enable_fallback = providers, provider_options[0], enable_fallback
        self.options, self.current = options, None if self.cuda is None else self.cuda.local.device
        self.busy, self.threads = False, set()
        self.made.append(self)

    def get_providers(self):
        return self.providers

    def io_binding(self):
        binding = SimpleNamespace(inputs={}, outputs={})

        def put(kept):
            return lambda name, kind, index, element, shape, place: kept.update({name: (kind, index, shape, place)})

        binding.bind_input, binding.bind_output = put(binding.inputs), put(binding.outputs)
        return binding

    def run_with_iobinding(self, binding, options):
        assert not self.busy, "two threads in one session"
        self.busy = True
        self.threads.add(threading.get_ident())

        def array(place):
            kind, index, shape, address = place
            assert (kind, index) == ("cuda", int(self.settings["device_id"]))
            size = math.prod(shape) * 4
            return np.frombuffer((ctypes.c_char * size).from_address(address), np.float32).reshape(shape)

        def work():
            given = {name: array(place) for name, place in binding.inputs.items()}
            for name, value in zip(binding.outputs, self.real.run(list(binding.outputs), given)):
                array(binding.outputs[name])[...] = value

        number = int(self.settings["user_compute_stream"])
        places = ({place[3] for place in kept.values()} for kept in (binding.inputs, binding.outputs))
        self.cuda.launch(number, work, *places)
        self.busy = False


@pytest.fixture
def standin(monkeypatch):
    """In place of ONNX Runtime's session."""
    kind = type("Session", (StandIn,), {"made": []})
    monkeypatch.setattr(onnxruntime, "InferenceSession", kind)
    return kind


def settings(steps=3):
    return Schedule(32), Sampling(steps, guidance=1.5)


def on(place, *arrays):
    return [torch.from_numpy(a).to(place) for a in arrays]


@pytest.fixture(scope="module")
def truth():
    """16 pictures, noise, and what comes of them from arrays on the host."""
    images, z = np.tanh(noise(1, (16, 3, 32, 32))), noise(0, (16, 3, 32, 32))
    engine = load_engine(STORED, "onnxruntime")
    return images, z, sample(engine, z, engine.condition(images), None, *settings())


def test_a_condition_is_copied_once_and_results_lie_in_the_callers_memory(truth, standin, cuda, monkeypatch):
    images, z, whole = (a[:2] for a in truth)
    standin.cuda, call, seen = cuda, cuda.call, []

    def watch(func, args, kwargs):
        copied = func is torch.ops.aten.copy_.default
        place = args[0].device if copied else kwargs.get("device")
        if place == torch.device("cuda:1") and (copied or func is torch.ops.aten.empty.memory_format):
            seen.append((copied, cuda.current_stream("cuda:1").cuda_stream))
        return call(func, args, kwargs)

    with cuda.mode():
        engine = BoundEngine(open_bundle(STORED), torch.device("cuda:1"))
        pictures, start = on("cuda:1", images, z)
        condition = engine.condition(pictures)
        predict = engine.bind(condition)
        level = torch.zeros(2).to("cuda:1")
        predict(start, level)
        monkeypatch.setattr(cuda, "call", watch)
        began = len(cuda.waits)
        predict(start, level)
        own = int(standin.made[0].settings["user_compute_stream"])
        # z, log-SNR and v; the result's memory is the caller's, copies run where the graph runs
        assert [where for copied, where in seen if copied] == [own] * 3
        assert [where for copied, where in seen if not copied] == [cuda.current_stream("cuda:1").cuda_stream]
        assert cuda.waits[began:] == []
        # equal tensors in another object are another condition, which may lie at the same addresses
        seen.clear()
        engine.bind(condition)(start, level)
        assert sum(copied for copied, _ in seen) == 3 + len(standin.made[0].get_inputs()) - 2
        monkeypatch.setattr(cuda, "call", call)
        made = sample(engine, start, condition, None, *settings()).cpu()
    np.testing.assert_allclose(made, whole, rtol=0, atol=1e-4)
    assert cuda.races == []


def test_sixteen_threads_get_their_own_pictures(truth, standin, cuda):
    images, z, whole = truth
    standin.cuda, results = cuda, []
    with cuda.mode():
        engine = BoundEngine(open_bundle(STORED), torch.device("cuda:1"))
    cuda.yields = True

    def one(i):
        with cuda.mode():
            picture, start = on("cuda:1", images[i : i + 1], z[i : i + 1])
            with torch.cuda.stream(torch.cuda.Stream("cuda:1")):
                # what is made on the default stream is there
                torch.cuda.current_stream("cuda:1").wait_stream(torch.cuda.default_stream("cuda:1"))
                results.append((i, sample(engine, start, engine.condition(picture), None, *settings()).cpu()))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 16 and cuda.races == []
    # for every thread that runs it a session would record its graphs anew
    assert [len(session.threads) for session in standin.made] == [1, 1]
    for i, made in results:
        np.testing.assert_allclose(made[0], whole[i], rtol=0, atol=1e-4, err_msg=f"picture {i}")


def test_a_step_that_failed_leaves_no_half_of_a_condition(truth, standin, cuda, monkeypatch):
    images, z = (a[:1] for a in truth[:2])
    standin.cuda = cuda

    def fails(*_):
        raise RuntimeError("CUDA error")

    with cuda.mode():
        engine = BoundEngine(open_bundle(STORED), torch.device("cuda:1"))
        picture, start, level = on("cuda:1", images, z, np.zeros(1, np.float32))
        first, second = (engine.bind(engine.condition(p)) for p in (picture, -picture))
        made = [second(start, level).cpu(), first(start, level).cpu()]
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(standin, "run_with_iobinding", fails)
            second(start, level)
        # the first condition's tensors are no longer those in the buffers
        again = [first(start, level).cpu(), second(start, level).cpu()]
    assert torch.equal(again[0], made[1]) and torch.equal(again[1], made[0]) and not torch.equal(made[0], made[1])


def test_a_recording_that_another_thread_spoils_costs_the_graph_and_not_the_picture(
    truth, standin, cuda, monkeypatch, caplog
):
    images, z, whole = (a[:2] for a in truth)
    standin.cuda, run, ids = cuda, standin.run_with_iobinding, []

    def spoilt(session, binding, options):
        ids.append(options.get_run_config_entry("gpu_graph_id"))
        if ids[-1] != "-1":
            raise state.Fail("CUDA failure 901: operation failed due to a previous error during capture\nmore of it")
        run(session, binding, options)

    monkeypatch.setattr(standin, "run_with_iobinding", spoilt)
    with cuda.mode():
        engine = BoundEngine(open_bundle(STORED), torch.device("cuda:1"))
        pictures, start = on("cuda:1", images, z)
        made = [sample(engine, start, engine.condition(pictures), None, *settings()).cpu() for _ in range(2)]
    for each in made:
        np.testing.assert_allclose(each, whole, rtol=0, atol=1e-4)
    # once for each graph and batch size, and then no more
    assert len(caplog.messages) == 2 and [id for id in ids if id != "-1"] == ["2", "4"] and cuda.races == []
    assert all("no graph of this batch size (CUDA failure 901" in said and "\n" not in said for said in caplog.messages)
    # what fails without a graph too is an error
    monkeypatch.setattr(standin, "run_with_iobinding", lambda *_: (_ for _ in ()).throw(state.Fail("no memory")))
    with cuda.mode(), pytest.raises(state.Fail, match="no memory"):
        engine.condition(pictures[:1])


def test_no_more_batch_sizes_are_kept_than_a_bound(truth, standin, cuda, monkeypatch):
    images, z, _ = truth
    standin.cuda, run, ids = cuda, standin.run_with_iobinding, []

    def watched(session, binding, options):
        ids.append(options.get_run_config_entry("gpu_graph_id"))
        run(session, binding, options)

    monkeypatch.setattr(standin, "run_with_iobinding", watched)
    monkeypatch.setattr(ort_bound, "SHAPES", 2)
    with cuda.mode():
        engine = BoundEngine(open_bundle(STORED), torch.device("cuda:1"))
        (pictures,) = on("cuda:1", images)
        embeddings = {count: engine.condition(pictures[:count]).emb.cpu() for count in (1, 2, 3, 4, 3)}
    assert ids == ["1", "2", "-1", "-1", "-1"] and len(engine.encoder.kept) == 2 and cuda.races == []
    for count, emb in embeddings.items():
        torch.testing.assert_close(emb, embeddings[4][:count], rtol=0, atol=1e-5)


def test_the_providers_settings(standin, cuda):
    standin.cuda = cuda
    with cuda.mode():
        BoundEngine(open_bundle(STORED), torch.device("cuda:1"))
    assert len({s.settings["user_compute_stream"] for s in standin.made}) == 2
    for session in standin.made:
        given = dict(session.settings)
        assert int(given.pop("user_compute_stream")) in [s.cuda_stream for s in cuda.streams]
        assert given == {
            "device_id": "1", "enable_cuda_graph": "1", "use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE",
            "prefer_nhwc": "0", "arena_extend_strategy": "kSameAsRequested",
        }  # fmt: skip
        # no attempt on the CPU where CUDA refuses the graph
        assert session.wanted == ["CUDAExecutionProvider"] and session.enable_fallback == 0 and session.current == 1


def test_no_silent_step_to_the_cpu(standin, cuda, monkeypatch):
    standin.cuda, standin.providers = cuda, ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with cuda.mode(), pytest.raises(UserError) as refused:
        load_engine(STORED, "onnxruntime", "cuda:1")
    with pytest.raises(UserError, match="device 'cuda:9' cannot be used"):
        load_engine(STORED, "onnxruntime", "cuda:9")
    said = str(refused.value)
    assert "has CPUExecutionProvider for" in said and "no CUDAExecutionProvider" in said
    assert "pip install onnxruntime-gpu" in said and "\n" not in said

    def refuse(*_, **__):
        raise RuntimeError("Could not find an implementation for Resize(19) node\nwith more lines")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    says = r"with CUDAExecutionProvider .*export it again.*Resize\(19\) node$"
    with cuda.mode(), pytest.raises(UserError, match=says):
        load_engine(STORED, "onnxruntime", "cuda")
