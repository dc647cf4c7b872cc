"""Pipelines on pretended CUDA devices: the second one, nothing that waits in a run, and what a run says of itself."""

import contextlib
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantica import engines
from semantica.cli import main
from semantica.device import pick_device, pick_precision
from semantica.engines import load_engine
from semantica.errors import UserError
from semantica.pipelines.bundle import BundlePipeline
from semantica.pipelines.networks import NetworkPipeline
from semantica.ranges import marked, span

STORED = Path(__file__).parent / "stored"


def pictures(count=2):
    return torch.from_numpy(np.tanh(np.random.default_rng(0).normal(size=(count, 3, 32, 32)).astype(np.float32)))


def pipeline_of(kind: str, device: str):
    if kind == "bundle":
        return BundlePipeline(load_engine(STORED / "bundle", "torch", device))
    made = NetworkPipeline.load(STORED / "run").to(device)
    return made.accelerate(torch.float32, "none", graphs=False) if kind == "accelerated" else made


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
@pytest.mark.parametrize("kind", ["run", "accelerated", "bundle"])
def test_a_call_on_the_second_device_waits_for_its_images_alone(cuda, kind, solver):
    options = dict(num_inference_steps=3, seed=5, solver=solver, output_type="np")
    expected = pipeline_of(kind, "cpu")(pictures(), 2, **options).images
    with cuda.mode(), torch.no_grad():
        pipeline = pipeline_of(kind, "cuda:1")
        # chunks, each of which would wait for the one before
        pipeline.max_samples = 2
        cuda.waits.clear()
        cuda.astray.clear()
        made = pipeline(pictures(), 2, **options).images
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-3)
    assert len(cuda.waits) == 1 and "cuda:1 -> cpu" in cuda.waits[0], cuda.waits
    assert cuda.races == []
    # attention backends from elsewhere launch on whichever device is current; a bundle's loop is arithmetic
    layers = ("conv", "mm", "attention", "norm")
    assert not [name for name in cuda.astray if kind != "bundle" or any(layer in name for layer in layers)]


@pytest.mark.parametrize(("model", "engine"), [("run", "torch"), ("bundle", "torch")])
def test_the_command_on_the_second_device_makes_the_same_pictures(cuda, picture, tmp_path, model, engine):
    for device in ("cpu", "cuda:1"):
        arguments = ["--model", str(STORED / model), "--image", str(picture), "--steps", "3", "--engine", engine]
        with cuda.mode() if device != "cpu" else contextlib.nullcontext():
            assert main(["sample", *arguments, "--device", device, "--out", str(tmp_path / f"{device}.png")]) == 0
    made = [np.asarray(Image.open(tmp_path / f"{device}.png"), np.int16) for device in ("cpu", "cuda:1")]
    assert np.abs(made[0] - made[1]).max() <= 1 and made[0].std() > 10 and cuda.races == []


def test_a_generator_of_another_device_is_one_line(cuda):
    with cuda.mode():
        pipeline = pipeline_of("bundle", "cpu")
        elsewhere = type("Generator", (), {"device": torch.device("cuda:0")})()
        for generator in (elsewhere, [elsewhere] * 2):
            with pytest.raises(UserError, match="generator on cuda:0 for noise on cpu: give one of the CPU"):
                pipeline(pictures(), num_inference_steps=2, generator=generator)
        far = pipeline_of("bundle", "cuda:1")
        with pytest.raises(UserError, match="generator on cuda:0 for noise on cuda:1"):
            far(pictures(), num_inference_steps=2, generator=elsewhere)
        options = dict(num_inference_steps=3, output_type="np", solver="ddpm")
        near = pipeline(pictures(), generator=torch.Generator().manual_seed(1), **options).images
        cuda.waits.clear()
        made = far(pictures(), generator=torch.Generator().manual_seed(1), **options).images
        np.testing.assert_allclose(made, near, rtol=0, atol=2e-3)
        assert len(cuda.waits) == 1


def test_latents_of_a_gpu_reach_an_engine_of_arrays(cuda):
    with cuda.mode():
        pipeline = BundlePipeline(load_engine(STORED / "bundle", "onnxruntime"))
        options = dict(num_inference_steps=2, output_type="np")
        z = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        made = [pipeline(pictures(), latents=a, **options).images for a in (z.numpy(), z, z.to("cuda:0"))]
        np.testing.assert_array_equal(made[0], made[1])
        np.testing.assert_array_equal(made[0], made[2])
        pipeline(pictures().bfloat16(), latents=z.bfloat16(), **options)


def test_auto_says_that_it_leaves_the_gpu_idle(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(engines, "gpu_here", lambda: False)
    assert load_engine(STORED / "bundle").backend == "onnxruntime" and not caplog.messages
    monkeypatch.setattr(engines, "gpu_here", lambda: True)
    for versions, how in (
        ({}, "it takes onnxruntime-gpu in place of onnxruntime, or a CUDA build of torch"),
        ({"torch": "2.11.0+cpu"}, "it takes onnxruntime-gpu"),
        ({"torch": "2.11.0"}, "--engine torch --device cuda runs it there, pip install onnxruntime-gpu"),
        ({"torch": "2.11.0", "onnxruntime-gpu": "1.31"}, "--engine onnxruntime --device cuda runs it there"),
    ):
        caplog.clear()
        monkeypatch.setattr(engines, "version_of", lambda package, versions=versions: versions.get(package, ""))
        assert load_engine(STORED / "bundle").backend == "onnxruntime"
        (said,) = caplog.messages
        assert "(fp32) runs in ONNX Runtime on the CPU, though there is an NVIDIA GPU" in said and how in said
        assert "\n" not in said
    caplog.clear()
    load_engine(STORED / "bundle", device="cpu")
    assert not caplog.messages


def test_ranges_are_marked_only_while_asked_for():
    open_now, seen = [], []

    @contextlib.contextmanager
    def mark(name):
        open_now.append(name)
        seen.append("/".join(open_now))
        yield
        open_now.pop()

    pipeline = BundlePipeline(load_engine(STORED / "bundle", "onnxruntime"))
    with marked(mark):
        pipeline(pictures(), num_inference_steps=2)
    steps = ["sample", "sample/denoise", "sample/solve", "sample/denoise", "sample/solve"]
    assert seen == ["prepare", "encode", *steps, "finish"] and not open_now
    pipeline(pictures(), num_inference_steps=2)
    assert len(seen) == 8 and span("a") is span("b")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_ranges_without_cuda_are_one_line(tmp_path, picture, capsys):
    arguments = ["--model", str(STORED / "run"), "--image", str(picture), "--out", str(tmp_path / "out.png"), "--nvtx"]
    assert main(["sample", *arguments]) == 2
    assert "--nvtx marks ranges for NVIDIA's profilers: it needs a CUDA build of torch" in capsys.readouterr().err
    assert main(["bench", "sample", "--quick", "--device", "cpu", "--nvtx"]) == 2
    assert "--nvtx marks ranges" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "no memory left (CUDA out of"),
        (RuntimeError("CUDA error: unspecified launch failure\nmore"), "the GPU failed (CUDA error: unspecified"),
    ],
    ids=["full", "vanished"],
)
def test_a_gpu_that_is_full_or_vanishes_is_one_line(tmp_path, picture, capsys, monkeypatch, error, says):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(NetworkPipeline, "__call__", broken)
    arguments = ["--model", str(STORED / "run"), "--image", str(picture), "--out", str(tmp_path / "out.png")]
    assert main(["sample", *arguments, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out.png").exists()


def test_precision_is_that_of_the_device_itself(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: torch.cuda.current_device() == 1)
    with cuda.mode():
        picked = pick_device("auto"), pick_device("cuda:1")
    assert picked == (torch.device("cuda:0"), torch.device("cuda:1"))
    found = [pick_precision("auto", torch.device("cuda", i)) for i in (0, 1)]
    assert found == [torch.float32, torch.bfloat16]


def test_sampling_a_bundle_still_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from semantica.pipelines.bundle import BundlePipeline; from semantica.engines import load_engine\n"
        "import numpy as np\n"
        f"p = BundlePipeline(load_engine({str(STORED / 'bundle')!r}))\n"
        "p(np.zeros((1, 3, 32, 32), np.float32), num_inference_steps=1)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
