"""A bundle as a model repository of Triton Inference Server: what it says of itself, and the images of its loop.

The server is pretended by `triton_server.py`; `test_repository_server.py` asks a real one.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from semantica import UserError
from semantica.cli import main
from semantica.engines import load_engine, open_bundle
from semantica.export import one_file
from semantica.export.repository import SHIPPED, write
from semantica.export.repository.pbtxt import Name, mapped, pbtxt
from semantica.files import entries
from semantica.pipelines.bundle import BundlePipeline
from semantica.solvers import noise

pytest.importorskip("tritonclient")

HERE = Path(__file__).parent
STORED = HERE / "stored" / "bundle"
# of ONNX, as Triton names them
TYPES = {"TYPE_FP32": TensorProto.FLOAT, "TYPE_INT64": TensorProto.INT64, "TYPE_UINT8": TensorProto.UINT8}


@pytest.fixture(scope="module")
def triton():
    """The module `triton_server.py` of this folder."""
    spec = importlib.util.spec_from_file_location("triton_server", HERE / "triton_server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(bundle, out: Path, solver: str, most_steps: int) -> Path:
    """A graph of the one file's signature; what it computes is proved elsewhere, and takes long to make."""
    # it is the server's clients who choose the steps
    assert most_steps == 1000
    shape = bundle.shape_of("z", 1)[1:]
    kinds = {"noise": (TensorProto.FLOAT, ["batch", *shape]), "steps": (TensorProto.INT64, []),
             "guidance": (TensorProto.FLOAT, [])}  # fmt: skip
    if side := bundle.shapes["image"]:
        kinds["image"] = (TensorProto.UINT8, ["batch", side, side, 3])
    inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *shape])
    cast = helper.make_node("Cast", ["noise"], ["images"], to=TensorProto.UINT8)
    graph = helper.make_graph([cast], solver, inputs, [images])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), out)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_file, "write", stand_in)
        return write(open_bundle(STORED), out)


@pytest.fixture(scope="module")
def server(triton, made):
    return triton.Server(made)


@pytest.fixture(scope="module")
def pipeline() -> BundlePipeline:
    return BundlePipeline(load_engine(STORED, "onnxruntime", "cpu"))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def expected(pipeline, picture: np.ndarray, count: int, steps: int, guidance: float, seed: int) -> np.ndarray:
    made = pipeline(
        Image.fromarray(picture), num_images_per_prompt=count, num_inference_steps=steps, guidance_scale=guidance,
        seed=seed,
    ).images  # fmt: skip
    return np.stack([np.asarray(image) for image in made])


def columns(rows: int, steps: int, guidance: float, seed: int) -> dict[str, np.ndarray]:
    values = {"steps": (steps, np.int64), "guidance": (guidance, np.float32), "seed": (seed, np.int64)}
    return {name: np.full((rows, 1), value, kind) for name, (value, kind) in values.items()}


def images_of(response) -> np.ndarray:
    assert not response.has_error(), response.error().message()
    (tensor,) = response.output_tensors()
    return tensor.as_numpy()


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of any pixel, of 255; batches of other sizes round otherwise."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b).max())


def test_a_message_is_text_that_the_schema_reads(triton):
    from google.protobuf import text_format

    config = {
        "name": 'a "name"\n', "max_batch_size": 4, "input": [{"name": "x", "dims": [-1, 3], "optional": True},
        {"name": "y", "data_type": Name("TYPE_BF16"), "dims": [1], "reshape": {}}],
        "parameters": mapped({"k": {"string_value": "é"}}),
    }  # fmt: skip
    read = text_format.Parse(pbtxt(config), triton.ModelConfig())
    assert read.name == config["name"] and read.max_batch_size == 4 and read.parameters["k"].string_value == "é"
    assert [list(port.dims) for port in read.input] == [[-1, 3], [1]] and read.input[0].optional
    assert read.input[1].data_type == triton.DataType.Value("TYPE_BF16") and read.input[1].HasField("reshape")


def check_config(config, folder: Path, graph: Path | None) -> None:
    """What the server, and the backend of ONNX Runtime, check when a model is loaded."""
    assert config.name == folder.name and config.version_policy.latest.num_versions == 1
    assert all(group.count > 0 for group in config.instance_group)
    most = config.max_batch_size
    assert config.HasField("dynamic_batching") == (most > 0)
    assert all(0 < size <= most for size in config.dynamic_batching.preferred_batch_size)
    ports = {port.name: port for port in (*config.input, *config.output)}
    assert len(ports) == len(config.input) + len(config.output)
    for port in ports.values():
        assert port.data_type and len(port.dims) and all(dim == -1 or dim > 0 for dim in port.dims)
        # an empty shape is taken by models that batch alone
        assert not port.HasField("reshape") or (most and np.prod(port.dims) == 1 and not port.reshape.shape)
    for sample in config.model_warmup:
        assert 1 <= sample.batch_size <= max(1, most) and set(sample.inputs) == {port.name for port in config.input}
        for name, zeros in sample.inputs.items():
            assert zeros.data_type == ports[name].data_type
            assert all(a in (-1, b) for a, b in zip(ports[name].dims, zeros.dims, strict=True))
            if zeros.input_data_file:
                size = np.dtype({"steps": np.int64, "guidance": np.float32}[name]).itemsize
                assert (folder / "warmup" / zeros.input_data_file).stat().st_size == size
    if graph is None:
        return
    model = onnx.load(graph)
    onnx.checker.check_model(model)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    values = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
    assert set(values) == set(ports)
    for name, value in values.items():
        dims = [dim.dim_value or -1 for dim in value.shape.dim]
        said = list(ports[name].dims)
        if most:
            assert dims.pop(0) == -1
        kind = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[ports[name].data_type]
        assert value.elem_type == TYPES[kind.name]
        assert said == dims or (said == [1] and dims == [])


def test_every_config_is_what_the_server_and_the_graph_take(server, made):
    assert set(server.configs) == {f"variations{part}" for part in ("", "_condition", "_denoise", "_one_file")}
    for name, config in server.configs.items():
        folder = made / name
        graph = folder / "1" / config.default_model_filename if config.backend == "onnxruntime" else None
        check_config(config, folder, graph)
        assert config.instance_group[0].kind == 0  # KIND_AUTO
    loop = server.configs["variations"]
    assert loop.backend == "python" and loop.max_batch_size == 16 and loop.dynamic_batching.max_queue_delay_microseconds
    # guidance asks for two of each image, and what a batch of the loop asks for is one batch of the denoiser
    assert server.configs["variations_denoise"].max_batch_size == 2 * loop.max_batch_size
    assert {port.name for port in loop.input if not port.optional} == {"image"}
    # one number each for all images of a call: no batch may mix them
    assert server.configs["variations_one_file"].max_batch_size == 0
    queue = loop.dynamic_batching.default_queue_policy
    assert queue.max_queue_size == 256
    # a client's timeout counts only below the server's own: PolicyQueue::Enqueue of Triton's core
    assert queue.allow_timeout_override and queue.default_timeout_microseconds >= 60_000_000


def test_whoever_may_read_the_folder_may_read_all_of_it(made):
    modes = {path.relative_to(made): path.stat().st_mode & 0o777 for path in made.rglob("*") if path.is_file()}
    assert set(modes.values()) == {modes[Path("variations", "config.pbtxt")]}, modes


def test_the_loop_gives_the_pipelines_images(server, pipeline, pictures, triton):
    model = server.loop()
    server.calls.clear()
    request = triton.Request(image=np.repeat(pictures[:1], 2, 0), **columns(2, 4, 2.5, 7))
    assert apart(images_of(*server.ask(model, request)), expected(pipeline, pictures[0], 2, 4, 2.5, 7)) == 0
    # equal pictures are encoded once, and both branches of guidance are one call
    assert server.calls == {"variations_condition": [1], "variations_denoise": [4] * 4}
    # what a request leaves out is the pipeline's own, and noise may be the client's
    (first,) = server.ask(model, triton.Request(image=pictures[:1]))
    assert apart(images_of(first), expected(pipeline, pictures[0], 1, 20, 1.5, 0)) == 0
    drawn = noise(0, (3, 32, 32), 0, 0)[None]
    (own,) = server.ask(model, triton.Request(image=pictures[:1], noise=drawn))
    assert apart(images_of(own), images_of(first)) == 0


def test_rows_of_one_setting_are_one_run_whoever_asks_for_them(server, pipeline, pictures, triton):
    model = server.loop()
    server.calls.clear()
    mixed = columns(2, 3, 1.0, 5)
    mixed["steps"][1], mixed["guidance"][1] = 2, 3.0
    requests = [
        triton.Request(image=pictures[:1], **columns(1, 3, 1.0, 9)),
        triton.Request(image=pictures[1:], **mixed),
        triton.Request(image=pictures[2:], **columns(1, 2, 3.0, 1)),
    ]
    first, second, third = (images_of(response) for response in server.ask(model, *requests))
    assert apart(first, expected(pipeline, pictures[0], 1, 3, 1.0, 9)) <= 1
    assert apart(second[:1], expected(pipeline, pictures[1], 1, 3, 1.0, 5)) <= 1
    assert apart(second[1:], expected(pipeline, pictures[2], 2, 2, 3.0, 5)[1:]) <= 1
    assert apart(third, expected(pipeline, pictures[2], 1, 2, 3.0, 1)) <= 1
    assert sorted(server.calls["variations_denoise"]) == [2, 2, 2, 4, 4]
    # two equal pictures of two requests
    assert sorted(server.calls["variations_condition"]) == [1, 2]


def test_torch_samples_the_same_through_dlpack(server, pipeline, pictures, triton):
    model = server.loop()
    module = sys.modules["1.model"]
    model.denoiser = module.Served(module.Device("cpu"), model.denoiser.models, model.facts)
    request = triton.Request(image=pictures[:2], **columns(2, 3, 2.0, 4))
    made = images_of(*server.ask(model, request))
    assert isinstance(model.denoiser.null(1).emb, torch.Tensor)
    assert apart(made[:1], expected(pipeline, pictures[0], 1, 3, 2.0, 4)) <= 1


REFUSED = {
    "no steps": ({"steps": 0}, "number of sampling steps 0 must be at least 1"),
    "too many steps": ({"steps": 1001}, "steps is 1001: give 1 to 1000"),
    "no number": ({"guidance": np.nan}, "guidance scale nan must be a number"),
    "negative seed": ({"seed": -1}, "seed -1 must be 0 or more"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_others_alone(server, pictures, triton, change, says):
    model = server.loop()
    bad = columns(1, **{"steps": 2, "guidance": 1.0, "seed": 0} | change)
    good = triton.Request(image=pictures[:1], **columns(1, 2, 1.0, 0))
    refused, answered = server.ask(model, triton.Request(image=pictures[:1], **bad), good)
    assert (refused.error().message(), refused.error().code()) == (says, "INVALID_ARG")
    assert images_of(answered).shape == (1, 32, 32, 3)


def test_noise_that_is_no_number_is_refused(server, pictures, triton):
    endless = np.full((1, 3, 32, 32), np.inf, np.float32)
    (refused,) = server.ask(server.loop(), triton.Request(image=pictures[:1], noise=endless))
    assert "not finite" in refused.error().message()


def test_an_impossible_seed_beside_noise_costs_nobody_elses_images(server, pictures, triton):
    model = server.loop()
    # it draws from the seed in every step
    model.facts["scheduler"]["solver"] = "ddpm"
    drawn, settings = noise(0, (1, 3, 32, 32)), columns(1, 2, 1.0, 0)
    bad = triton.Request(image=pictures[:1], noise=drawn, **settings | {"seed": np.full((1, 1), -1)})
    refused, answered = server.ask(model, bad, triton.Request(image=pictures[:1], noise=drawn, **settings))
    assert refused.error().code() == "INVALID_ARG" and images_of(answered).shape == (1, 32, 32, 3)


def test_a_torch_without_gpus_is_none(server, pictures, triton, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = server.loop(kind="GPU")
    assert "variations: no torch for GPUs in this Python" in capsys.readouterr().out
    (made,) = server.ask(model, triton.Request(image=pictures[:1], **columns(1, 2, 1.0, 0)))
    assert images_of(made).shape == (1, 32, 32, 3)


def test_a_model_that_fails_costs_its_own_run_alone(triton, made, pictures):
    server = triton.Server(made)
    model = server.loop()
    server.broken["variations_denoise"] = 1
    requests = [triton.Request(image=pictures[:1], **columns(1, steps, 1.0, 0)) for steps in (2, 3)]
    answers = server.ask(model, *requests)
    failed = [response.error() for response in answers if response.has_error()]
    assert [error.message() for error in failed] == ["variations_denoise: out of memory"]
    assert failed[0].code() == "INTERNAL" and sum(not response.has_error() for response in answers) == 1


def test_a_run_ends_when_all_who_wait_for_it_have_left(triton, made, pictures):
    server = triton.Server(made)
    model = server.loop()
    settings = columns(1, 5, 1.0, 0)
    (left,) = server.ask(model, triton.Request(leaves=1, image=pictures[:1], **settings))
    assert left.error().code() == "CANCELLED" and server.calls["variations_denoise"] == [1, 1]
    both = [triton.Request(leaves=leaves, image=pictures[:1], **settings) for leaves in (1, None)]
    assert not any(response.has_error() for response in server.ask(model, *both))


def test_the_loop_needs_numpy_and_nothing_of_ours_but_what_is_beside_it(made, pictures, pipeline, tmp_path):
    np.save(tmp_path / "pictures.npy", pictures)
    code = f"""
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("triton_server", {str(HERE / "triton_server.py")!r})
triton = importlib.util.module_from_spec(spec); spec.loader.exec_module(triton)
server = triton.Server(triton.Path({str(made)!r}))
pictures = np.load({str(tmp_path / "pictures.npy")!r})
settings = dict(steps=np.full((1, 1), 3), guidance=np.full((1, 1), 2, np.float32), seed=np.full((1, 1), 6))
(response,) = server.ask(server.loop(), triton.Request(image=pictures[:1], **settings))
np.save({str(tmp_path / "made.npy")!r}, response.output_tensors()[0].as_numpy())
ours = {{name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "semantica"}}
assert all(path.startswith({str(made)!r}) for path in ours.values()), ours
assert not {{"torch", "PIL", "safetensors"}} & set(sys.modules)
print(len(ours))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # all but the one that is for GPUs
    assert int(done.stdout.split()[-1]) == len(SHIPPED) - 1
    assert apart(np.load(tmp_path / "made.npy"), expected(pipeline, pictures[0], 1, 3, 2.0, 6)) == 0


def with_engines(folder: Path, profile: dict[str, int], *names: str) -> Path:
    """A copy of the stored bundle with engines in it that nobody can run."""
    shutil.copytree(STORED, folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name in names:
        place = folder / "engines" / name
        place.mkdir(parents=True)
        for graph in ("condition", "denoise"):
            (place / f"{graph}.engine").write_bytes(f"{graph} of {name}".encode())
        backend, arch = name.rsplit("-", 1)
        manifest = {"format": "semantica-engine", "version": 1, "backend": backend, "arch": arch, "profile": profile,
                    "backend_version": "11.2.0", "files": entries(place, [p.name for p in place.iterdir()]),
                    "onnx": {key: files[key]["sha256"] for key in ("condition.onnx", "denoise.onnx",
                                                                   "weights.safetensors")}}  # fmt: skip
        (place / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_engines_of_a_bundle_become_plans(triton, tmp_path, monkeypatch):
    monkeypatch.setattr(one_file, "write", stand_in)
    profile = {"min": 1, "opt": 2, "max": 8}
    bundle = with_engines(tmp_path / "b", profile, "tensorrt-sm_90", "tensorrt-sm_103", "tensorrt-rtx-sm_89")
    out = write(open_bundle(bundle), tmp_path / "r")
    configs = {path.name: triton.read_config(path) for path in out.iterdir()}
    for name, most in (("condition", 8), ("denoise", 8)):
        config, place = configs[f"variations_{name}"], out / f"variations_{name}" / "1"
        check_config(config, place.parent, None)
        assert config.platform == "tensorrt_plan" and not config.backend and config.max_batch_size <= most
        # those of TensorRT-RTX are another library's
        assert dict(config.cc_model_filenames) == {"9.0": "sm_90.plan", "10.3": "sm_103.plan"}
        assert (place / "sm_90.plan").read_bytes() == f"{name} of tensorrt-sm_90".encode()
        assert [p.name for p in sorted(place.iterdir())] == ["sm_103.plan", "sm_90.plan"]
        assert config.instance_group[0].kind == 1 and config.parameters["tensorrt"].string_value == "11.2.0"
    assert [s.batch_size for s in configs["variations_denoise"].optimization.cuda.graph_spec] == [2, 4, 8]
    assert (configs["variations"].max_batch_size, configs["variations_denoise"].max_batch_size) == (4, 8)


def test_a_repository_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise UserError("this model has no one file")

    monkeypatch.setattr(one_file, "write", fails)
    for out, says in ((tmp_path / "r", "this model has no one file"), (tmp_path, "exists")):
        assert main(["export", "--model", str(STORED), "--triton", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and says in said
        assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    narrow = with_engines(tmp_path / "narrow", {"min": 1, "opt": 1, "max": 1}, "tensorrt-sm_90")
    altered = with_engines(tmp_path / "altered", {"min": 1, "opt": 2, "max": 8}, "tensorrt-sm_90")
    (altered / "engines" / "tensorrt-sm_90" / "denoise.engine").write_bytes(b"another")
    for bundle, says in ((narrow, "guidance takes two for each image"), (altered, "is not the file that was written")):
        with pytest.raises(UserError, match=says):
            write(open_bundle(bundle), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_latents_and_texts_are_sampled_too(foreign, triton, tmp_path, monkeypatch):
    """A public UNet's: prompts as token ids, each with a null condition of its own length, and a decoder."""
    small = {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",), "attention_head_dim": 2,
             "up_block_types": ("CrossAttnUpBlock2D",), "vae": {"block_out_channels": (16,)}}  # fmt: skip
    folder, bundle = foreign.write(tmp_path / "model", "sd", **small), tmp_path / "bundle"
    few = ["--levels", "3", "--steps", "2", "--precision", "fp16"]
    monkeypatch.setattr(one_file, "write", stand_in)
    made = ["--out", str(bundle), "--triton", str(tmp_path / "r")]
    assert main(["export", "--model", str(folder), *made, *few]) == 0
    server = triton.Server(tmp_path / "r")
    for name, config in server.configs.items():
        if config.backend == "onnxruntime":
            check_config(config, tmp_path / "r" / name, None)
    assert server.configs["variations_decode"].max_batch_size == 1
    pipeline = BundlePipeline(load_engine(bundle, "onnxruntime", "cpu"))
    prompts = ["two red bicycles", "a lighthouse"]
    whole = pipeline(prompt=prompts, num_inference_steps=3, seed=2).images
    ids = pipeline.prepare({"text": prompts})["text"]
    steps, drawn = np.full((1, 1), 3), [noise(2, pipeline.sample_shape, i, 0)[None] for i in range(2)]
    requests = [triton.Request(input_ids=ids[i : i + 1], steps=steps, noise=drawn[i]) for i in range(2)]
    for response, image in zip(server.ask(server.loop(), *requests), whole):
        assert apart(images_of(response), np.asarray(image)[None]) <= 1
    assert server.calls["variations_denoise"] == [4] * 3 and server.calls["variations_decode"] == [1, 1]
