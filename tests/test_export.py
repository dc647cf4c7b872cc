"""Export: graphs with native nodes and the right types, agreement with the network, and faults that are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from semantica import PretrainedEncoder, SemanticaPipeline
from semantica.benchmarks.sampling.models import build
from semantica.cli import main
from semantica.engines import load_engine
from semantica.engines.bundle import open_bundle
from semantica.engines.ort_bound import BoundEngine
from semantica.errors import ArtifactError
from semantica.export import program, write
from semantica.export.config import ExportConfig
from semantica.export.gate import Gate
from semantica.export.onnx_runtime import with_layer_norms
from semantica.export.program import capture
from semantica.files import entries
from semantica.model.layers import GroupNormAct
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule, noise

FEW = ["--levels", "4", "--steps", "3"]


def psnr(a, b) -> float:
    return 10 * np.log10(4 / np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


@pytest.mark.parametrize(("precision", "element"), [("fp32", "FLOAT"), ("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_graphs_have_native_nodes_named_batch_and_the_types_of_the_precision(bundles, small_run, precision, element):
    model = onnx.load(bundles[precision] / "denoise.onnx", load_external_data=False)
    onnx.checker.check_model(str(bundles[precision] / "denoise.onnx"), full_check=True)
    assert [o.version for o in model.opset_import if o.domain == ""] == [23]
    assert {o.domain for o in model.opset_import} == {""} and not model.functions
    counts = open_bundle(bundles[precision]).manifest["graphs"]["denoise.onnx"]["nodes"]
    unet = SemanticaPipeline.from_pretrained(small_run).unet
    # no kernels for bf16 on ONNX Runtime's CUDA, and no sizes that a host would have to work out
    assert not {"Resize", "DepthToSpace", "Shape"} & set(counts)
    # two blocks with self- and cross-attention
    assert counts["Attention"] == 4
    assert counts["GroupNormalization"] == sum(isinstance(m, GroupNormAct) for m in unet.modules())
    for node in model.graph.node:
        given = {a.name: a for a in node.attribute}
        if node.op_type in ("GroupNormalization", "RMSNormalization"):
            # 1 is fp32, also the default
            assert "stash_type" not in given or given["stash_type"].i == 1
        if node.op_type == "GroupNormalization":
            assert given["epsilon"].f == pytest.approx(1e-5)
    shapes = {
        v.name: ([d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim], v.type.tensor_type.elem_type)
        for v in (*model.graph.input, *model.graph.output)
    }
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.DataType.Value(element)
    keys = {f"{kind}.{i}": (["batch", 2, 16, 32], narrow) for i in range(2) for kind in "kv"}
    assert shapes == {
        "z": (["batch", 3, 16, 16], wide),
        "logsnr": (["batch"], wide),
        "emb": (["batch", 32], narrow),
        "v": (["batch", 3, 16, 16], wide),
        **keys,
    }
    # keys and values are read as they come, not turned or copied
    readers = {n.op_type for n in model.graph.node if set(n.input) & set(keys)}
    assert readers == {"Attention"}


@pytest.mark.parametrize(("offset", "bound"), [(0, 2e-6), (10, 5e-6), (100, 5e-5)])
def test_norms_of_onnx_runtimes_own_graph_do_not_cancel(offset, bound):
    # E[x^2] - E[x]^2, as ONNX Runtime computes GroupNormalization, loses 2.4e-4 at ten times the deviation
    x = np.random.default_rng(0).normal(offset, 1, (2, 12, 8, 5)).astype(np.float32)
    weight, bias = np.random.default_rng(1).normal(size=(2, 12)).astype(np.float32)
    rows = x.astype(np.float64).reshape(2, 3, -1)
    normed = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    expected = normed.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    graph = onnx.parser.parse_graph("g (float[b,12,8,5] x, float[12] w, float[12] c) => (float[b,12,8,5] y) { "
                                    "y = GroupNormalization<num_groups=3, epsilon=1e-5>(x, w, c) }")  # fmt: skip
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    model = onnx_ir.from_proto(proto)
    assert with_layer_norms(model) and not with_layer_norms(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    made = session.run(["y"], {"x": x, "w": weight, "c": bias})[0]
    assert np.abs(made - expected).max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [2, 3])
def test_upsampling_and_pixel_shuffle_as_reshapes_have_the_same_bits(dtype, factor):
    x = torch.randn(2, 4 * factor**2, 5, 7).to(dtype)
    shuffled, upsampled = F.pixel_shuffle(x, factor), F.interpolate(x, scale_factor=float(factor), mode="nearest")
    smooth = F.interpolate(x.float(), (9, 8), mode="bicubic", antialias=True)
    with program.Decomposed():
        assert torch.equal(F.pixel_shuffle(x, factor), shuffled)
        assert torch.equal(F.interpolate(x, scale_factor=float(factor), mode="nearest"), upsampled)
        assert torch.equal(F.interpolate(x.float(), (9, 8), mode="bicubic", antialias=True), smooth)


def test_a_graph_without_resize_gives_the_bits_of_one_with_it(bundles, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "interpolated", F.interpolate)
    monkeypatch.setattr(program, "shuffled", F.pixel_shuffle)
    pipeline = SemanticaPipeline.from_pretrained(small_run)
    folders = shutil.copytree(bundles["fp32"], tmp_path / "before"), bundles["fp32"]
    graphs = write.write_graphs(capture(pipeline.unet, pipeline.encoder, "fp32"), folders[0])
    manifest = json.loads((folders[0] / "manifest.json").read_text()) | graphs
    (folders[0] / "manifest.json").write_text(json.dumps(manifest))
    rewrite_hashes(folders[0])
    counts = [open_bundle(folder).manifest["graphs"]["denoise.onnx"]["nodes"] for folder in folders]
    assert {"Resize", "DepthToSpace"} <= set(counts[0]) and not {"Resize", "DepthToSpace"} & set(counts[1])
    images, z = np.tanh(noise(1, (3, 3, 16, 16))), noise(2, (3, 3, 16, 16))
    v = []
    # a bundle of before loads as it did
    for folder in folders:
        engine = load_engine(folder, "onnxruntime")
        v.append(engine(z, np.linspace(-4, 4, 3, dtype=np.float32), engine.condition(images)))
    np.testing.assert_array_equal(*v)


def test_no_path_of_this_machine_is_in_a_bundle(bundles):
    for path in bundles["fp32"].iterdir():
        assert str(Path(write.__file__).parents[1]).encode() not in path.read_bytes(), path.name


def test_half_precision_files_are_half_as_large(bundles):
    sizes = {name: (folder / "weights.safetensors").stat().st_size for name, folder in bundles.items()}
    assert 0.49 < sizes["fp16"] / sizes["fp32"] < 0.55 and 0.49 < sizes["bf16"] / sizes["fp32"] < 0.55


def test_the_manifest_says_what_was_compared_and_how(bundles):
    rows = {name: json.loads((folder / "manifest.json").read_text()) for name, folder in bundles.items()}
    graphs = {"onnxruntime", "native"}
    assert set(rows["fp32"]["parity"]) == graphs and set(rows["bf16"]["parity"]) == {"program", *graphs}
    arithmetic = {name: {k: r["arithmetic"] for k, r in row["parity"].items()} for name, row in rows.items()}
    assert arithmetic["fp32"] == dict.fromkeys(graphs, "fp32")
    assert arithmetic["fp16"]["onnxruntime"] == "fp32 between fp16 values"
    assert arithmetic["bf16"]["program"].startswith("bf16") and "fp32" in arithmetic["bf16"]["onnxruntime"]
    for row in rows.values():
        for figures in row["parity"].values():
            assert figures["finite"] and figures["levels"] in (2, 4) and figures["batches"] == [1, 2]
            assert figures["psnr_db"] >= row["bounds"]["psnr"]
    # rounding to fewer digits shows, and in the right order
    errors = [rows[name]["parity"]["onnxruntime"]["v_mean_error"] for name in ("fp32", "fp16", "bf16")]
    assert errors[0] < errors[1] / 20 and errors[1] < errors[2] / 4
    assert "headroom" not in rows["fp32"] and rows["fp16"]["headroom"]["type_max"] == 65504
    peaks = [entry["value"] for entry in rows["fp16"]["headroom"]["largest"]]
    assert rows["fp16"]["headroom"]["headroom"] == pytest.approx(65504 / peaks[0]) and peaks == sorted(peaks)[::-1]


def test_images_equal_the_torch_pipelines_from_the_same_noise(bundles, small_run, picture):
    image = Image.open(picture)
    latents = noise(5, (2, 3, 16, 16))
    settings = dict(num_images_per_prompt=2, num_inference_steps=6, guidance_scale=2.5, output_type="np")
    # an independent path: diffusers' guider, the scheduler, two calls a step
    expected = SemanticaPipeline.from_pretrained(small_run)(image, latents=torch.from_numpy(latents), **settings).images
    for precision, least in (("fp32", 100), ("fp16", 55)):
        pipeline = SemanticaPipeline.from_bundle(bundles[precision], "onnxruntime")
        actual = pipeline(image, latents=latents, **settings).images
        assert actual.shape == (2, 16, 16, 3) and psnr(2 * actual, 2 * expected) >= least, precision


@pytest.mark.parametrize(("precision", "least"), [("fp32", 1e-4), ("fp16", 5e-2)])
def test_batches_1_3_and_8_from_one_bundle(bundles, precision, least):
    engine, network = (load_engine(bundles[precision], backend) for backend in ("onnxruntime", "torch"))
    assert network.arithmetic == precision
    images = np.tanh(noise(1, (8, 3, 16, 16)))
    z, logsnr = noise(2, (8, 3, 16, 16)), np.linspace(-8, 8, 8, dtype=np.float32)
    truth = network(torch.from_numpy(z), torch.from_numpy(logsnr), network.condition(torch.from_numpy(images))).numpy()
    for batch in (1, 3, 8):
        v = engine(z[:batch], logsnr[:batch], engine.condition(images[:batch]))
        assert v.dtype == np.float32
        np.testing.assert_allclose(v, truth[:batch], rtol=0, atol=least)
        null, twin = engine.null(batch), network.null(batch)
        np.testing.assert_allclose(null.keys[1], twin.keys[1].float().numpy(), rtol=0, atol=least)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensors_bound_by_address_give_what_arrays_give(bundles, precision):
    plain = load_engine(bundles[precision], "onnxruntime")
    bound = BoundEngine(open_bundle(bundles[precision]), torch.device("cpu"))
    images, z = np.tanh(noise(1, (3, 3, 16, 16))), noise(2, (3, 3, 16, 16))
    logsnr, kept = np.linspace(-4, 4, 3, dtype=np.float32), []
    for batch in (3, 1, 3):
        own = bound.condition(torch.from_numpy(images[:batch]))
        v = bound(torch.from_numpy(z[:batch]), torch.from_numpy(logsnr[:batch]), own)
        expected = plain(z[:batch], logsnr[:batch], plain.condition(images[:batch]))
        assert torch.equal(v, torch.from_numpy(expected))
        kept.append((v, v.clone(), own.keys[0], own.keys[0].clone()))
        images, z = -images, -z
    # no result lies in the engine's own buffers
    for v, then, keys, keys_then in kept:
        assert torch.equal(v, then) and torch.equal(keys, keys_then)
    settings = Schedule(16), Sampling(4, guidance=2.0)
    made = sample(bound, torch.from_numpy(z), bound.condition(torch.from_numpy(images)), None, *settings)
    expected = sample(plain, z, plain.condition(images), None, *settings)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("precision", "least"), [("fp32", 100), ("bf16", 35)])
def test_the_compiled_engine_makes_the_same_images(bundles, picture, precision, least):
    image, settings = Image.open(picture), dict(num_inference_steps=6, guidance_scale=2.5, output_type="np", seed=3)
    eager, fast = (SemanticaPipeline.from_bundle(bundles[precision], name) for name in ("torch", "torch-compile"))
    # the same code, not compiled: what compiling changes is tested where sampling is
    with torch.compiler.set_stance("force_eager"):
        for options in ({}, {"guidance_scale": 1}, {"interval": (0.2, 0.7)}, {"solver": "ddpm"}):
            made, expected = (p(image, 3, **settings | options).images for p in (fast, eager))
            assert psnr(2 * made, 2 * expected) >= least, options
        # not the eager loop under another name
        assert (made != expected).any()


def test_bf16_runs_in_torch_and_not_in_onnxruntime(bundles, capsys, tmp_path, picture):
    image = str(picture)
    out = tmp_path / "out.png"
    assert main(["sample", "--model", str(bundles["bf16"]), "--image", image, "--steps", "2", "--out", str(out)]) == 0
    assert out.exists()
    arguments = ["sample", "--model", str(bundles["bf16"]), "--image", image, "--engine", "onnxruntime"]
    assert main([*arguments, "--out", str(tmp_path / "no.png")]) == 2
    assert "cannot compute on a CPU" in capsys.readouterr().err and not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    ("precision", "streams", "conditioning", "sizes", "least"),
    [
        ("fp16", ("image", "again"), "both", (16, 16), 50),
        ("fp32", ("image",), "global", (), 100),
        ("bf16", ("image",), "tokens", (16,), 35),
    ],
)
def test_every_kind_of_conditioning(make_run, tmp_path, streams, conditioning, precision, sizes, least):
    run = make_run(tmp_path / "run", streams, conditioning)
    write.export(ExportConfig(run, tmp_path / "out", precision, levels=2, steps=2))
    bundle = open_bundle(tmp_path / "out")
    assert bundle.sizes == sizes
    assert bundle.manifest["graphs"]["denoise.onnx"]["nodes"]["Attention"] == (4 if sizes else 2)
    # the gate compared it with the network; the null branch, filled up stream by stream, took part
    assert bundle.manifest["parity"]["onnxruntime"]["psnr_db"] > least


@pytest.mark.slow
def test_base_is_exported_in_12_gib(tmp_path):
    build("base").save_pretrained(tmp_path / "run", safe_serialization=True)
    # in a process of its own, whose peak is then the export's
    code = (
        "import resource, sys; from semantica.cli import main\n"
        "few = ['--precision', 'fp16', '--levels', '4', '--steps', '1']\n"
        "code = main(['export', '--model', 'run', '--out', 'out', *few])\n"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    code, kibibytes = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0 and kibibytes < 12 * 2**20, done.stderr
    bundle = open_bundle(tmp_path / "out")
    # half of the parameters' 1.6 GB in fp32, encoder included
    assert 0.49 < bundle.manifest["files"]["weights.safetensors"]["bytes"] / bytes_of(tmp_path / "run") < 0.51
    shutil.rmtree(tmp_path)


def bytes_of(run: Path) -> int:
    return sum(path.stat().st_size for path in run.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "precision"), [("dinov2", 140, "fp32"), ("clip", 64, "fp16"), ("siglip", 64, "fp32")]
)
def test_pretrained_encoders_are_in_the_bundle(make_run, save_tower, tmp_path, picture, kind, size, precision):
    """DINOv2 at another size than its own: its positions are interpolated once, not in the graph."""
    save_tower(tmp_path / "source", kind)
    encoder = PretrainedEncoder.from_source(str(tmp_path / "source"), image_size=size)
    run = make_run(tmp_path / "run", encoder=encoder)
    write.export(ExportConfig(run, tmp_path / "out", precision, levels=2, steps=2))
    # an encoder that the network hardly reads would prove little
    image, settings = Image.open(picture), dict(num_inference_steps=4, guidance_scale=3.0, output_type="np", seed=1)
    pipeline = SemanticaPipeline.from_bundle(tmp_path / "out", "onnxruntime")
    latents = noise(1, (1, 3, 16, 16))
    made, other = (pipeline(i, latents=latents, **settings).images for i in (image, image.rotate(90)))
    settings.pop("seed")
    expected = SemanticaPipeline.from_pretrained(run)(image, latents=torch.from_numpy(latents), **settings).images
    least = 90 if precision == "fp32" else 50
    assert psnr(2 * made, 2 * expected) >= least and psnr(2 * made, 2 * other) < least - 10


def test_sampling_a_bundle_imports_no_torch(bundles, tmp_path, picture):
    code = (
        "import sys; from semantica.cli import main\n"
        f"assert main(['sample', '--model', {str(bundles['fp32'])!r}, '--image', {str(picture)!r},"
        " '--steps', '2', '--out', 'made.png']) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "made.png").size[1] == 20


@pytest.fixture(scope="module")
def network(small_run):
    pipeline = SemanticaPipeline.from_pretrained(small_run)
    return pipeline, capture(pipeline.unet, pipeline.encoder, "fp32")


def rewrite_hashes(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = entries(folder, manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def scale(name: str, factor: float):
    """A change to written weights."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "weights.safetensors")
        weights[name] = weights[name] * factor
        save_file(weights, folder / "weights.safetensors")

    return change


def wrong_epsilon(name: str, operator: str):
    def change(folder: Path) -> None:
        model = onnx.load(folder / name, load_external_data=False)
        norm = [n for n in model.graph.node if n.op_type == operator and n.metadata_props][1]
        next(a for a in norm.attribute if a.name == "epsilon").f = 1e-2
        onnx.save(model, folder / name)

    return change


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (scale("unet.up_blocks.0.0.conv2.weight", 1.01), r"worst layer: unet\.up_blocks\.0\.0\.conv2 "),
        (scale("unet.transformer_blocks.1.cross.to_out.weight", 1.05), r"blocks\.1\.cross\.to_out "),
        (scale("encoder.blocks.0.mlp.0.weight", 1.01), r"worst layer: encoder\.blocks\.0\.mlp\.0 "),
        (wrong_epsilon("denoise.onnx", "GroupNormalization"), r"native.*layer: unet\.down_blocks\.0\.0\.norm2 "),
        (wrong_epsilon("denoise.ort.onnx", "LayerNormalization"), r"onnxruntime.*unet\.down_blocks\.0\.0\.norm2 "),
        (scale("unet.down_blocks.0.0.conv2.weight", float("nan")), r"not finite.*unet\.down_blocks\.0\.0\.conv2 "),
    ],
    ids=["weight", "attention", "encoder", "epsilon", "epsilon of the other form", "nan"],
)
def test_a_planted_fault_is_refused_and_its_layer_named(bundles, network, tmp_path, fault, says):
    pipeline, captured = network
    copy = shutil.copytree(bundles["fp32"], tmp_path / "copy")
    fault(copy)
    rewrite_hashes(copy)
    gate = Gate(pipeline.unet, pipeline.encoder, pipeline.scheduler.schedule, captured.sizes, copy, 4, 3)
    with pytest.raises(ArtifactError, match=says):
        gate.files(captured.without_programs())


def test_a_refused_export_leaves_nothing_and_exits_with_1(small_run, tmp_path, capsys, monkeypatch):
    honest = write.write_graphs

    def faulty(captured, folder: Path, *more) -> dict:
        made = honest(captured, folder, *more)
        scale("unet.conv_out.weight", 1.01)(folder)
        return made

    monkeypatch.setattr(write, "write_graphs", faulty)
    assert main(["export", "--model", str(small_run), "--out", str(tmp_path / "out"), *FEW]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("semantica: onnxruntime (fp32) differs") and "unet.conv_out " in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("peak", "says"), [(3e6, r"not finite.*worst layer: unet\.down_blocks\.0\.0\.conv1"), (1.5e4, "away from overflow")]
)
def test_fp16_overflow_is_found_by_the_program_in_that_type(small_run, tmp_path, peak, says):
    pipeline = SemanticaPipeline.from_pretrained(small_run)
    conv = pipeline.unet.down_blocks[0][0].conv1
    with torch.no_grad():
        # the norm after this convolution takes the scale out again: in fp32 nothing is wrong
        conv.weight.mul_(peak)
        conv.bias.mul_(peak)
    captured = capture(pipeline.unet, pipeline.encoder, "fp16")
    gate = Gate(pipeline.unet, pipeline.encoder, pipeline.scheduler.schedule, captured.sizes, tmp_path, 2, 2)
    with pytest.raises(ArtifactError, match=says):
        gate.program(captured)


def test_bad_run_folders_and_places(small_run, tmp_path, capsys):
    taken, half = tmp_path / "taken", shutil.copytree(small_run, tmp_path / "half")
    taken.mkdir()
    next((half / "unet").glob("*.safetensors")).unlink()
    for model, out, says in (
        (tmp_path / "nothing", tmp_path / "out", "not a folder"),
        (taken, tmp_path / "out", "no model_index.json"),
        (half, tmp_path / "out", "no safetensors weights"),
        (small_run, taken, "exists"),
    ):
        assert main(["export", "--model", str(model), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said
    assert main(["export", "--model", str(small_run), "--out", str(tmp_path / "out"), "--levels", "0"]) == 2
    assert "--levels is 0" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "taken"]


def test_a_missing_package_is_named_with_its_extra(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(write, "PACKAGES", ("onnx", "no_such_exporter"))
    assert main(["export", "--model", str(small_run), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "needs no_such_exporter" in said and 'pip install "semantica-diffusion[export]"' in said
