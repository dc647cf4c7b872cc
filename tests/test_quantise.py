"""int8 bundles: what they are calibrated on, which layers are taken, what is refused; ModelOpt itself in slow tests."""

import importlib.util
import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from semantica import solvers
from semantica.cli import main
from semantica.engines import load_engine, open_bundle
from semantica.errors import UserError
from semantica.export import calibration, parity, qdq, quantise, sensitivity
from semantica.files import entries

# quantises as ModelOpt does: what has a type after inference, by the largest value, but for nodes named like small ones
STANDIN = """
import numpy as np, onnx, onnxruntime
from onnx import helper, numpy_helper

FACTOR = 1.0

def quantize(path, quantize_mode, calibration_data_reader, calibration_method, calibration_eps, op_types_to_quantize,
             high_precision_dtype, output_path, log_level):
    assert (quantize_mode, calibration_eps, high_precision_dtype) == ("int8", ["cpu"], "fp32")
    model = onnx.load(path)
    graph = model.graph
    del graph.value_info[:]
    known = {value.name for value in onnx.shape_inference.infer_shapes(model).graph.value_info} | {"z"}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    small = [node.name for node in graph.node if node.op_type == "Gemm"]
    chosen = [node for node in graph.node if node.op_type in op_types_to_quantize and node.input[1] in weights
              and node.input[0] in known and not any(node.name.startswith(name) for name in small)]
    names = sorted({node.input[0] for node in chosen} - {"z"})
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    del graph.output[1:]
    largest = {}
    assert calibration_data_reader.get_first() is not None
    while (feeds := calibration_data_reader.get_next()) is not None:
        made = dict(zip(names, session.run(names, feeds)), z=feeds["z"])
        for name, array in made.items():
            largest[name] = max(largest.get(name, 0), float(np.abs(array).max()))
    # a bound at less than the largest value: what the other calibration may give
    share = {"max": 1.0, "entropy": 0.5}[calibration_method] * FACTOR
    for node in chosen:
        for i, name in enumerate(node.input[:2]):
            top = np.abs(numpy_helper.to_array(weights[name])).max() if i else share * largest[name]
            scale = f"{node.name}.{i}.scale"
            graph.initializer.append(numpy_helper.from_array(np.float32(top / 127), scale))
            graph.node.insert(0, helper.make_node("QuantizeLinear", [name, scale], [scale + ".q"]))
            graph.node.insert(0, helper.make_node("DequantizeLinear", [scale + ".q", scale], [scale + ".d"]))
            node.input[i] = scale + ".d"
    onnx.save(model, output_path)
"""


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """Stands for ModelOpt 0.47.0 and what it needs, here and in the process that runs it; returns where it lies."""
    site = tmp_path / "site"
    package = site / "modelopt" / "onnx" / "quantization"
    package.mkdir(parents=True)
    for folder in (site / "modelopt", package.parent):
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text(STANDIN)
    for name in ("onnx_graphsurgeon", "onnxslim", "polygraphy", "lief"):
        (site / f"{name}.py").touch()
    record = site / "nvidia_modelopt-0.47.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-modelopt\nVersion: 0.47.0\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    return package / "__init__.py"


@pytest.fixture(scope="module")
def drawn(bundles):
    """A bundle, and what it is calibrated on."""
    bundle = open_bundle(bundles["fp32"])
    return bundle, calibration.draw(bundle, load_engine(bundle, "onnxruntime"), None, 40, 3)


def test_calibration_is_real_inputs_of_both_branches_evenly_over_the_levels(drawn, photos):
    bundle, data = drawn
    levels, counts = np.unique(data.logsnr, return_counts=True)
    schedule = solvers.Schedule.of(bundle.manifest["model"]["scheduler"])
    np.testing.assert_array_equal(levels, np.sort(schedule.grid(20)[1][:-1].astype(np.float32)))
    assert set(counts) == {2}
    # at each level one sample of the conditional branch, one of the other, whose row is the last
    null = len(data.fixed["emb"]) - 1
    assert all(sorted(data.rows[data.logsnr == level] == null) == [False, True] for level in levels)
    # a run starts from the noise of its seed
    noise = solvers.noise(3, (null, *data.z.shape[1:]))
    for z in data.z[data.logsnr == levels[0]]:
        assert (noise == z).all((1, 2, 3)).any()
    engine = load_engine(bundle, "onnxruntime")
    assert {name: array.dtype for name, array in data.feeds(slice(0, 4)).items()}.keys() == {
        entry.name for entry in onnx.load(bundle.folder / "denoise.onnx", load_external_data=False).graph.input
    }
    assert engine.denoiser(data.feeds(slice(0, 4)))["v"].shape == (4, *data.z.shape[1:])
    again = calibration.draw(bundle, engine, None, 40, 3)
    other = calibration.draw(bundle, engine, photos, 40, 3)
    assert again.sha256() == data.sha256() != other.sha256()
    assert list(data.logsnr[data.spread(3)]) == [levels[0], np.sort(data.logsnr)[20], levels[-1]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_are_within_half_a_step_in_each_channel(dtype):
    drawn = np.random.default_rng(0).standard_normal((5, 4, 3, 3))
    weight = (drawn * np.logspace(-2, 2, 5)[:, None, None, None]).astype(dtype)
    weight[3] = 0
    for axis, array in ((0, weight), (1, weight[:, :, 0, 0].T)):
        values, scale = qdq.rounded(array, axis)
        shape = [-1 if i == axis else 1 for i in range(array.ndim)]
        wide = scale.astype(np.float64).reshape(shape)
        slack = 0 if dtype == np.float32 else 127 * np.finfo(dtype).eps
        assert (np.abs(values * wide - array) <= wide * (0.5 + slack) + 1e-12).all()
        others = tuple(i for i in range(array.ndim) if i != axis)
        assert values.dtype == np.int8 and values.min() >= -127
        assert list(np.abs(values.astype(int)).max(others)) == [127, 127, 127, 0, 127]


def test_small_fp16_channels_keep_eight_bits():
    """Their scales are subnormal numbers, as of what training began at zero: the least normal one is too large."""
    drawn, quantum = np.random.default_rng(1).uniform(-1, 1, (6, 64)), float(np.finfo(np.float16).smallest_subnormal)
    weight = (drawn * np.logspace(-2, -7, 6)[:, None]).astype(np.float16)
    weight[5] = 0
    values, scale = qdq.rounded(weight, 0)
    wide, largest = scale.astype(np.float64), np.abs(weight).max(1).astype(np.float64)
    assert (np.abs(values * wide[:, None] - weight) <= 0.5 * wide[:, None] + 1e-12).all()
    assert (wide <= largest / 127 + quantum).all() and (wide > 0).all()
    # an input that is nearly zero is divided by its scale
    node = ir.node("MatMul", [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1, 64]))] * 2)
    graph = ir.Graph([node.inputs[0]], node.outputs, nodes=[node])
    qdq.quantised(graph, node, node.inputs[0], 1e-9)
    assert graph.initializers["x.scale"].const_value.numpy() > 0


def run(path, feeds):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["v"], feeds)[0]


def test_folding_changes_nothing_and_one_layer_in_int8_is_what_numpy_says(drawn, tmp_path):
    bundle, data = drawn
    feeds = data.feeds(slice(0, 4))
    expected = run(bundle.folder / "denoise.onnx", feeds)
    model = qdq.folded(bundle.folder / "denoise.onnx")
    qdq.save({"folded.onnx": model}, tmp_path / "weights.safetensors")
    np.testing.assert_allclose(run(tmp_path / "folded.onnx", feeds), expected, atol=1e-5)
    assert not any(n.op_type == "Transpose" and n.inputs[0].name in model.graph.initializers for n in model.graph)
    # the first layer has a weight of patches: its products are places times the whole weight
    first, size = qdq.layers(model)[0], bundle.shapes["latent"]
    weight = next(node for node in model.graph if node.name == first.node).inputs[1].const_value.numpy()
    assert first.operator == "Conv" and first.products == weight.size * (size // weight.shape[-1]) ** 2
    scale = 4 / 127
    qdq.insert(model, {first.node: scale})
    made = next(node for node in model.graph if node.name == first.node)
    values, steps = qdq.rounded(weight, 0)
    for value, array in (("int8", values), ("scale", steps)):
        name = next(n for n in model.graph.initializers if n.startswith("unet.") and n.endswith(f".{value}"))
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)
    model.graph.outputs.append(made.outputs[0])
    qdq.save({"one.onnx": model}, tmp_path / "one.safetensors")
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    got = session.run([made.outputs[0].name], feeds)[0]
    z = np.clip(np.rint(feeds["z"].astype(np.float64) / np.float32(scale)), -128, 127) * np.float32(scale)
    side, kernel = size // weight.shape[-1], weight.shape[-1]
    patches = z.reshape(4, -1, side, kernel, side, kernel)
    wide = values.astype(np.float64) * steps[:, None, None, None]
    bias = made.inputs[2].const_value.numpy()[None, :, None, None]
    np.testing.assert_allclose(got, np.einsum("bchiwj,ocij->bohw", patches, wide) + bias, atol=2e-5)


def test_layers_are_taken_by_error_for_each_product_until_the_target_is_spent():
    def cost(name, products, error):
        return sensitivity.Cost(qdq.Layer(name, "Conv", name, name, products), 1.0, "max", error)

    found = [cost("dear", 10, 5e-4), cost("cheap", 100, 4e-5), cost("large", 1000, 5e-5), cost("last", 1, 9e-6)]
    # 40 dB are 1e-4: large (5e-8 a product) and cheap (4e-7) leave 1e-5
    assert [c.layer.node for c in sensitivity.chosen(found, 40)] == ["large", "cheap", "last"]
    assert [c.layer.node for c in sensitivity.chosen(found, 43.01)] == ["large"]
    assert sensitivity.chosen(found, 60) == []
    assert sensitivity.decibels(1e-4) == 40


def test_an_int8_bundle_is_a_bundle_of_its_own(bundles, standin, photos, picture, tmp_path, capsys, monkeypatch):
    out = tmp_path / "int8"
    monkeypatch.setattr(sensitivity, "JUDGED", 4)
    options = ["--images", str(photos), "--samples", "20", "--target", "35"]
    assert main(["quantise", str(bundles["fp32"]), "--out", str(out), *options]) == 0
    said = capsys.readouterr().out
    bundle, source = open_bundle(out), open_bundle(bundles["fp32"])
    record = bundle.manifest["quantisation"]
    assert bundle.quantised == "int8" and bundle.precision == "fp32" and "int8 bundle in" in said
    assert bundle.computed("fp32") == f"int8 in {record['what']}, else fp32"
    assert record["calibration"]["samples"] == 20 and len(record["calibration"]["logsnr"]) == 20
    # every convolution and product by a weight has been measured: none is left out by name or for want of a type
    graph = onnx.load(source.folder / "denoise.onnx", load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    turned = {n.output[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights}
    assert len(record["layers"]) == sum(
        node.op_type in ("Conv", "MatMul") and node.input[1] in weights | turned for node in graph.node
    )
    assert all(row["alone_db"] is not None for row in record["layers"])
    taken = sum(row["quantised"] for row in record["layers"])
    assert record["what"].startswith(f"{taken} of {len(record['layers'])} layers") and taken > 0
    # errors of layers add up, and together they are what was asked for
    assert record["v_db"]["summed"] >= 35 and abs(record["v_db"]["together"] - record["v_db"]["summed"]) < 2
    assert bundle.manifest["graphs"]["denoise.onnx"]["nodes"]["QuantizeLinear"] <= taken
    row, bounds = bundle.manifest["parity"]["onnxruntime"], parity.bounds_of(bundle)
    assert bundle.manifest["parity"].keys() == {"onnxruntime", "native"} and vars(bounds) == bundle.manifest["bounds"]
    assert all(parity.failures(each, bounds) == [] for each in bundle.manifest["parity"].values())
    # ONNX Runtime, which has no GroupNormalization, runs a form of its own, of the same weights in int8
    native, own = (ir.load(path) for path in (out / "denoise.onnx", bundle.for_onnx_runtime("denoise.onnx")))
    counts = [[node.op_type for node in model.graph] for model in (native, own)]
    assert counts[0].count("QuantizeLinear") == counts[1].count("QuantizeLinear") > 0
    assert counts[0].count("GroupNormalization") > 0 == counts[1].count("GroupNormalization")
    # the half that makes conditions is the same
    assert row["condition_error"] == source.manifest["parity"]["onnxruntime"]["condition_error"]
    # weights that are quantised are stored in one byte
    assert (out / "weights.safetensors").stat().st_size < (source.folder / "weights.safetensors").stat().st_size
    sampled = ["sample", "--model", str(out), "--image", str(picture), "-n", "1"]
    assert main([*sampled, "--out", str(tmp_path / "a.png")]) == 0
    capsys.readouterr()
    for arguments, says in (
        (["quantise", str(out), "--out", str(tmp_path / "b")], "is int8 already"),
        ([*sampled, "--engine", "torch"], "--engine onnxruntime"),
        (["build", str(out), "--backend", "inductor"], "the bundle that it was made from"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"quantisation": {"mode": "int2"}}))
    with pytest.raises(UserError, match="unknown quantisation"):
        open_bundle(out)


def test_what_is_too_far_from_the_network_is_not_kept(bundles, standin, tmp_path, capsys, monkeypatch):
    # scales that cut everything off, in layers that were thought harmless
    standin.write_text(STANDIN.replace("FACTOR = 1.0", "FACTOR = 0.02"))
    monkeypatch.setattr(sensitivity.Judge, "error", lambda judge, scales: 1e-9)
    options = ["--samples", "4"]
    assert main(["quantise", str(bundles["fp32"]), "--out", str(tmp_path / "out"), *options]) == 1
    said = capsys.readouterr()
    assert "in int8 the network differs from fp32: " in said.err and said.err.count("\n") == 1
    assert [line[:41] for line in said.out.splitlines()] == ["no --images: calibrated on drawn fields; "]
    standin.write_text("raise ImportError('libcupy')")
    assert main(["quantise", str(bundles["fp32"]), "--out", str(tmp_path / "out")]) == 1
    assert "ModelOpt failed on denoise.onnx: ImportError: libcupy; nothing is kept" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"site"}


def test_refusals_are_one_line_and_leave_nothing(bundles, standin, tmp_path, capsys, monkeypatch):
    fp32, empty = str(bundles["fp32"]), tmp_path / "empty"
    empty.mkdir()
    bare = shutil.copytree(bundles["fp32"], tmp_path / "bare")
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["files"]["reference.safetensors"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    latents = shutil.copytree(bundles["fp32"], tmp_path / "latents")
    shutil.copyfile(latents / "denoise.onnx", latents / "decode.onnx")
    manifest = json.loads((latents / "manifest.json").read_text())
    manifest |= {"decode": 128, "files": entries(latents, [*manifest["files"], "decode.onnx"])}
    manifest["model"]["vae"] = {}
    (latents / "manifest.json").write_text(json.dumps(manifest))
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, says in (
        ([str(latents)], "is of a diffusers pipeline: only those of run folders are quantised so far"),
        ([str(bundles["bf16"])], "is bf16, in which no CPU calibrates it: export fp32 or fp16"),
        ([str(bare)], "has no reference.safetensors"),
        ([str(tmp_path / "nowhere")], "is not a folder"),
        ([fp32, "--samples", "0"], "--samples is 0"),
        ([fp32, "--seed", "-1"], "--seed is -1"),
        ([fp32, "--target", "0"], "--target is 0"),
        ([fp32, "--mode", "fp8"], "--mode"),
        ([fp32, "--images", str(empty)], "holds no pictures"),
        ([fp32, "--images", str(tmp_path / "nowhere")], "is not a folder"),
    ):
        assert main(["quantise", *arguments, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said
    assert main(["quantise", fp32, "--out", str(empty)]) == 2
    assert "exists: choose another folder" in capsys.readouterr().err
    monkeypatch.setattr(quantise.metadata, "version", lambda name: "0.99.0")
    assert main(["quantise", fp32, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert 'nvidia-modelopt 0.99.0 is not known to work, 0.47.0 is: pip install "semantica-diffusion[quantise]"' in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lief" else name)
    assert main(["quantise", fp32, "--out", str(tmp_path / "out")]) == 2
    assert 'needs lief, not installed here: pip install "semantica-diffusion[quantise]"' in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_modelopt_measures_every_layer_and_tensorrt_takes_the_result(bundles, photos, tmp_path, precision):
    pytest.importorskip("modelopt", reason="NVIDIA ModelOpt is not installed")
    out = tmp_path / "int8"
    options = ["--images", str(photos), "--samples", "20"]
    assert main(["quantise", str(bundles[precision]), "--out", str(out), *options]) == 0
    bundle = open_bundle(out)
    record = bundle.manifest["quantisation"]
    # blocks come before what is left out by ModelOpt itself: convolutions to fewer than 8 channels, products below 16
    missing = [row["module"] for row in record["layers"] if row["alone_db"] is None]
    assert missing == []
    assert sum(row["quantised"] for row in record["layers"]) > len(record["layers"]) / 2
    assert record["v_db"]["together"] > 38
    assert parity.failures(bundle.manifest["parity"]["onnxruntime"], parity.bounds_of(bundle)) == []
    if precision == "fp16" and importlib.util.find_spec("tensorrt_rtx"):
        assert main(["build", str(out), "--backend", "tensorrt-rtx", "--arch", "sm_89"]) == 0
        made = json.loads((out / "engines" / "tensorrt-rtx-sm_89" / "manifest.json").read_text())
        model = ir.load(out / "denoise.onnx")
        inserted = sum(node.op_type == "QuantizeLinear" for node in model.graph)
        assert made["layers"]["denoise.onnx"]["QUANTIZE"] == {"INT8": inserted}
