"""Bundles as hostile or careless hands leave them: one line, exit code 2, nothing deserialised before its hash."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance
from diffusers.hooks import LayerSkipConfig
from PIL import Image
from safetensors.numpy import load_file

from semantica import SemanticaPipeline, UserError, engines
from semantica.cli import main
from semantica.engines import BACKENDS, Backend, load_engine, open_bundle
from semantica.engines import bundle as bundle_module
from semantica.engines.base import GraphEngine
from semantica.engines.built import open_built
from semantica.files import entries
from semantica.sampling.guiders import IndependentCondition, TimeStep, WeakModel
from semantica.sampling.loop import Denoiser
from semantica.solvers import alpha_sigma


@pytest.fixture
def bundle(bundles, tmp_path) -> Path:
    return shutil.copytree(bundles["fp32"], tmp_path / "bundle")


def edit(folder: Path, **changes) -> None:
    """Changes to a manifest; a function gets the old value."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, value in changes.items():
        manifest[key] = value(manifest.get(key)) if callable(value) else value
    path.write_text(json.dumps(manifest))


def outside(folder: Path) -> None:
    shutil.copy(folder / "denoise.onnx", folder.parent / "other.onnx")
    edit(folder, files=lambda files: files | {"../other.onnx": entries(folder.parent, ["other.onnx"])["other.onnx"]})


def linked(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def altered(folder: Path) -> None:
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


BAD = {
    "missing file": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "altered file": (altered, "weights.safetensors is not the file that was written"),
    "longer file": (lambda f: (f / "null.safetensors").open("ab").write(b"x"), "null.safetensors is not the file"),
    "linked file": (lambda f: linked(f, "denoise.onnx"), "denoise.onnx is a symbolic link"),
    "linked manifest": (lambda f: linked(f, "manifest.json"), "manifest.json is a symbolic link"),
    "path outside": (outside, "names '../other.onnx', outside the folder"),
    "absolute path": (lambda f: edit(f, files=lambda x: x | {"/etc/passwd": {}}), "'/etc/passwd', outside the folder"),
    "unlisted file": (lambda f: edit(f, files=lambda x: x.pop("null.safetensors") and x), "does not name null"),
    "wrong hash": (lambda f: edit(f, files=lambda x: x | {"denoise.onnx": {"sha256": "0", "bytes": 1}}), "is not the"),
    "newer format": (lambda f: edit(f, version=99), "install a newer semantica"),
    "no version": (lambda f: edit(f, version="1"), "has version '1'"),
    "other format": (lambda f: edit(f, format="zip"), "not the manifest of a semantica-bundle"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "broken manifest": (lambda f: (f / "manifest.json").write_text("{"), "cannot be read as JSON"),
    "list manifest": (lambda f: (f / "manifest.json").write_text("[]"), "not the manifest"),
    "bad shapes": (lambda f: edit(f, shapes=lambda x: x | {"heads": -1}), "impossible shapes"),
    "bad precision": (lambda f: edit(f, precision="int4"), "precision 'int4'"),
    "no model": (lambda f: edit(f, model=None), "no usable 'model'"),
}


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD)
def test_a_bad_bundle_is_one_line_and_exit_code_2(bundle, picture, tmp_path, capsys, monkeypatch, change, says):
    def never(*_, **__):
        raise AssertionError("deserialised before it was checked")

    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    change(bundle)
    out = tmp_path / "made.png"
    assert main(["sample", "--model", str(bundle), "--image", str(picture), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("semantica: ") and said.count("\n") == 1 and says in said, said
    assert not out.exists()


def test_a_graph_that_reads_outside_its_folder_is_refused(bundle, picture, tmp_path, capsys):
    # hashes agree here: whoever wrote the graph wrote the manifest
    (bundle.parent / "secret").write_bytes((bundle / "weights.safetensors").read_bytes())
    model = onnx.load(bundle / "denoise.ort.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    onnx.save(model, bundle / "denoise.ort.onnx")
    edit(bundle, files=lambda files: entries(bundle, files))
    assert main(["sample", "--model", str(bundle), "--image", str(picture), "--out", str(tmp_path / "o.png")]) == 2
    assert "ONNX Runtime cannot load" in capsys.readouterr().err and not (tmp_path / "o.png").exists()


def test_other_code_is_never_loaded(bundle):
    edit(bundle, model=lambda model: model | {"encoder": {"class": "Popen"}})
    with pytest.raises(UserError, match="asks for other code as its encoder"):
        load_engine(bundle, "torch")


def test_shapes_and_batches_are_checked_before_anything_runs(bundles):
    engine = load_engine(bundles["fp32"], "onnxruntime")
    image, z, level = (np.zeros(s, np.float32) for s in ((2, 3, 16, 16), (2, 3, 16, 16), (2,)))
    condition = engine.condition(image)
    for call, says in (
        (lambda: engine.condition(image[:, :, :8]), r"image has shape \(2, 3, 8, 16\): this bundle takes"),
        (lambda: engine(z[..., :8], level, condition), "z has shape"),
        (lambda: engine(z[:1], level, condition), "logsnr has shape"),
        (lambda: engine(z[:1], level[:1], condition), r"emb has shape \(2, 32\): this bundle takes \(1, 32\)"),
        (lambda: engine(z, level, engine.condition(image).map(lambda a: a[:, :1])), "emb has shape"),
        (lambda: engine(z[:0], level[:0], condition.map(lambda a: a[:0])), "batch of 0 is outside"),
    ):
        with pytest.raises(UserError, match=says):
            call()
    engine.max_batch = 1
    with pytest.raises(UserError, match="batch of 2 is outside the profile 1 to 1 of this onnxruntime engine"):
        engine(z, level, condition)


def test_the_pipeline_splits_what_the_profile_cannot_take(bundles, picture):
    image = Image.open(picture)
    pipeline = SemanticaPipeline.from_bundle(bundles["fp32"], "onnxruntime")
    settings = dict(num_images_per_prompt=3, num_inference_steps=2, output_type="np", seed=4)
    whole = pipeline([image, image.rotate(90)], **settings).images
    pipeline.engine.max_batch = 4
    np.testing.assert_allclose(pipeline([image, image.rotate(90)], **settings).images, whole, rtol=0, atol=1e-5)
    pipeline.engine.max_batch = 1
    with pytest.raises(UserError, match="guidance needs 2"):
        pipeline(image, num_inference_steps=2)
    alone = pipeline(image, num_inference_steps=2, guidance_scale=1, output_type="np").images
    assert alone.shape == (1, 16, 16, 3) and 0 <= alone.min() <= alone.max() <= 1


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_noise_depends_on_seed_and_sample_alone(bundles, picture, solver):
    image, pipeline = Image.open(picture), SemanticaPipeline.from_bundle(bundles["fp32"], "onnxruntime")
    settings = dict(num_inference_steps=3, output_type="np", solver=solver)
    three = pipeline(image, 3, seed=1, **settings).images
    np.testing.assert_allclose(pipeline(image, 2, seed=1, **settings).images, three[:2], rtol=0, atol=1e-5)
    assert np.abs(pipeline(image, 1, seed=2, **settings).images - three[:1]).max() > 0.05


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_the_same_call_is_the_same_call(bundles, small_run, picture, solver):
    """Run folder, accelerated, and two engines: same arguments, same noise, in every step, whatever the batch."""
    image = Image.open(picture)
    pictures = [image, image.rotate(90)]
    pipelines = {
        "run": SemanticaPipeline.from_pretrained(small_run),
        "accelerated": SemanticaPipeline.from_pretrained(small_run).accelerate(torch.float32, "none"),
        "onnxruntime": SemanticaPipeline.from_bundle(bundles["fp32"], "onnxruntime"),
        "torch": SemanticaPipeline.from_bundle(bundles["fp32"], "torch"),
    }
    pipelines["run"].set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=4, guidance_scale=2.0, output_type="np", solver=solver, interval=(0.0, 0.6))
    made = {name: pipeline(pictures, 3, seed=7, **settings).images for name, pipeline in pipelines.items()}
    for name, images in made.items():
        np.testing.assert_allclose(images, made["run"], rtol=0, atol=1e-3, err_msg=name)
    pipelines["run"].max_samples = 2
    np.testing.assert_allclose(pipelines["run"](pictures, 3, seed=7, **settings).images, made["run"], rtol=0, atol=1e-4)
    drawn = [p(image, generator=torch.Generator().manual_seed(1), **settings).images for p in pipelines.values()]
    for images in drawn[1:]:
        np.testing.assert_allclose(images, drawn[0], rtol=0, atol=1e-3)
    assert np.abs(drawn[0] - made["run"][:1]).max() > 0.02


def test_hooks_where_the_engine_allows_them(bundles, picture):
    image, guider = Image.open(picture), ClassifierFreeGuidance(guidance_scale=2.0, start=0.3)
    onnxruntime, network = (SemanticaPipeline.from_bundle(bundles["fp32"], name) for name in ("onnxruntime", "torch"))
    settings = dict(num_inference_steps=4, guidance_scale=2.0, output_type="np")
    seen = []

    def watch(pipeline, step, timestep, values):
        seen.append((step, float(timestep), type(values["latents"])))
        return {"latents": values["latents"] * 0}

    assert (onnxruntime(image, callback_on_step_end=watch, **settings).images == 0.5).all()
    assert seen == [(i, 1 - i / 4, np.ndarray) for i in range(4)]
    expected = network(image, interval=(0.3, 1.0), **settings).images
    np.testing.assert_allclose(network(image, guider=guider, **settings).images, expected, rtol=0, atol=1e-5)
    # one that only mixes predictions needs no network in torch
    np.testing.assert_allclose(onnxruntime(image, guider=guider, **settings).images, expected, rtol=0, atol=1e-5)
    compiled = SemanticaPipeline.from_bundle(bundles["fp32"], "torch-compile")
    changes = AutoGuidance(2.0, auto_guidance_config=LayerSkipConfig([0], fqn="transformer_blocks"))
    for pipeline, backend in ((onnxruntime, "onnxruntime"), (compiled, "torch-compile")):
        with pytest.raises(UserError, match=f"engine '{backend}' takes no guider that changes the network"):
            pipeline(image, guider=changes, **settings)
    with pytest.raises(UserError, match="engine 'torch-compile' takes no callback"):
        compiled(image, callback_on_step_end=watch, **settings)


def test_guiders_that_make_arrays_run_on_every_engine(bundles, small_run, picture):
    """Independent condition and time-step guidance: no torch, no null condition, the images of the run folder."""
    image = Image.open(picture)
    images, settings = [image, image.rotate(90)], dict(num_inference_steps=4, guidance_scale=3.0, output_type="np")
    run, engines = SemanticaPipeline.from_pretrained(small_run), {}
    run.set_progress_bar_config(disable=True)
    for name in ("onnxruntime", "torch"):
        engines[name] = SemanticaPipeline.from_bundle(bundles["fp32"], name)
    others = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.rotate(180)]
    levels = np.linspace(-15, 15, 7, dtype=np.float32)
    with torch.no_grad():
        temb = run.unet.embedding(torch.from_numpy(levels)).numpy()
    np.testing.assert_allclose(engines["onnxruntime"].engine.embedding(levels), temb, rtol=0, atol=1e-4)
    for guider in (IndependentCondition(), IndependentCondition(others), TimeStep(1.0, 0.5), WeakModel):
        of = [guider(pipe) if guider is WeakModel else guider for pipe in (run, *engines.values())]
        expected = run(images, guider=of[0], seed=1, **settings).images
        for pipeline, own in zip(engines.values(), of[1:]):
            np.testing.assert_allclose(pipeline(images, guider=own, seed=1, **settings).images, expected, atol=1e-4)
    # only blocks that are at hand can see noise one by one
    guider = TimeStep(1.0, 0.0, blocks=1)
    expected = run(images, guider=guider, seed=1, **settings).images
    found = engines["torch"](images, guider=guider, seed=1, **settings).images
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    pipeline = engines["onnxruntime"]
    for guider, said in (
        (IndependentCondition(noise=True), "a bundle's encoder gives no tokens"),
        (TimeStep(blocks=1), "some blocks is for U-ViTs in torch"),
        (WeakModel(run), "a run folder and a bundle"),
    ):
        with pytest.raises(UserError, match=said):
            pipeline(images, guider=guider, **settings)
    # both branches count where they go through one call
    pipeline.engine.max_batch = 1
    with pytest.raises(UserError, match="guidance needs 2"):
        pipeline(image, guider=TimeStep(), **settings)


class Towards:
    """Guidance from outside: towards a grey image, along the gradient through the network."""

    needs = ("gradients",)

    def predictor(self, denoiser, levels, condition, weak, settings):
        def predict(i, z):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(levels[i]))
                v = denoiser(z, levels[i], condition)
                x = alpha * z - sigma * v
                return (v + torch.autograd.grad(x.square().sum(), z)[0] / sigma).detach()

        return predict


def test_guidance_from_outside_that_needs_gradients(bundles, small_run, picture):
    image, settings = Image.open(picture), dict(num_inference_steps=4, output_type="np", seed=3)
    pipeline = SemanticaPipeline.from_pretrained(small_run)
    pipeline.set_progress_bar_config(disable=True)
    plain, steered = (pipeline(image, guider=guider, **settings).images for guider in (None, Towards()))
    assert np.abs(steered - plain).max() > 1e-3
    for backend in ("onnxruntime", "torch"):
        engine = SemanticaPipeline.from_bundle(bundles["fp32"], backend)
        with pytest.raises(UserError, match=f"engine '{backend}' gives no gradients: sample the run folder"):
            engine(image, guider=Towards(), **settings)


def test_whatever_denoises_has_one_shape(bundles, small_run):
    pipeline = SemanticaPipeline.from_pretrained(small_run)
    engines_of = [load_engine(bundles["fp32"], name) for name in ("onnxruntime", "torch", "torch-compile")]
    for denoiser in (pipeline.unet, pipeline.accelerate(torch.float32, "none").denoiser, *engines_of):
        for name in (*Denoiser.__annotations__, "__call__", "condition", "null"):
            assert hasattr(denoiser, name), (type(denoiser).__name__, name)
        null = denoiser.null(2)
        assert null.emb.shape[0] == null.keys[0].shape[0] == 2 and null.keys[0].shape[1] == sum(null.sizes)
        assert isinstance(null.emb, np.ndarray) == (denoiser.array == "numpy")
        assert set(denoiser.refuses) <= {"steps", "module", "gradients"}


def test_a_backend_from_outside(bundles, picture, monkeypatch):
    monkeypatch.setattr(engines, "BACKENDS", dict(BACKENDS))

    class Constant(GraphEngine):
        backend, array, arithmetic = "constant", "numpy", "none at all"

        def __init__(self, bundle):
            super().__init__(bundle)
            self.null_arrays = load_file(bundle.folder / "null.safetensors")

        def encode(self, inputs):
            return self.null(len(inputs["image"]))

        def predict(self, z, logsnr, inputs):
            assert inputs["k.0"].flags.c_contiguous and inputs["k.0"].shape == self.bundle.shape_of("k.0", len(z))
            return np.zeros_like(z)

    row = Backend("constant", lambda bundle, name, device: Constant(bundle), (), "", {"cpu": ("fp32",)}, "the CPU")
    engines.register_backend(row)
    made = SemanticaPipeline.from_bundle(bundles["fp32"], "constant")(Image.open(picture), num_inference_steps=2)
    assert made.images[0].size == (16, 16)


def test_the_readme_names_every_backend_and_what_it_runs():
    lines = (Path(__file__).parent.parent / "README.md").read_text().splitlines()
    for name, backend in BACKENDS.items():
        rows = [line for line in lines if line.startswith(f"| `{name}`")]
        assert rows, name
        for precision in {p for kinds in backend.precisions.values() for p in kinds}:
            assert any(precision in row.split("|")[2] for row in rows), (name, precision)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"num_images_per_prompt": 0}, "must be at least 1"),
        ({"latents": np.zeros((2, 3, 16, 16), np.float32)}, r"expected \[1, 3, 16, 16\]"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"interval": (0.9, 0.1)}, "interval"),
    ],
)
def test_the_pipelines_arguments_are_checked(bundles, picture, settings, says):
    pipeline = SemanticaPipeline.from_bundle(bundles["fp32"], "onnxruntime")
    with pytest.raises(UserError, match=says):
        pipeline(Image.open(picture), **settings)
    for image in ([], [[Image.open(picture)] * 2]):
        with pytest.raises(UserError, match="one (value )?for each sample"):
            pipeline(image)


def test_engines_by_name(bundles, small_run, picture, capsys, monkeypatch):
    with pytest.raises(UserError, match="engine 'magic' is unknown: expected auto, onnxruntime"):
        load_engine(bundles["fp32"], "magic")
    assert load_engine(bundles["fp32"]).backend == "onnxruntime" and load_engine(bundles["bf16"]).backend == "torch"
    with pytest.raises(UserError, match="runs on cpu or cuda, not on 'mps'"):
        load_engine(bundles["fp32"], "onnxruntime", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: there is no CUDA device"):
        load_engine(bundles["fp32"], "onnxruntime", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(UserError, match="pip install onnxruntime-gpu"):
            load_engine(bundles["fp32"], "onnxruntime", "cuda")
    arguments = ["sample", "--model", str(small_run), "--image", str(picture), "--engine", "onnxruntime"]
    assert main(arguments) == 2 and "runs a bundle" in capsys.readouterr().err
    absent = dataclasses.replace(BACKENDS["tensorrt"], packages=("no_such_tensorrt",))
    monkeypatch.setitem(BACKENDS, "tensorrt", absent)
    with pytest.raises(UserError, match=r'needs no_such_tensorrt.*pip install "semantica-diffusion\[tensorrt\]"'):
        load_engine(bundles["fp32"], "tensorrt")


def plant_engine(folder: Path, **changes) -> None:
    """An engine folder that passes every check but those of `changes`."""
    place = folder / "engines" / "inductor-here"
    place.mkdir(parents=True)
    (place / "denoise.pt2").write_bytes(b"compiled")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    manifest = {
        "format": "semantica-engine", "version": 1, "backend": "inductor", "arch": "here", "backend_version": "1",
        "onnx": hashes, "profile": {"min": 1, "opt": 2, "max": 8}, "files": entries(place, ["denoise.pt2"]),
    }  # fmt: skip
    (place / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"arch": "sm_90"}, "built for arch 'sm_90', here it is 'here'"),
        ({"backend_version": "0.9"}, "built for backend_version '0.9', here it is '1'"),
        ({"onnx": {"denoise.onnx": "0"}}, "built from other graphs"),
        ({"version": 2}, "install a newer semantica"),
        ({"files": {"denoise.pt2": {"sha256": "0", "bytes": 8}}}, "is not the file that was written"),
        ({"files": {"../../denoise.onnx": {"sha256": "0"}}}, "outside the folder"),
        ({"profile": None}, "is incomplete"),
    ],
)
def test_engines_for_something_else_are_refused(bundle, changes, says):
    plant_engine(bundle, **changes)
    opened = open_bundle(bundle)
    if says is None:
        assert open_built(opened, "inductor", "here", "1")[1]["profile"]["max"] == 8
        with pytest.raises(UserError, match=r"no inductor engine for there \(built: inductor-here\): semantica build"):
            open_built(opened, "inductor", "there", "1")
        return
    with pytest.raises(UserError, match=says):
        open_built(opened, "inductor", "here", "1")


def test_the_format_is_written_down():
    assert (bundle_module.FORMAT, bundle_module.VERSION) == ("semantica-bundle", 1)
