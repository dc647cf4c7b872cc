"""Engines from bundles: TensorRT-RTX for cards that are not here, AOTInductor for this CPU; faults are one line."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from semantica.cli import main
from semantica.engines import load_engine, open_bundle
from semantica.errors import ArtifactError, UserError
from semantica.export import builders
from semantica.export.builders import Builder
from semantica.export.builders.tensorrt import check_types, run_worker
from semantica.export.config import ExportConfig
from semantica.export.write import export
from semantica.solvers import noise


@pytest.fixture
def copy(bundles, tmp_path):
    """A bundle of a precision that may be changed."""
    return lambda precision: shutil.copytree(bundles[precision], tmp_path / precision)


def worker(tmp_path, body: str, monkeypatch) -> dict:
    """Run a stand-in for TensorRT's module through the real worker process."""
    (tmp_path / "standin.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    files = {name: str(tmp_path / name) for name in ("engine", "timings", "layers")}
    request = {"module": "standin", "onnx": "a", "arch": None, "profile": {}, "refittable": True, **files}
    return run_worker(request, tmp_path / "request.json", "tensorrt", "denoise.onnx")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"tensorrt crashed on denoise.onnx \(SIGSEGV\)"),
        ("raise OSError('libnvinfer.so is missing')", "failed on denoise.onnx: OSError: libnvinfer.so is missing"),
        ("import os; os._exit(0)", "failed on denoise.onnx: no message"),
    ],
)
def test_a_builder_that_dies_is_one_line(tmp_path, monkeypatch, body, says):
    with pytest.raises(ArtifactError, match=says):
        worker(tmp_path, body, monkeypatch)
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"standin.py"}


STANDIN = """
from types import SimpleNamespace as N
from unittest.mock import MagicMock

class Cache:
    def __init__(self, known): self.known = known
    def serialize(self): return self.known + b"+"
    def combine(self, other, ignore): self.known = max(self.known, other.known[:-1], key=len)

class Config(MagicMock):
    # one of another card or version
    def create_timing_cache(self, known): return None if known == b"stale" else Cache(known)
    def set_timing_cache(self, cache, ignore): self.cache = cache; return True
    def get_timing_cache(self): return self.cache
    def set_flag(self, flag): self.flag = flag

config = Config()
network = N(num_layers=0, num_inputs=0)
builder = N(create_network=lambda flags: network, create_builder_config=lambda: config,
            create_optimization_profile=MagicMock(),
            # an engine that remembers how much its inspector may tell
            build_serialized_network=lambda network, config: f"{config.profiling_verbosity} {config.flag}".encode())
BuilderFlag = N(REFIT="refit")
Builder = lambda logger: builder
OnnxParser = lambda network, logger: N(parse_from_file=lambda path: True)
Logger, NetworkDefinitionCreationFlag = MagicMock(), N()
ProfilingVerbosity, LayerInformationFormat = N(DETAILED="detailed"), N(JSON="json")
inspector = lambda blob: N(get_engine_information=lambda form: f"{form} of {blob.decode()}")
Runtime = lambda logger: N(deserialize_cuda_engine=lambda blob: N(create_engine_inspector=lambda: inspector(blob)))
__version__ = "11.0"
"""


def test_timings_are_kept_from_build_to_build_and_the_inspector_is_asked(tmp_path, monkeypatch):
    for builds in (1, 2):
        assert worker(tmp_path, STANDIN, monkeypatch) == {"layers": {}, "backend_version": "11.0"}
        assert (tmp_path / "timings").read_bytes() == b"+" * builds
    assert (tmp_path / "layers").read_text() == "json of detailed refit"
    (tmp_path / "timings").write_bytes(b"stale")
    worker(tmp_path, STANDIN, monkeypatch)
    assert (tmp_path / "timings").read_bytes() == b"+"


def test_a_network_that_is_silently_fp32_is_an_error():
    honest = {"CONVOLUTION": {"HALF": 3}, "REDUCE": {"FLOAT": 9}, "MATRIX_MULTIPLY": {"HALF": 2}}
    check_types(honest, "fp16", "denoise.onnx")
    with pytest.raises(ArtifactError, match="is fp16, but of its MATRIX_MULTIPLY layers 1 in FLOAT"):
        check_types(honest | {"MATRIX_MULTIPLY": {"HALF": 1, "FLOAT": 1}}, "fp16", "denoise.onnx")
    with pytest.raises(ArtifactError, match="is bf16, but of its CONVOLUTION layers 3 in HALF"):
        check_types(honest, "bf16", "denoise.onnx")


def test_what_cannot_be_built_is_one_line_and_leaves_nothing(copy, capsys, monkeypatch):
    fp32, fp16 = copy("fp32"), copy("fp16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["build", str(fp32), "--backend", "tensorrt-rtx"]) == 2
    assert 'not installed here: pip install "semantica-diffusion[tensorrt-rtx]"' in capsys.readouterr().err
    monkeypatch.undo()
    for arguments, says in (
        ([str(fp32), "--backend", "magic"], "--backend"),
        ([str(fp32), "--backend", "inductor", "--batches", "4", "2", "8"], "--batches is 4 2 8"),
        ([str(fp32), "--backend", "inductor", "--arch", "sm_90"], "inductor compiles for this machine"),
        ([str(fp16), "--backend", "inductor"], "a CPU has no fast arithmetic"),
        ([str(fp32 / "nowhere"), "--backend", "inductor"], "is not a folder"),
    ):
        assert main(["build", *arguments]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said
    assert not (fp32 / "engines").exists() and not (fp16 / "engines").exists()


class Copied(Builder):
    """Stands for a builder that others bring: its engine is ONNX Runtime, whose v is off by a factor."""

    def __init__(self, factor):
        self.factor = factor

    def architecture(self, asked):
        return "anywhere"

    def check(self, bundle):
        if bundle.precision == "fp16":
            raise UserError("no fp16")

    def build(self, bundle, arch, batches, folder):
        shutil.copy(bundle.folder / "denoise.onnx", folder / "copied")
        return {"profile": {"min": 1, "opt": 2, "max": batches[2]}, "backend_version": "1"}

    def load(self, bundle, folder, manifest):
        engine = load_engine(bundle, "onnxruntime")
        predict = engine.predict
        engine.predict = lambda *inputs: predict(*inputs) * np.float32(self.factor)
        return engine


def test_a_builder_from_elsewhere_goes_through_the_same_gate(copy, capsys, monkeypatch):
    fp32, fp16 = copy("fp32"), copy("fp16")
    # takes the entry out again at the end, whatever is registered meanwhile
    monkeypatch.setitem(builders.BUILDERS, "onnxruntime", "")
    builders.register_builder("onnxruntime", Copied(1.01))
    assert main(["build", str(fp32), "--backend", "onnxruntime"]) == 1
    assert "the onnxruntime engine differs from the fp32 network" in capsys.readouterr().err
    assert main(["build", str(fp16), "--backend", "onnxruntime"]) == 2
    assert not (fp32 / "engines").exists() and not (fp16 / "engines").exists()
    builders.register_builder("onnxruntime", Copied(1.0))
    assert main(["build", str(fp32), "--backend", "onnxruntime", "--batches", "1", "2", "4"]) == 0
    manifest = json.loads((fp32 / "engines" / "onnxruntime-anywhere" / "manifest.json").read_text())
    assert manifest["profile"]["max"] == 4 and list(manifest["files"]) == ["copied"]
    assert manifest["parity"]["psnr_db"] > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_gpu_engines_without_a_gpu(copy, capsys):
    pytest.importorskip("tensorrt_rtx")
    fp32, fp16 = copy("fp32"), copy("fp16")
    for arguments, says in (
        ([str(fp16), "--backend", "tensorrt-rtx"], "give --arch, one of sm_75, sm_80, sm_86, sm_89, sm_120"),
        ([str(fp16), "--backend", "tensorrt-rtx", "--arch", "sm_90"], "--arch sm_90: TensorRT-RTX builds for sm_75"),
        ([str(fp32), "--backend", "tensorrt-rtx", "--arch", "sm_89"], "fp32, for which tensorrt-rtx has no attention"),
    ):
        assert main(["build", *arguments]) == 2
        assert says in capsys.readouterr().err
    assert main(["sample", "--model", str(fp16), "--engine", "tensorrt-rtx", "--image", "x.png"]) == 2


def test_what_is_called_of_tensorrt_is_there():
    trt = pytest.importorskip("tensorrt_rtx")
    for kind, names in {
        "BuilderFlag": "REFIT",
        "DynamicShapesKernelSpecializationStrategy": "EAGER",
        "ICudaEngine": "create_execution_context create_runtime_config create_serialization_config refittable "
        "get_tensor_dtype get_tensor_mode get_tensor_name num_io_tensors serialize_with_config",
        "IExecutionContext": "execute_async_v3 get_tensor_shape set_input_shape set_tensor_address",
        "IRuntimeCache": "deserialize serialize",
        "IRuntimeConfig": "create_runtime_cache dynamic_shapes_kernel_specialization_strategy set_runtime_cache",
        "ITimingCache": "combine serialize",
        "OnnxParserRefitter": "get_error num_errors refit_from_file",
        "Refitter": "get_missing_weights refit_cuda_engine",
        "SerializationFlag": "INCLUDE_REFIT",
    }.items():
        assert set(names.split()) <= {*dir(getattr(trt, kind))}, kind


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("streams", [("image",), ("image", "again")], ids=["one", "two"])
def test_tensorrt_rtx_builds_for_cards_that_are_not_here(make_run, tmp_path, precision, streams):
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "bundle"
    export(ExportConfig(make_run(tmp_path / "run", streams), out, precision, levels=2, steps=2))
    name = {"fp16": "HALF", "bf16": "BF16"}[precision]
    for arch in ("sm_86", "sm_89", "sm_120"):
        assert main(["build", str(out), "--backend", "tensorrt-rtx", "--arch", arch, "--batches", "1", "2", "4"]) == 0
        folder = out / "engines" / f"tensorrt-rtx-{arch}"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["arch"] == arch and manifest["profile"] == {"min": 1, "opt": 2, "max": 4}
        assert manifest["parity"] == {} and "no such GPU" in manifest["unverified"]
        assert manifest["onnx"]["denoise.onnx"] == open_bundle(out).manifest["files"]["denoise.onnx"]["sha256"]
        layers = manifest["layers"]["denoise.onnx"]
        # two blocks, self- and cross-attention, one node for all streams
        assert layers["ATTENTION_OUTPUT"] == {name: 4} and set(layers["CONVOLUTION"]) == {name}
        # the RMS norms' means are taken in fp32
        assert set(layers["REDUCE"]) - {name} == {"FLOAT"} and layers["REDUCE"]["FLOAT"] >= 10
        assert (folder / "denoise.engine").stat().st_size > 100_000
    assert main(["build", str(out), "--backend", "tensorrt-rtx", "--arch", "sm_86"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inductor_packages_run_without_the_models_code(copy, precision, tmp_path, monkeypatch):
    bundle = copy(precision)
    assert main(["build", str(bundle), "--backend", "inductor"]) == 0
    (folder,) = (bundle / "engines").iterdir()
    row = json.loads((folder / "manifest.json").read_text())["parity"]
    assert row["finite"] and row["psnr_db"] >= (100 if precision == "fp32" else 35) and row["levels"] == 4
    engine, network = (load_engine(bundle, backend) for backend in ("inductor", "torch"))
    z, level = torch.from_numpy(noise(2, (3, 3, 16, 16))), torch.tensor([-6.0, 0.0, 6.0])
    images = torch.from_numpy(np.tanh(noise(1, (3, 3, 16, 16))))
    expected = network(z, level, network.condition(images))
    for batch in (1, 3):
        actual = engine(z[:batch], level[:batch], engine.condition(images[:batch]))
        assert (actual - expected[:batch]).abs().max() < (1e-4 if precision == "fp32" else 0.3)
    code = (
        "import sys; from semantica.engines import load_engine; import torch\n"
        f"e = load_engine({str(bundle)!r}, 'inductor')\n"
        "e(torch.zeros(1, 3, 16, 16), torch.zeros(1), e.null(1))\n"
        "assert not {'semantica.model.uvit', 'semantica.kernels', 'diffusers'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
