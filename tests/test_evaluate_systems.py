"""Others' pipelines judged by the protocol of our runs: the same pictures as diffusers would make, and what it was."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from semantica.benchmarks.quality.evaluate import EvaluateConfig, evaluate
from semantica.cli import main
from semantica.pipelines.sample import unconditional
from semantica.pipelines.unets import UNetPipeline
from semantica.sampling.settings import Sampling
from semantica.solvers import noise

FEW = dict(conditions=2, n=2, steps=2, bootstrap=20, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("photos") / "val"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (96, 80, 3), np.uint8)).save(root / label / f"{i}.png")
    return root


def test_image_variations_and_an_ip_adapter_stand_in_the_table_of_runs(foreign, photos, tmp_path):
    for kind, more in (("variations", {}), ("sd", {"ip_adapter": tmp_path / "ip" / "ip.safetensors"})):
        path = foreign.write(tmp_path / kind, kind)
        kept = tmp_path / f"kept-{kind}"
        result = evaluate(EvaluateConfig(photos, path, keep=kept, size=32, out=tmp_path / "o.json", **more, **FEW))
        assert set(result["metrics"]["rows"]) == {
            "model", "ignore the condition", "copy the condition", "real pictures", "noise"
        }  # fmt: skip
        assert "loss" not in result and json.loads((tmp_path / "o.json").read_text())["system"] == result["system"]
        system = result["system"]
        assert (system["guidance"], system["steps"], system["seed"]) == (7.5, 2, 0)
        assert (system["sampled"], system["judged"], system["solver"]) == (64, 32, "dpmpp_2m")
        files = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in {
            "unet/diffusion_pytorch_model.safetensors": path / "unet" / "diffusion_pytorch_model.safetensors",
            "image_encoder/model.safetensors": (path if kind != "sd" else tmp_path / "ip")
            / "image_encoder" / "model.safetensors"}.items()}  # fmt: skip
        assert files.items() <= system["weights"].items()
        # the protocol: conditions in turn, seed by picture and variation, at the size it makes
        pipe = UNetPipeline.load(path, more.get("ip_adapter"))
        given = [Image.open(photos / label / "0.png") for label in "ab"]
        inputs = {"image": given, "text": ["", ""]} if kind == "sd" else given
        expected = pipe(inputs, 2, 2, seed=0, solver="dpmpp_2m", output_type="np").images
        made = np.stack([np.asarray(Image.open(kept / f"{i:04d}-{j}.png")) for i in range(2) for j in range(2)])
        assert made.shape == (4, 64, 64, 3) and np.abs(made / 255 - expected).max() <= 0.5 / 255 + 1e-6


def test_what_is_made_without_a_condition_is_decoded(foreign, tmp_path):
    pipe = UNetPipeline.load(foreign.write(tmp_path / "model", "variations"))
    seen = []
    made = unconditional(pipe, 3, Sampling(2, seed=5), on_step=seen.append)
    assert made.shape == (3, 64, 64, 3) and seen == [3, 3]
    # those of guidance 1 and the null stream
    null = pipe.unet.blank["image"]
    streams = {"image": null.map(lambda x: x.repeat(3, *[1] * (x.ndim - 1)))}
    drawn = torch.from_numpy(noise(5, (3, *pipe.sample_shape), 0))
    again = pipe(streams, 1, 2, 1.0, latents=drawn, solver="dpmpp_2m", output_type="np").images
    assert np.abs(made / 255 - again).max() <= 0.5 / 255 + 1e-5


def test_an_encoder_that_no_bundle_has_is_refused_before_anything_is_captured(foreign, tmp_path, capsys):
    path = foreign.write(tmp_path / "model", "versatile")
    capsys.readouterr()
    assert main(["export", "--model", str(path), "--out", str(tmp_path / "bundle")]) == 2
    assert "reads VersatilePictures, which no bundle has yet: sample the folder" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_model_that_cannot_be_judged_is_one_line(foreign, photos, tmp_path, capsys):
    path = foreign.write(tmp_path / "sd", "sd")

    # what wrote the folder had a bar
    capsys.readouterr()

    def said(model, *more):
        assert main(["evaluate", "--data", str(photos), "--model", str(model), "--bootstrap", "20", *more]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "reads text alone, and a condition is a picture: give --ip-adapter; or caption" in said(path)
    assert "no.bin is no safetensors file" in said(path, "--ip-adapter", str(tmp_path / "no.bin"))
    assert "is not a folder" in said(tmp_path / "nothing" / "here" / "at all")
    assert "has no model_index.json" in said(photos)
    assert "--ip-adapter goes with the folder of a diffusers pipeline" in said(photos, "--ip-adapter", "x.safetensors")
    assert "--ip-scale is nothing without --ip-adapter" in said(path, "--ip-scale", "0.5")
    assert "--guidance is nan" in said(path, "--guidance", "nan")
    other = tmp_path / "other"
    shutil.copytree(path, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    assert "holds a 'StableDiffusion3Pipeline': expected one of" in said(other)
    (other / "model_index.json").write_text(json.dumps(index))
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "unet has no safetensors weights: other files are never read" in said(
        other, "--ip-adapter", str(tmp_path / "ip" / "ip.safetensors")
    )
    assert not list(tmp_path.rglob("evaluation.json"))
