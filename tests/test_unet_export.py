"""Bundles of diffusers' pipelines: through the gate, and sampled where torch cannot be imported."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from semantica import UserError
from semantica.cli import main
from semantica.engines import Bundle, load_engine, open_bundle, trt
from semantica.engines.built import sources
from semantica.engines.bundle import MANIFEST
from semantica.errors import ArtifactError
from semantica.export import gate, one_file, parity
from semantica.export import onnx as graph
from semantica.export.build import verify
from semantica.export.builders import tensorrt, tensorrt_rtx
from semantica.export.config import ExportConfig
from semantica.export.foreign import decoder
from semantica.export.gate import Gate
from semantica.export.one_file import compare
from semantica.export.program import Captured, decompositions
from semantica.files import entries
from semantica.fused.conditioned import PreparedAttnProcessor
from semantica.kernels.cross_attention.op import cross_attention_ref
from semantica.pipelines.bundle import BundlePipeline
from semantica.pipelines.unets import UNetPipeline
from semantica.sampling.guiders import IndependentCondition, TimeStep

FEW = ["--levels", "3", "--steps", "2"]
PROMPTS = ["two red bicycles", "a lighthouse"]
# one level each: what is captured is the same code
FLAT = {
    "block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",), "attention_head_dim": 2,
}  # fmt: skip
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "diffusers"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
from semantica.cli import main

sys.exit(main(sys.argv[1:]))
"""


def exported(folder, out, *options: str):
    assert main(["export", "--model", str(folder), "--out", str(out), *FEW, *options]) == 0
    return out


def without_torch(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def images(folder, bundle, inputs, ip=(None, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """Of the folder in torch, and of the bundle in ONNX Runtime, from the same noise."""
    pipes = UNetPipeline.load(folder, *ip), BundlePipeline(load_engine(bundle))
    made = [pipe(inputs, num_inference_steps=4, guidance_scale=4.0, seed=1, output_type="np").images for pipe in pipes]
    return tuple(np.asarray(array) for array in made)


@pytest.fixture(scope="module")
def made(foreign, tmp_path_factory):
    root = tmp_path_factory.mktemp("unets")
    folder = foreign.write(root / "model", "sd", vae={"block_out_channels": (16,)}, **FLAT)
    return folder, exported(folder, root / "bundle")


def test_a_bundle_gives_the_folders_images_without_torch(made, tmp_path):
    folder, path = made
    expected, actual = images(folder, path, PROMPTS)
    assert actual.shape == expected.shape == (2, 8, 8, 3) and np.abs(actual - expected).max() < 1e-3
    assert np.abs(actual[0] - actual[1]).max() > 0.05
    same = ["--prompt", *PROMPTS, "--steps", "2", "-n", "1", "--guidance", "4"]
    without_torch("sample", "--model", str(path), *same, "--out", str(tmp_path / "bundle.png"))
    assert main(["sample", "--model", str(folder), *same, "--out", str(tmp_path / "folder.png")]) == 0
    pair = [np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("bundle", "folder")]
    assert np.abs(pair[0] - pair[1]).max() <= 1


def test_one_file_samples_latents_and_decodes_them(made, tmp_path, monkeypatch):
    path, pipeline = made[1], BundlePipeline(load_engine(made[1]))
    monkeypatch.setattr(compare, "STEPS", (2, 5))
    noise = np.random.default_rng(0).standard_normal((3, *pipeline.sample_shape)).astype(np.float32)
    tokens = pipeline.planes("text", [*PROMPTS, ""])[:, 0]
    for solver in one_file.SOLVERS:
        out = tmp_path / f"{solver}.onnx"
        assert main(["export", "--model", str(path), "--one-file", str(out), "--solver", solver]) == 0
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        said = session.get_modelmeta().custom_metadata_map
        assert said["guidance"] == "7.5" and said["most_steps"] == "499" and said["output_size"] == "8"
        inputs = {"input_ids": tokens, "noise": noise, "guidance": np.array(4, np.float32)}
        (pixels,) = session.run(["images"], inputs | {"steps": np.array(9)})
        images = pipeline([*PROMPTS, ""], 1, 9, 4.0, latents=noise, solver=solver).images
        assert np.abs(pixels - np.stack([np.asarray(one, int) for one in images])).max() <= 1
        with pytest.raises(Exception, match="steps_must_be_1_to_499"):
            session.run(["images"], inputs | {"steps": np.array(500)})


def test_guiders_on_a_bundle(made):
    folder, path = made
    pipes = UNetPipeline.load(folder), BundlePipeline(load_engine(path))
    levels = np.linspace(-5, 4, 9, dtype=np.float32)
    with torch.no_grad():
        temb = pipes[0].unet.embedding(torch.from_numpy(levels)).numpy()
    np.testing.assert_allclose(pipes[1].engine.embedding(levels), temb, rtol=0, atol=1e-3)
    settings = dict(num_inference_steps=4, guidance_scale=4.0, seed=1, output_type="np")
    for guider in (IndependentCondition(), IndependentCondition({"text": ["a cat", "a dog"]}), TimeStep(1.0)):
        expected, actual = (np.asarray(pipe(PROMPTS, guider=guider, **settings).images) for pipe in pipes)
        assert np.abs(actual - expected).max() < 1e-3


def test_graphs_hold_the_keys_and_nothing_is_projected_again(made):
    folder, path = made
    bundle = open_bundle(path)
    for name in ("condition.onnx", "denoise.onnx", "decode.onnx"):
        onnx.checker.check_model(str(path / name), full_check=True)
    unet = UNetPipeline.load(folder).unet.unet
    crossings = [m for m in unet.modules() if isinstance(getattr(m, "processor", None), PreparedAttnProcessor)]
    denoise = onnx.load(path / "denoise.onnx", load_external_data=False)
    keys = [value.name for value in denoise.graph.input if value.name.startswith("k.")]
    assert len(keys) == len(crossings) == bundle.shapes["blocks"]
    assert bundle.manifest["attention"] == [[attn.heads, attn.inner_dim // attn.heads] for attn in crossings]
    # projections of the text are in the condition's graph only
    weights = {tensor.name for tensor in denoise.graph.initializer}
    assert weights and not [name for name in weights if "attn2.to_k" in name or "attn2.to_v" in name]
    counts = bundle.manifest["graphs"]["denoise.onnx"]["nodes"]
    assert counts["GroupNormalization"] == sum(isinstance(m, torch.nn.GroupNorm) for m in unet.modules())
    rows = bundle.manifest["parity"]
    assert set(rows) == {"onnxruntime", "native"} and all(row["decode_error"] < 2e-5 for row in rows.values())
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "decode.onnx"} <= set(bundle.manifest["files"])


def test_a_bundle_that_was_changed_or_is_asked_for_more_is_one_line(made, tmp_path):
    _, path = made
    pipe = BundlePipeline(load_engine(path))
    assert (pipe.guidance, pipe.max_samples) == (7.5, 64)
    with pytest.raises(UserError, match="a prompt is a int: give text"):
        pipe([3])
    with pytest.raises(UserError, match="in torch, sample the folder that it came from"):
        load_engine(path, "torch")
    with pytest.raises(UserError, match="latents has shape"):
        pipe.decode(np.zeros((1, 4, 2, 2), np.float32))
    manifest = json.loads((path / MANIFEST).read_text())
    for change, message in (
        ({"attention": [[2]]}, "impossible heads"),
        ({"tokenizers": {"text": ["elsewhere"]}}, "tokenizers that are not there"),
        ({"decode": 0}, "a decoder of no size"),
    ):
        broken = tmp_path / message.split()[0] / "bundle"
        broken.mkdir(parents=True)
        (broken / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=message):
            open_bundle(broken)
    # what a tokenizer would read without a hash
    shutil.copytree(path, tmp_path / "more")
    (tmp_path / "more/tokenizer/special_tokens_map.json").write_text('{"pad_token": "a"}')
    with pytest.raises(UserError, match="special_tokens_map.json has no hash"):
        open_bundle(tmp_path / "more")
    del manifest["files"]["tokenizer/vocab.json"]
    (tmp_path / "more/tokenizer/special_tokens_map.json").unlink()
    (tmp_path / "more" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="vocab.json has no hash"):
        open_bundle(tmp_path / "more")


def test_a_twin_that_fails_half_way_is_gone(tmp_path):
    gate = Gate.__new__(Gate)
    gate.folder, gate.problem = tmp_path / "bundle", None
    with pytest.raises(FileNotFoundError):
        gate.files(Captured("bf16", *(None,) * 4, (), ()))
    assert not list(tmp_path.iterdir())


def test_a_scale_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ip-scale is nothing without --ip-adapter"):
        ExportConfig(tmp_path, tmp_path / "out", ip_scale=0.5).check()


def test_a_faulty_decoder_is_refused(made):
    _, path = made
    engine, problem = load_engine(path), parity.load_problem(open_bundle(path))
    row, captured = parity.compare(engine, problem, "fp32"), Captured("fp32", *(None,) * 4, (), ())
    assert row["decode_error"] < 2e-5 and parity.failures(row, parity.BOUNDS["fp32"]) == []
    decode = engine.decoder
    for change in (0.1, np.nan):
        engine.decoder = lambda inputs, off=change: {"images": decode(inputs)["images"] + np.float32(off)}
        row = parity.compare(engine, problem, "fp32")
        with pytest.raises(gate.ArtifactError, match="decode_error .* it is the decoder"):
            gate.check(row, "native", None, problem, captured, None)


def test_tensorrt_is_asked_for_three_engines(made, tmp_path, monkeypatch):
    """Each with the batches that it will be given, and held to the type that its graph computes in."""
    bundle, asked = open_bundle(made[1]), {}
    layers = {"CONVOLUTION": {"FLOAT": 1}}

    def worker(request, place, backend, name):
        asked[name] = request
        return {"layers": layers, "backend_version": "11.0"}

    monkeypatch.setattr(tensorrt, "run_worker", worker)
    record = tensorrt_rtx.BUILDER.build(bundle, "sm_89", (1, 2, 8), tmp_path)
    assert record["profile"]["max"] == 8 and set(record["layers"]) == set(bundle.graphs) == set(asked)
    assert asked["denoise.onnx"]["profile"] == asked["condition.onnx"]["profile"] == {"min": 1, "opt": 2, "max": 8}
    assert asked["decode.onnx"]["profile"] == {"min": 1, "opt": 1, "max": 1}
    assert {Path(request["engine"]).name for request in asked.values()} == set(trt.FILES.values())
    # an autoencoder whose activations fp16 does not hold stays fp32, and nothing else does
    older = {name: value for name, value in bundle.manifest.items() if name != "decoder"} | {"precision": "fp16"}
    half = Bundle(bundle.folder, older)
    assert half.manifest["model"]["vae"]["force_upcast"] and half.precision_of("decode.onnx") == "fp32"
    said = Bundle(bundle.folder, older | {"decoder": {"precision": "fp16"}})
    assert said.precision_of("decode.onnx") == half.precision_of("denoise.onnx") == "fp16"
    with pytest.raises(ArtifactError, match="condition.onnx is fp16, but of its CONVOLUTION layers 1 in FLOAT"):
        tensorrt_rtx.BUILDER.build(half, "sm_89", (1, 2, 8), tmp_path)
    # an engine belongs to the decoder that it was made from, too
    assert sources(bundle) == ("condition.onnx", "denoise.onnx", "decode.onnx", "weights.safetensors")


class OnnxPlan:
    """In place of a deserialised engine: its graph in ONNX Runtime, with types and a largest batch of its own."""

    def __init__(self, trt, runtime, path: Path, device: torch.device, kept):
        self.device, self.most, self.engine = device, 1 if path.stem == "decode" else 4, None
        self.session = onnxruntime.InferenceSession(path.parents[2] / f"{path.stem}.onnx")
        self.whole = {entry.name for entry in self.session.get_inputs() if entry.type == "tensor(int64)"}

    def ready(self, name, tensor):
        return tensor.to(torch.int64 if name in self.whole else torch.float32).contiguous()

    def context(self):
        def run(inputs, fixed, stream):
            given = {name: tensor.numpy() for name, tensor in (inputs | dict(fixed)).items()}
            assert all(len(array) <= self.most for array in given.values())
            names = [entry.name for entry in self.session.get_outputs()]
            return dict(zip(names, map(torch.from_numpy, self.session.run(names, given))))

        run.fixed = None
        return run

    def keep(self):
        pass


def test_tensorrts_engine_takes_prompts_and_decodes(made, monkeypatch):
    _, path = made
    bundle, library = open_bundle(path), SimpleNamespace(Logger=MagicMock(), Runtime=MagicMock())
    monkeypatch.setattr(trt, "module_of", lambda backend: library)
    monkeypatch.setattr(trt, "Plan", OnnxPlan)
    files = dict.fromkeys(trt.FILES.values(), {"sha256": ""})
    manifest = {"backend": "tensorrt", "profile": {"max": 4}, "files": files}
    engine = trt.TensorRTEngine(bundle, path / "engines" / "tensorrt-sm_90", manifest, torch.device("cpu"))
    row = parity.compare(engine, parity.load_problem(bundle), engine.arithmetic)
    assert parity.failures(row, parity.BOUNDS["fp32"]) == [] and row["decode_error"] < 2e-5
    options = dict(num_inference_steps=2, guidance_scale=4.0, seed=1, output_type="np")
    actual, expected = (
        BundlePipeline(made)(PROMPTS, **options).images for made in (engine, load_engine(path, "onnxruntime"))
    )
    assert np.abs(np.asarray(actual) - np.asarray(expected)).max() < 1e-4
    # a bundle of an older version kept no pictures
    whole = replace(parity.load_problem(bundle), images=None)
    monkeypatch.setattr(parity, "load_problem", lambda bundle: whole)
    builder = SimpleNamespace(load=lambda *given: engine)
    with pytest.raises(UserError, match="has no pictures to compare its decoder with: export the bundle again"):
        verify(builder, bundle, path, manifest)


def test_weights_behind_two_gigabytes(made, tmp_path):
    """SDXL's are 5 GB in fp16: a file with a hole in it, whose last tensor a graph reads from behind it."""
    _, path = made
    # no graph holds weights, so that none comes near the 2 GB that a message of protobuf may have
    sizes = {name: (path / name).stat().st_size for name in open_bundle(path).graphs}
    assert all(size < 1e6 for size in sizes.values()), sizes
    weight, gap = torch.arange(12.0).reshape(3, 4), 5 << 30
    entries = {"hole": {"dtype": "U8", "shape": [gap], "data_offsets": [0, gap]}}
    entries["net.weight"] = {"dtype": "F32", "shape": [3, 4], "data_offsets": [gap, gap + 48]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (tmp_path / "weights.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(gap, 1)
        file.write(weight.numpy().tobytes())
    assert graph.places(tmp_path / "weights.safetensors")["net.weight"] == (8 + len(header) + gap, 48)
    net, batch = torch.nn.Linear(4, 3, bias=False), torch.export.Dim("batch", max=8)
    program = torch.export.export(net, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    model = graph.to_onnx(program, ["x"], ["y"], {"weight"})
    initializer = model.graph.initializers.pop("weight")
    initializer.name = "net.weight"
    model.graph.initializers["net.weight"] = initializer
    graph.save(model, tmp_path / "net.onnx", {"net.weight": weight}, tmp_path / "weights.safetensors")
    assert (tmp_path / "net.onnx").stat().st_size < 1e4
    x = np.ones((2, 4), np.float32)
    (y,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"x": x})
    assert (y == x @ weight.numpy().T).all()
    # a sparse file takes what is in it
    assert (tmp_path / "weights.safetensors").stat().st_blocks < 1000


def test_streams_of_several_lengths_are_one_attention_and_products():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, generator=generator) for n in (5, 14, 14))
    weight = torch.linspace(0.5, 1.5, 8)
    for sizes in ([3, 11], [7, 7], [10, 4], [2, 9, 3]):
        for norm in (None, weight):
            wanted = cross_attention_ref(q.double(), k.double(), v.double(), sizes, None, None, norm)
            made, _ = decompositions()[torch.ops.semantica.cross_attention.default](q, k, v, sizes, None, None, norm)
            assert (made - wanted).abs().max() < 1e-6


def built_for_a_card_that_is_not_here(path) -> dict:
    """The layers of each graph as TensorRT-RTX parsed them; nothing where it is not installed."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return {}
    assert main(["build", str(path), "--backend", "tensorrt-rtx", "--arch", "sm_89", "--batches", "1", "2", "4"]) == 0
    folder = path / "engines" / "tensorrt-rtx-sm_89"
    assert {f"{name}.engine" for name in ("condition", "denoise", "decode")} < {p.name for p in folder.iterdir()}
    return json.loads((folder / MANIFEST).read_text())["layers"]


def test_a_decoder_that_fp16_does_not_hold_stays_fp32(made, capsys):
    pipe = UNetPipeline.load(made[0])
    dtypes = []
    for upcast, factor, said in (
        (True, 1.0, "stays fp32: the autoencoder's configuration asks for it"),
        (False, 1.0, ""),
        # norms take it out again: what is decoded is the same
        (False, 1e5, "of at most 6.55e+04 in fp16"),
    ):
        pipe.vae.register_to_config(force_upcast=upcast)
        pipe.vae.decoder.conv_in.weight.mul_(factor)
        (module, _), record = decoder(pipe, "fp16")
        dtypes.append(next(module.parameters()).dtype)
        assert said in (line := capsys.readouterr().out) and bool(line) == bool(said)
        assert record["precision"] == {torch.float16: "fp16", torch.float32: "fp32"}[dtypes[-1]]
    assert dtypes == [torch.float32, torch.float16, torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("kind, precision, bound", [("xl", "fp16", 0.05), ("variations", "fp32", 1e-3)])
def test_other_pipelines(foreign, tmp_path, kind, precision, bound):
    folder = foreign.write(tmp_path / "model", kind)
    path = exported(folder, tmp_path / "bundle", "--precision", precision)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    expected, actual = images(folder, path, [picture] if kind == "variations" else PROMPTS)
    assert np.abs(actual - expected).max() < bound
    assert open_bundle(path).manifest["files"] == entries(path, open_bundle(path).manifest["files"])
    assert main(["export", "--model", str(path), "--one-file", str(tmp_path / "a.onnx")]) == 0
    if precision == "fp16":
        layers = built_for_a_card_that_is_not_here(path)
        for name, dtype in (("denoise.onnx", "HALF"), ("decode.onnx", "FLOAT")):
            assert not layers or set(layers[name]["CONVOLUTION"]) == {dtype}, name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_ip_adapter_goes_into_the_graphs(foreign, tmp_path, precision):
    folder = foreign.write(tmp_path / "model", "sd")
    weights = tmp_path / "ip" / "ip.safetensors"
    given = ["--ip-adapter", str(weights), "--ip-scale", "0.6", "--precision", precision]
    path = exported(folder, tmp_path / "bundle", *given)
    assert open_bundle(path).manifest["streams"] == {"text": 12, "image": 4}
    assert "program" in open_bundle(path).manifest["parity"]
    assert main(["export", "--model", str(path), "--one-file", str(tmp_path / "a.onnx"), "--solver", "dpmpp_2m"]) == 0
    # one attention for both streams of each block: two beside each other crash the builder
    counts, layers = (
        open_bundle(path).manifest["graphs"]["denoise.onnx"]["nodes"],
        built_for_a_card_that_is_not_here(path),
    )
    assert not layers or sum(layers["denoise.onnx"]["ATTENTION_OUTPUT"].values()) == counts["Attention"]
    if precision == "fp16":
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
        inputs = {"text": PROMPTS, "image": [picture] * 2}
        expected, actual = images(folder, path, inputs, (weights, 0.6))
        assert np.abs(actual - expected).max() < 0.05
        other, _ = images(folder, path, inputs, (weights, 0.0))
        assert np.abs(other - expected).max() > 10 * np.abs(actual - expected).max()
