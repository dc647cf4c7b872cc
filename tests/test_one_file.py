"""One ONNX file: the host's coefficients, the pipeline's images, one branch where there is no guidance, refusals."""

import dataclasses
import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image

from semantica import solvers
from semantica.cli import main
from semantica.discrete import DiscreteSchedule
from semantica.engines import load_engine, open_bundle
from semantica.errors import ArtifactError, UserError
from semantica.export import one_file
from semantica.export.one_file import compare, compose, denoise
from semantica.export.one_file.plan import COLUMNS, grid, plan, timesteps
from semantica.export.one_file.traced import DOUBLE, FLOAT, INTEGER, Trace
from semantica.pipelines.bundle import BundlePipeline
from semantica.sampling.settings import Sampling

STORED = Path(__file__).parent / "stored" / "bundle"
ANY = ("any", "some")


def session(trace: Trace, outputs: dict[str, tuple]) -> onnxruntime.InferenceSession:
    """Of a traced graph; outputs: array and type by name, one dimension each but for `table`."""
    for name, (array, dtype) in outputs.items():
        trace.output(array, name, dtype, ANY if name == "table" else ANY[: len(array.shape or ANY[:1])])
    trace.graph.opset_imports[""] = 23
    return opened(ir.to_proto(ir.Model(trace.graph, ir_version=10)).SerializeToString())


def opened(model, **settings) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # what a run refuses is logged besides
    options.log_severity_level = 4
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_coefficients_are_the_hosts(solver):
    for size, reference in ((32, 64), (64, 64), (512, 64)):
        schedule, trace = solvers.Schedule(size, reference), Trace("t")
        levels, table = plan(schedule, solver, trace.input("steps", INTEGER, ()))
        run = session(trace, {"levels": (levels, FLOAT), "table": (table, FLOAT)})
        for steps in (1, 2, 3, 4, 20, 50, 999):
            levels, table = run.run(None, {"steps": np.array(steps)})
            host = solvers.make_plan(solver, schedule.grid(steps)[1])
            expected = np.stack([getattr(host, name) for name in COLUMNS], 1).astype(np.float32)
            # in float32 nothing is left of the last bits of float64
            np.testing.assert_array_max_ulp(table, expected, 1)
            np.testing.assert_allclose(levels, host.logsnr.astype(np.float32), rtol=1.2e-7, atol=1e-15)


@pytest.mark.parametrize("solver", one_file.SOLVERS)
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
def test_timesteps_and_their_levels_are_the_hosts_to_the_bit(solver, spacing):
    for zero, clean in itertools.product((False, True), repeat=2):
        schedule = DiscreteSchedule(
            8, "v_prediction", "scaled_linear", 0.00085, 0.012, 1000, zero, spacing, int(clean), clean, solver
        )
        trace = Trace("t")
        steps = trace.input("steps", INTEGER, ())
        made = {"visited": (timesteps(schedule, steps), INTEGER), "levels": (grid(schedule, steps), DOUBLE)}
        run = session(trace, made)
        for count in (*range(1, 40), *range(40, 499, 17), 499):
            visited, levels = run.run(None, {"steps": np.array(count)})
            expected = schedule.grid(count)
            np.testing.assert_array_equal(visited, expected[0][:-1])
            np.testing.assert_array_equal(levels, expected[1])


@pytest.mark.parametrize("kind", solvers.THRESHOLDS)
def test_thresholds_in_the_graph_are_the_hosts(kind):
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 5)).astype(np.float32) * [[[[0.3]]], [[[1]]], [[[2]]]]
    x, trace = x.astype(np.float32), Trace("t")
    settings = Sampling(thresholding=kind, ratio=0.93)
    run = session(trace, {"y": (settings.threshold(trace.input("x", FLOAT, ("batch", 2, 5, 5))), FLOAT)})
    (made,) = run.run(None, {"x": x})
    np.testing.assert_allclose(made, settings.threshold(x), rtol=0, atol=2e-7)


def test_arithmetic_of_traced_arrays_is_numpys():
    def formulas(x):
        y = np.zeros_like(x)
        y[1:-1] = x[1:-1] / (2 * x[:-2])
        return 3 - x**2 + (1 + x) ** -0.5, np.expm1(-x / 7) * y, 2.0**x - abs(-x), 1 / np.sqrt(x) + np.log(x)

    trace = Trace("t")
    made = formulas(trace.input("x", DOUBLE, ("any",)))
    run = session(trace, {str(i): (array, DOUBLE) for i, array in enumerate(made)})
    for count in (1, 2, 3, 9):
        x = np.linspace(1e-9, 4, count)
        for actual, expected in zip(run.run(None, {"x": x}), formulas(x), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-13)
    with pytest.raises(TypeError):
        np.add.reduce(made[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The stored bundle's files by solver, written past the gate."""
    place, bundle = tmp_path_factory.mktemp("files"), open_bundle(STORED)
    for solver in one_file.SOLVERS:
        one_file.save(compose.compose(bundle, solver, 1.5), place / f"{solver}.onnx")
    return {solver: place / f"{solver}.onnx" for solver in one_file.SOLVERS}


def given(batch: int, seed: int = 0, side: int = 32) -> dict[str, np.ndarray]:
    """Pictures of noise, and noise to start from."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    return {"image": pictures, "noise": rng.standard_normal((batch, 3, 32, 32)).astype(np.float32)}


def numbers(steps: int, guidance: float) -> dict[str, np.ndarray]:
    return {"steps": np.array(steps), "guidance": np.array(guidance, np.float32)}


def psnr(made: np.ndarray, expected: np.ndarray) -> float:
    error = np.square(made.astype(np.float64) - expected).mean((1, 2, 3)).max()
    return 10 * np.log10(255**2 / max(error, 1e-20))


@pytest.mark.parametrize("solver", one_file.SOLVERS)
def test_images_are_the_pipelines_for_any_batch_steps_and_guidance(files, solver):
    pipeline, file = BundlePipeline(load_engine(STORED, "onnxruntime")), opened(files[solver])
    types = {"image": "tensor(uint8)", "noise": "tensor(float)", "steps": "tensor(int64)", "guidance": "tensor(float)"}
    assert {one.name: one.type for one in file.get_inputs()} == types
    for steps, guidance, batch in ((1, 0.0, 1), (1, 3.0, 4), (4, 1.0, 3), (4, 1.5, 1), (20, -1.0, 2), (50, 7.5, 2)):
        inputs = given(batch, steps)
        (made,) = file.run(None, inputs | numbers(steps, guidance))
        pictures = [Image.fromarray(picture) for picture in inputs["image"]]
        expected = pipeline(pictures, 1, steps, guidance, latents=inputs["noise"], solver=solver).images
        assert made.dtype == np.uint8 and psnr(made, np.stack([np.asarray(one) for one in expected])) >= 60
    (first,), (second,) = (file.run(None, given(1) | numbers(20, scale)) for scale in (1.0, 3.0))
    assert np.abs(first.astype(int) - second).max() > 10


@pytest.mark.parametrize("thresholding", ["none", "dynamic"])
def test_thresholding_is_the_models_own(thresholding, tmp_path):
    bundle = open_bundle(STORED)
    model = bundle.manifest["model"]
    scheduler = model["scheduler"] | {
        "thresholding": thresholding,
        "clip_range": 0.6,
        "dynamic_thresholding_ratio": 0.8,
    }
    changed = dataclasses.replace(bundle, manifest=bundle.manifest | {"model": model | {"scheduler": scheduler}})
    one_file.save(compose.compose(changed, "dpmpp_2m", 1.5), tmp_path / "a.onnx")
    inputs = given(2)
    (made,) = opened(tmp_path / "a.onnx").run(None, inputs | numbers(5, 2.0))
    pictures = [Image.fromarray(picture) for picture in inputs["image"]]
    images = BundlePipeline(load_engine(changed, "onnxruntime"))(pictures, 1, 5, 2.0, latents=inputs["noise"]).images
    assert psnr(made, np.stack([np.asarray(one) for one in images])) >= 60


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (2.0, 6)])
def test_the_denoiser_runs_once_a_step_on_one_branch_or_both(files, guidance, rows, tmp_path):
    run = opened(files["ddim"], enable_profiling=True, profile_file_prefix=str(tmp_path / "profile"))
    run.run(None, given(3) | numbers(4, guidance))
    events = json.loads(Path(run.end_profiling()).read_text())
    shapes = [
        event["args"]["input_type_shape"][0]
        for event in events
        if event.get("cat") == "Node" and event["args"].get("op_name") == "Attention" and "denoise" in event["name"]
    ]
    # self- and cross-attention of one block, four times
    assert len(shapes) == 2 * 4 and {next(iter(shape.values()))[0] for shape in shapes} == {rows}


def test_what_depends_on_the_level_alone_is_computed_before_the_loop(files):
    graph = onnx.load(files["ddim"]).graph
    (loop,) = (node for node in graph.node if node.op_type == "Loop")
    body = onnx.helper.get_node_attr_value(loop, "body")
    weights = {tensor.name.partition("/")[2] for tensor in body.initializer}
    assert any(name.endswith("conv1.weight") for name in weights)
    early = {tensor.name.partition("/")[2] for tensor in graph.initializer}
    for name in ("unet.embed_noise.net.0.weight", "unet.down_blocks.0.0.film.weight"):
        assert name in early and name not in weights
    assert not [node for node in body.node if node.op_type == "Gemm"]


def test_trigonometry_is_what_old_runtimes_have_in_float64(files):
    """No cosine: the newest alone have that."""
    for path in files.values():
        # those of the schedule; the network's own are in float32
        kinds = {node.op_type for node in onnx.load(path).graph.node if node.name.startswith("run/")}
        assert "Sin" in kinds and not {"Cos", "Tan"} & kinds


def test_nodes_of_unknown_rows_stay_in_the_step():
    def dependence(shape) -> list[int]:
        z, level = (ir.Value(name=name, shape=ir.Shape(["batch", 4])) for name in ("z", "logsnr"))
        known, unknown = ir.node("Tanh", [level]), ir.node("Neg", [level])
        known.outputs[0].shape, unknown.outputs[0].shape = ir.Shape(["batch", 4]), shape
        nodes = [known, unknown, ir.node("Sum", [z, known.outputs[0], unknown.outputs[0]])]
        found = denoise.dependence(nodes, {"z": z, "logsnr": level})
        return [found[node.outputs[0]] for node in nodes]

    assert dependence(ir.Shape(["batch", 4])) == [denoise.LEVEL, denoise.LEVEL, denoise.SAMPLE]
    for shape in (None, ir.Shape([4, "batch"]), ir.Shape(["batch", "batch"]), ir.Shape([1, 4])):
        assert dependence(shape) == [denoise.LEVEL, denoise.SAMPLE, denoise.SAMPLE]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": np.array(0)}, "steps_must_be_1_or_more"),
        ({"steps": np.array(-3)}, "steps_must_be_1_or_more"),
        ({"guidance": np.array(np.nan, np.float32)}, "guidance_must_be_finite"),
        ({"guidance": np.array(-np.inf, np.float32)}, "guidance_must_be_finite"),
        ({"noise": np.zeros((1, 3, 32, 32), np.float32)}, "there_must_be_one_noise_for_each_sample"),
        ({"image": np.zeros((2, 16, 16, 3), np.uint8)}, "Got invalid dimensions for input: image"),
    ],
)
def test_a_run_of_the_file_refuses_what_is_impossible(files, change, says):
    with pytest.raises(Exception, match=says):
        opened(files["ddim"]).run(None, given(2) | numbers(2, 1.5) | change)


def test_a_file_for_others_refuses_more_steps_than_it_is_told(tmp_path):
    bundle = open_bundle(STORED)
    made = compose.compose(bundle, "ddim", 1.5, 30)
    assert made.metadata_props["most_steps"] == "30"
    one_file.save(made, tmp_path / "a.onnx")
    run = opened(tmp_path / "a.onnx")
    assert run.run(None, given(1) | numbers(30, 1.0))[0].shape == (1, 32, 32, 3)
    # of so many there would be terabytes
    for steps in (31, 2**31, 2**62):
        with pytest.raises(Exception, match="steps_must_be_1_to_30"):
            run.run(None, given(1) | numbers(steps, 2.0))


def written(*options: object) -> int:
    return main(["export", "--model", str(STORED), *map(str, options)])


def test_the_command_writes_one_file_that_says_what_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "STEPS", (1, 3))
    out = tmp_path / "new" / "sampler.onnx"
    assert written("--one-file", out, "--solver", "dpmpp_2m") == 0
    assert "dpmpp_2m, 7 runs of 1 to 3 steps: images " in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["sampler.onnx"]
    onnx.checker.check_model(out, full_check=True)
    said = opened(out).get_modelmeta().custom_metadata_map
    assert {"solver": "dpmpp_2m", "precision": "fp32", "image_size": "32", "guidance": "1.5"}.items() <= said.items()
    assert json.loads(said["compared"])["psnr_db_at_least"] == 60 and json.loads(said["sample_shape"]) == [3, 32, 32]
    assert written("--one-file", out) == 2 and "exists: choose another name" in capsys.readouterr().err
    # with its weights beside it, as if they were too large
    monkeypatch.setattr(one_file, "INSIDE", 0)
    assert written("--one-file", tmp_path / "large.onnx") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"new", "large.onnx", "large.onnx.data"}
    made = [opened(path).run(None, given(1) | numbers(3, 1.5))[0] for path in (tmp_path / "large.onnx", out)]
    assert psnr(*made) > 20
    (tmp_path / "large.onnx").unlink()
    with pytest.raises(UserError, match=r"large\.onnx\.data exists"):
        one_file.write(open_bundle(STORED), tmp_path / "large.onnx")


def test_a_file_that_differs_from_the_pipeline_is_not_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "STEPS", (1, 3))
    monkeypatch.setattr(compose, "guide", lambda own, other, scale: other + scale * 1.02 * (own - other))
    assert written("--one-file", tmp_path / "a.onnx") == 1
    said = capsys.readouterr().err
    assert "differs from the pipeline: images" in said and "nothing was written" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(compose, "x_from_v", lambda z, v, alpha, sigma: z.trace.add("Nothing", z))
    with pytest.raises(ArtifactError, match="one file does not run in ONNX Runtime"):
        one_file.write(open_bundle(STORED), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    broken = shutil.copytree(STORED, tmp_path / "broken")
    with (broken / "weights.safetensors").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\xff")
    out = str(tmp_path / "a.onnx")
    for options, says in (
        (["--model", str(broken), "--one-file", out], "is not the file that was written"),
        (["--model", str(STORED)], "nothing to write: give some of --out, --one-file"),
        (["--model", str(STORED), "--one-file", out, "--solver", "ddpm"], "'ddpm'"),
        (["--model", str(STORED), "--one-file", out, "--precision", "fp16"], "is a bundle already"),
        (["--model", str(STORED), "--one-file", str(STORED / "manifest.json" / "a.onnx")], "cannot write"),
        (
            ["--model", str(STORED), "--web", str(tmp_path / "web"), "--solver", "dpmpp_2m"],
            "nothing without --one-file",
        ),
        (["--model", str(STORED.parent / "run"), "--one-file", out, "--steps", "0"], "--steps is 0"),
    ):
        assert main(["export", *options]) == 2, options
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said
    with pytest.raises(UserError, match="solver 'euler'"):
        one_file.write(open_bundle(STORED), tmp_path / "a.onnx", "euler")
    strange = open_bundle(STORED)
    strange = dataclasses.replace(strange, manifest=strange.manifest | {"inputs": {"image": [7]}})
    with pytest.raises(UserError, match="takes pictures and texts alone"):
        one_file.write(strange, tmp_path / "a.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


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


@pytest.mark.slow
def test_a_bundle_becomes_one_file_where_torch_is_not(tmp_path):
    options = ["export", "--model", str(STORED), "--one-file", str(tmp_path / "a.onnx")]
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT, *options], capture_output=True, text=True)
    assert done.returncode == 0 and "13 runs of 1 to 50 steps" in done.stdout, done.stderr


# the first that pyproject.toml allows, and that of Triton's container 26.02
OLDEST = "onnxruntime==1.24.1"
IN_OLD = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, onnxruntime
assert onnxruntime.__version__ == sys.argv[2].partition("==")[2]
for path in sys.argv[3:]:
    run = onnxruntime.InferenceSession(path + ".onnx", providers=["CPUExecutionProvider"])
    np.savez(path + ".made.npz", *run.run(None, dict(np.load(path + ".npz"))))
"""


@pytest.mark.slow
def test_the_oldest_runtime_that_is_allowed_runs_it(files, tmp_path):
    install = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path / "old"),
        OLDEST,
    ]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"{OLDEST} cannot be installed here")
    graphs = {solver: (path.read_bytes(), given(2) | numbers(4, 1.5)) for solver, path in files.items()}
    # the noise levels of public models
    for spacing, zero in itertools.product(("leading", "trailing", "linspace"), (False, True)):
        schedule = DiscreteSchedule(8, "v_prediction", "scaled_linear", spacing=spacing, zero_snr=zero, solver="ddim")
        trace = Trace("t")
        made = grid(schedule, trace.input("steps", INTEGER, ()))
        trace.output(made, "levels", DOUBLE, ANY[:1])
        trace.graph.opset_imports[""] = 23
        model = ir.to_proto(ir.Model(trace.graph, ir_version=10)).SerializeToString()
        graphs[f"{spacing}-{zero}"] = model, {"steps": np.array(20)}
    for name, (model, inputs) in graphs.items():
        (tmp_path / f"{name}.onnx").write_bytes(model)
        np.savez(tmp_path / f"{name}.npz", **inputs)
    places = [str(tmp_path / name) for name in graphs]
    command = [sys.executable, "-P", "-c", IN_OLD, str(tmp_path / "old"), OLDEST, *places]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (model, inputs) in graphs.items():
        (old,), (new,) = np.load(tmp_path / f"{name}.made.npz").values(), opened(model).run(None, inputs)
        np.testing.assert_allclose(old.astype(np.float64), new, rtol=1e-12, atol=2 if name in files else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 60), ("fp16", 40), ("bf16", 60)])
def test_every_precision_passes_the_whole_gate(bundles, precision, bound, tmp_path, capsys):
    for solver in one_file.SOLVERS:
        out = tmp_path / f"{solver}.onnx"
        assert main(["export", "--model", str(bundles[precision]), "--one-file", str(out), "--solver", solver]) == 0
        worst = float(capsys.readouterr().out.partition("images ")[2].split()[0])
        assert worst >= bound
        types = {tensor.data_type for tensor in onnx.load(out).graph.initializer if len(tensor.dims) == 2}
        assert getattr(onnx.TensorProto, {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision]) in types


@pytest.mark.slow
def test_a_run_becomes_one_file_by_way_of_a_bundle(small_run, tmp_path):
    few = ["export", "--model", str(small_run), "--levels", "3", "--steps", "2"]
    assert main([*few, "--one-file", str(tmp_path / "a.onnx")]) == 0
    # of the bundle nothing is left
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    both = ["--out", str(tmp_path / "bundle"), "--one-file", str(tmp_path / "b.onnx")]
    assert main([*few, *both]) == 0 and open_bundle(tmp_path / "bundle").precision == "fp32"
    a, b = (
        opened(tmp_path / f"{name}.onnx").run(
            None,
            {"image": given(1, side=16)["image"], "noise": given(1)["noise"][..., :16, :16]} | numbers(4, 1.5),
        )[0]
        for name in "ab"
    )
    assert np.array_equal(a, b)
