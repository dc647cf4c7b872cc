"""A convolutional backbone that crops what it is shown: its tokens stored, trained on, exported and sampled."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from semantica import PretrainedEncoder, SemanticaPipeline
from semantica.benchmarks.quality.evaluate import EvaluateConfig, losses
from semantica.cli import main
from semantica.images import load_image, to_tensor
from semantica.pipelines.networks import NetworkPipeline
from semantica.sight import Sight
from semantica.solvers import noise
from semantica.train.data.folders import scan
from semantica.train.data.heldout import held_out_batches
from semantica.train.data.open import open_data
from semantica.train.objective import Objective, held_out_loss

SETTINGS = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}, "resample": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        hidden_sizes=[16, 16, 32, 64], depths=[1] * 4, embedding_size=8, layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.mark.slow
def test_tokens_are_stored_as_it_sees_pictures_and_trained_on(source, photos, tmp_path):
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    options = ["--encoder", str(source), "--precision", "fp32", "--processes", "1"]
    assert main(["pairs", "--tokens", str(photos), "--out", str(tokens), *options]) == 0
    encoder, data = PretrainedEncoder.from_source(str(source)), open_data(photos, tokens=tokens)
    view = encoder.sight.see(load_image(photos / "g0" / "0.png"))
    for mirror in (False, True):
        expected = encoder(to_tensor([view[:, ::-1] if mirror else view])).tokens[0]
        actual = torch.from_numpy(data.tokens.read("g0/0.png", mirror)[0].astype(np.float32))
        torch.testing.assert_close(actual, expected, rtol=2**-11, atol=1e-4)
    options = ["--encoder", str(source), "--tokens", str(tokens), "--steps", "2", "--batch", "4", "--image-size", "16"]
    assert main(["train", "--data", str(photos), "--out", str(run), *options, "--device", "cpu", "--no-compile"]) == 0
    assert SemanticaPipeline.from_pretrained(run).encoder.sight == encoder.sight


def test_the_loss_that_a_run_is_judged_by_is_of_pictures_as_it_sees_them(source, photos, make_run, tmp_path):
    encoder = PretrainedEncoder.from_source(str(source))
    pipeline = NetworkPipeline.load(make_run(tmp_path / "run", encoder=encoder))
    data = scan(photos, "folders")
    found = losses(pipeline, EvaluateConfig(data=photos), data, torch.device("cpu"))
    objective, level = Objective(pipeline.unet, pipeline.encoder), pipeline.scheduler.schedule
    for sight, same in ((encoder.sight, True), (None, False)):
        batches = held_out_batches(data, 0, 64, 16, torch.device("cpu"), sight=sight)
        expected = held_out_loss(objective, batches, level, nullcontext)
        assert (found["right"] == expected["right"]) is same


@pytest.mark.slow
def test_a_bundle_sees_pictures_as_it_does(source, make_run, tmp_path):
    encoder = PretrainedEncoder.from_source(str(source))
    run, out = make_run(tmp_path / "run", encoder=encoder), tmp_path / "bundle"
    assert main(["export", "--model", str(run), "--out", str(out), "--levels", "2", "--steps", "2"]) == 0
    said = json.loads((out / "manifest.json").read_text())["sight"]["image"]
    assert Sight(**said) == encoder.sight == Sight(64, 72, "bilinear")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    picture, latents = Image.fromarray(pixels), noise(1, (1, 3, 16, 16))
    settings = dict(num_inference_steps=3, guidance_scale=3.0, output_type="np")
    bundle, pipeline = SemanticaPipeline.from_bundle(out, "onnxruntime"), SemanticaPipeline.from_pretrained(run)
    prepared = bundle.prepare(picture)["image"]
    assert np.array_equal(prepared, pipeline.prepare(picture)["image"].numpy())
    made = bundle(picture, latents=latents, **settings).images
    expected = pipeline(picture, latents=torch.from_numpy(latents), **settings).images
    assert np.abs(made - expected).max() < 1e-4
