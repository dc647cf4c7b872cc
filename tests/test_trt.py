"""TensorRT's engine over a stand-in that reads and writes real addresses, on the host and on pretended CUDA devices."""

import ctypes
import json
import math
import shutil
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from semantica.cli import main
from semantica.condition import Condition
from semantica.engines import BACKENDS, Backend, Bundle, network, open_bundle
from semantica.engines.built import sources
from semantica.engines.trt import KEPT, SESSIONS, TensorRTEngine
from semantica.engines.trt import load as trt_load
from semantica.engines.trt_context import Pool
from semantica.errors import ArtifactError, UserError
from semantica.export import parity
from semantica.export.builders import BUILDERS
from semantica.export.builders.tensorrt import TensorRTBuilder
from semantica.files import entries
from semantica.model.conditioner import encode
from semantica.pipelines.bundle import BundlePipeline
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule, noise

STORED = Path(__file__).parent / "stored" / "bundle"
MODULE = "standin_trt"


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor at an address."""
    count = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).view(shape)


class StandIn(ModuleType):
    """As much of TensorRT as the engine calls. The arithmetic is that of the bundle's network, on the host.

    mixed: uses of a context by two threads at once. contexts: how many were made, and with which current device.
    most: that there is memory for.
    """

    __version__, most = "11.0", math.inf

    def __init__(self, bundle, cuda=None):
        super().__init__(MODULE)
        self.bundle, self.cuda, self.mixed, self.contexts, self.addresses = bundle, cuda, [], [], []
        self.blocks = range(bundle.shapes["blocks"])
        self.Logger = lambda level: None
        self.Logger.WARNING = 1
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda blob: StandInEngine(self, blob))
        self.TensorIOMode = SimpleNamespace(OUTPUT="output")
        self.DataType = SimpleNamespace(FLOAT="f", HALF="h", BF16="b", INT64="i")
        self.Refitter = lambda engine, logger: Refitter(engine)
        self.OnnxParserRefitter = lambda refitter, logger: refitter
        self.SerializationFlag = SimpleNamespace(INCLUDE_REFIT="refit")
        self.__spec__ = ModuleSpec(MODULE, None)


class StandInEngine:
    """An engine file names its graph and the bundle whose weights it holds."""

    refittable, taken = True, True

    def __init__(self, trt, blob):
        self.trt, (self.graph, folder) = trt, blob.decode().split()
        self.put(folder)
        pairs = [f"{kind}.{i}" for i in trt.blocks for kind in "kv"]
        conditions = self.graph == "condition"
        self.inputs = ["image"] if conditions else ["z", "logsnr", "emb", *pairs]
        self.names = [*self.inputs, *([*pairs, "emb"] if conditions else ["v"])]
        self.num_io_tensors, self.function = len(self.names), getattr(self, self.graph)

    def put(self, folder):
        self.folder = Path(folder)
        self.unet, self.encoder = network.build(open_bundle(self.folder), torch.device("cpu"))

    def condition(self, image):
        made = self.unet.condition(encode(self.encoder, self.unet.stream_names, image))
        kinds = (("k", made.keys), ("v", made.values))
        pairs = {f"{kind}.{i}": kept[i] for kind, kept in kinds for i in self.trt.blocks}
        return {"emb": made.emb, **{name: a.transpose(1, 2) for name, a in pairs.items()}}

    def denoise(self, z, logsnr, emb, **pairs):
        keys, values = (tuple(pairs[f"{kind}.{i}"].transpose(1, 2) for i in self.trt.blocks) for kind in "kv")
        return {"v": self.unet(z, logsnr, Condition(keys, values, emb, None, self.trt.bundle.sizes))}

    def get_tensor_name(self, i):
        return self.names[i]

    def get_tensor_dtype(self, name):
        return "f"

    def get_tensor_mode(self, name):
        return "input" if name in self.inputs else "output"

    def create_serialization_config(self):
        return SimpleNamespace(set_flag=lambda flag: setattr(self, "flag", flag))

    def serialize_with_config(self, config):
        assert self.flag == "refit"
        return f"{self.graph} {self.folder}".encode()

    def create_execution_context(self, *config):
        if len(self.trt.contexts) >= self.trt.most:
            return None
        self.trt.contexts.append(self.trt.cuda and torch.cuda.current_device())
        return StandInContext(self)


class StandInContext:
    """Two threads in it at once leave each other's addresses behind, as they would in TensorRT."""

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.user = engine, {}, {}, None

    def enter(self):
        here = threading.get_ident()
        if self.user not in (None, here):
            self.engine.trt.mixed.append((self.user, here))
        self.user = here

    def set_input_shape(self, name, shape):
        self.enter()
        self.shapes[name] = shape
        return 1 <= shape[0] <= 8

    def get_tensor_shape(self, name):
        return self.engine.trt.bundle.shape_of(name, next(iter(self.shapes.values()))[0])

    def set_tensor_address(self, name, address):
        self.enter()
        self.engine.trt.addresses.append(name)
        self.addresses[name] = address
        # what the host's allocator gives, as TensorRT asks for what CUDA's gives
        return address % 64 == 0

    def execute_async_v3(self, stream):
        # other threads run between the addresses and the launch
        time.sleep(0.0005)
        engine, addresses = self.engine, dict(self.addresses)

        def work():
            given = {name: at(addresses[name], self.get_tensor_shape(name), torch.float32) for name in engine.inputs}
            for name, value in engine.function(**given).items():
                at(addresses[name], tuple(value.shape), torch.float32).copy_(value)

        self.user = None
        if engine.trt.cuda is None:
            work()
        else:
            outputs = {addresses[name] for name in engine.names if name not in engine.inputs}
            engine.trt.cuda.launch(stream, work, {addresses[name] for name in engine.inputs}, outputs)
            if stream == 0:
                engine.trt.cuda.wait("TensorRT on the default stream", {})
        return True


class Refitter:
    num_errors = 0

    def __init__(self, engine):
        self.engine = engine

    def refit_from_file(self, path):
        self.path = Path(path)
        return self.path.name == f"{self.engine.graph}.onnx" and self.path.is_file()

    def get_missing_weights(self):
        return ["a.weight"]

    def refit_cuda_engine(self):
        self.engine.put(self.path.parent)
        return self.engine.taken


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A function that makes the engine of the stored bundle over a stand-in."""

    def build(device="cpu", cuda=None, largest=8):
        folder = shutil.copytree(STORED, tmp_path / "bundle", dirs_exist_ok=True)
        place = folder / "engines" / "standin-sm_90"
        place.mkdir(parents=True, exist_ok=True)
        for name in ("condition", "denoise"):
            (place / f"{name}.engine").write_text(f"{name} {folder}")
        bundle = open_bundle(folder)
        manifest = {
            "format": "semantica-engine", "version": 1, "backend": "standin", "arch": "sm_90",
            "backend_version": StandIn.__version__, "profile": {"min": 1, "opt": 2, "max": largest}, "layers": {},
            "refittable": True, "onnx": {name: bundle.manifest["files"][name]["sha256"] for name in sources(bundle)},
            "files": entries(place, ["condition.engine", "denoise.engine"]),
        }  # fmt: skip
        (place / "manifest.json").write_text(json.dumps(manifest))
        trt = StandIn(bundle, cuda)
        monkeypatch.setitem(sys.modules, MODULE, trt)
        row = Backend("standin", trt_load, (MODULE, "torch"), "", {"cuda": ("fp32",)}, "nowhere")
        monkeypatch.setitem(BACKENDS, "standin", row)
        return TensorRTEngine(bundle, place, manifest, torch.device(device)), trt

    return build


def settings(steps=4, **changes):
    return Schedule(32), Sampling(steps, guidance=1.5, **changes)


def test_the_gate_compares_an_engine_where_it_computes(build, cuda):
    with cuda.mode():
        engine, trt = build("cuda:1", cuda)
        problem = parity.load_problem(engine.bundle)
        row = parity.compare(engine, problem, engine.arithmetic)
    assert row["finite"] and row["psnr_db"] > 90 and row["v_max_error"] < 1e-4
    assert parity.failures(row, parity.BOUNDS["fp32"]) == []
    # whichever device is current elsewhere
    assert set(trt.contexts) == {1} and cuda.races == []
    assert not [w for w in cuda.waits if "default stream" in w]


def test_a_network_on_the_second_device_passes_the_gate(cuda):
    with cuda.mode():
        engine = network.TorchEngine(open_bundle(STORED), torch.device("cuda:1"))
        row = parity.compare(engine, parity.load_problem(engine.bundle), engine.arithmetic)
    assert parity.failures(row, parity.BOUNDS["fp32"]) == [] and cuda.races == []


@pytest.mark.parametrize(("largest", "batches"), [(1, [1]), (2, [1, 2])])
def test_an_engine_for_small_batches_is_compared_too(build, largest, batches):
    engine, trt = build(largest=largest)
    row = parity.compare(engine, parity.load_problem(engine.bundle), engine.arithmetic)
    assert row["batches"] == batches and parity.failures(row, parity.BOUNDS["fp32"]) == []


def test_a_condition_is_bound_once_for_all_steps_and_every_address_is_aligned(build):
    engine, trt = build()
    image = torch.from_numpy(np.tanh(noise(1, (1, 3, 32, 32))))
    condition = engine.condition(image)
    trt.addresses.clear()
    # guided steps in the middle: two batch sizes, each with a context
    sample(engine, torch.from_numpy(noise(0, (1, 3, 32, 32))), condition, None, *settings(6, interval=(0.4, 0.8)))
    assert [trt.addresses.count(n) for n in ("z", "v", "k.0", "v.0", "emb")] == [6, 6, 2, 2, 2]
    assert len(trt.contexts) == 3


@pytest.mark.parametrize("pretended", [False, True], ids=["host", "cuda"])
def test_sixteen_threads_get_their_own_pictures(build, cuda, pretended):
    with cuda.mode():
        engine, trt = build("cuda:1", cuda) if pretended else build()
    cuda.yields = pretended
    if pretended:
        times = iter((2.0, 1.0) * 8)
        engine.graphs.measure = lambda call: next(times)
    images = np.tanh(noise(1, (16, 3, 32, 32)))
    z = noise(0, (16, 3, 32, 32))

    def one(i):
        with cuda.mode():
            place = torch.device(engine.device)
            for _ in range(1 if pretended else 2):
                picture, start = (torch.from_numpy(a[i : i + 1]).to(place) for a in (images, z))
                with torch.cuda.stream(torch.cuda.Stream(place) if pretended else None):
                    # what is made on the default stream is there
                    torch.cuda.current_stream(place).wait_stream(torch.cuda.default_stream(place))
                    made = sample(engine, start, engine.condition(picture), None, *settings(2))
                    results.append((i, made.cpu()))

    results, threads = [], [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    with torch.no_grad():
        expected = network.TorchEngine(engine.bundle, torch.device("cpu"))
        condition = expected.condition(torch.from_numpy(images))
        everything = sample(expected, torch.from_numpy(z), condition, None, *settings(2))
    assert len(results) == (16 if pretended else 32) and trt.mixed == [] and cuda.races == []
    for i, made in results:
        torch.testing.assert_close(made[0], everything[i], rtol=0, atol=1e-3, msg=f"picture {i}")
    # two in flight, each with one context of either graph; a recorded run has another
    assert len(trt.contexts) <= 2 * SESSIONS + pretended * KEPT


def test_a_run_is_one_graph_on_its_own_contexts(build, cuda):
    times = iter((2.0, 1.0))
    with cuda.mode():
        engine, trt = build("cuda:1", cuda)
        engine.graphs.measure = lambda call: next(times)
        shape, made = (3, 3, 32, 32), []
        images, z = (torch.from_numpy(a).to("cuda:1") for a in (np.tanh(noise(1, shape)), noise(0, shape)))
        for i in (0, 1, 2):
            condition = engine.condition(images[i : i + 1])
            began, replays = len(cuda.waits), cuda.replays
            made.append(sample(engine, z[i : i + 1], condition, None, *settings()).cpu())
        assert cuda.replays == replays + 1 and [w for w in cuda.waits[began:] if "cpu" not in w] == []
        hook = dict(on_step=lambda i, z: z)
        plain = [
            sample(engine, z[i : i + 1], engine.condition(images[i : i + 1]), None, *settings(), **hook)
            for i in (0, 1, 2)
        ]
    assert len(cuda.graphs) == 1 and cuda.races == [] and len(trt.contexts) == 3
    for actual, expected in zip(made, plain):
        torch.testing.assert_close(actual, expected.inner, rtol=0, atol=1e-6)


def test_a_gpu_without_room_for_another_context_samples_without_a_graph(build, cuda, caplog):
    with cuda.mode():
        engine, trt = build("cuda:1", cuda)
        z, image = (torch.zeros(1, 3, 32, 32, device="cuda:1") for _ in "ab")
        plain = sample(engine, z, engine.condition(image), None, *settings(), on_step=lambda i, z: z)
        # the two of those steps are there, a recorded run's own are one too many
        trt.most = len(trt.contexts)
        made = [sample(engine, z, engine.condition(image), None, *settings()) for _ in range(2)]
    (said,) = caplog.messages
    assert said.startswith("no CUDA graph of this run (") and "no memory for an execution context" in said
    assert all(torch.equal(m.inner, plain.inner) for m in made) and cuda.races == [] and cuda.recording == []


def test_a_pool_makes_no_more_than_its_limit_and_gives_back_after_a_fault():
    made, most, now = [], 0, []

    def make():
        made.append(object())
        return made[-1]

    pool = Pool(make, 3)
    # nobody gives back before three hold one at once
    full = threading.Barrier(3, timeout=60)

    def use():
        nonlocal most
        with pool.lease() as item:
            now.append(item)
            assert now.count(item) == 1
            most = max(most, len(now))
            full.wait()
            now.remove(item)

    threads = [threading.Thread(target=use) for _ in range(15)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == most == 3
    for _ in range(4):
        with pytest.raises(KeyError), pool.lease():
            raise KeyError
    assert len(pool.idle) == 3


@pytest.fixture
def finetuned(tmp_path):
    """A bundle of the stored one's network with other weights, and what its network answers to the gate."""
    folder = shutil.copytree(STORED, tmp_path / "finetuned")
    weights = load_file(folder / "weights.safetensors")
    name = next(name for name in weights if name.startswith("unet.conv_out") and name.endswith("weight"))
    save_file(weights | {name: weights[name] * 1.5}, folder / "weights.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    bundle = Bundle(folder, manifest)
    whole = parity.Network(*network.build(bundle, torch.device("cpu")), bundle.sizes)
    schedule = Schedule.of(manifest["model"]["scheduler"])
    parity.save_problem(parity.make_problem(whole, schedule, 4, 4), folder / "reference.safetensors")
    manifest["files"] = entries(folder, manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_bundle(folder)


def test_other_weights_of_the_same_network(build, finetuned):
    engine, trt = build()
    problem = parity.load_problem(finetuned)
    assert parity.failures(parity.compare(engine, problem, ""), parity.BOUNDS["fp32"])
    engine.refit(finetuned)
    assert not parity.failures(parity.compare(engine, problem, ""), parity.BOUNDS["fp32"])
    other = json.loads(json.dumps(finetuned.manifest))
    other["shapes"]["heads"] = 2
    with pytest.raises(UserError, match="holds another kind of network"):
        engine.refit(Bundle(finetuned.folder, other))
    engine.plans["denoise"].engine.taken = False
    with pytest.raises(ArtifactError, match="does not take the weights of .*denoise.onnx: a.weight"):
        engine.refit(finetuned)
    engine.plans["encode"].engine.refittable = False
    with pytest.raises(UserError, match="build it with --refittable"):
        engine.refit(finetuned)


def test_an_engine_like_another_goes_through_the_gate(build, cuda, finetuned, monkeypatch, capsys):
    with cuda.mode():
        old, trt = build("cuda:0", cuda)
        builder = TensorRTBuilder()
        # the stored bundle is fp32
        builder.backend, builder.check = "standin", lambda bundle: None
        monkeypatch.setitem(BUILDERS, "standin", builder)
        like = ["build", str(finetuned.folder), "--backend", "standin", "--like", str(old.bundle.folder)]
        assert main(like) == 0
        made = json.loads((finetuned.folder / "engines" / "standin-sm_90" / "manifest.json").read_text())
        assert made["refittable"] and made["profile"]["max"] == 8 and made["parity"]["psnr_db"] > 90
        shutil.rmtree(finetuned.folder / "engines")
        # weights that TensorRT takes and forgets are found out
        monkeypatch.setattr(StandInEngine, "serialize_with_config", lambda e, c: f"{e.graph} {STORED}".encode())
        assert main(like) == 1 and "differs from the fp32 network" in capsys.readouterr().err
        assert not (finetuned.folder / "engines").exists()
    assert main(["build", str(finetuned.folder), "--backend", "inductor", "--like", str(STORED)]) == 2
    assert "--like: inductor builds no engines that take other weights" in capsys.readouterr().err


def test_loading_says_what_is_not_as_it_was(build, cuda, monkeypatch, caplog):
    with cuda.mode():
        engine, trt = build("cuda:1", cuda)
        place = engine.bundle.folder / "engines" / "standin-sm_90" / "manifest.json"
        assert trt_load(engine.bundle, "standin", "cuda:1").device == "cuda:1" and not caplog.messages
        place.write_text(json.dumps(json.loads(place.read_text()) | {"card": "Another Card"}))
        trt_load(engine.bundle, "standin", "cuda:1")
        (said,) = caplog.messages
        assert "was built on Another Card, here is Pretended Card: build it again for speed" in said
        monkeypatch.delitem(sys.modules, MODULE)
        with pytest.raises(UserError, match=f"{MODULE} does not load here \\(No module named"):
            trt_load(engine.bundle, "standin", "cuda:1")


def test_what_is_asked_for_wrongly_is_one_line(build, cuda):
    with cuda.mode():
        engine, _ = build("cuda:1", cuda)
        with pytest.raises(UserError, match="z is on cpu, this standin engine computes on cuda:1"):
            sample(engine, torch.zeros(1, 3, 32, 32), engine.null(1), None, Schedule(32), Sampling(2, guidance=1))
    engine, trt = build(largest=9)
    with pytest.raises(UserError, match="takes no z of shape"):
        engine(torch.zeros(9, 3, 32, 32), torch.zeros(9), engine.null(9))
    pipeline = BundlePipeline(engine)
    assert pipeline.limit(True) == 4
