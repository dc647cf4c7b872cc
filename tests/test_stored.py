"""What version 0.1 wrote still loads and still means the same: a run, a checkpoint, a bundle, shards and stored tokens.

`stored/` was made by version 0.1.0, before its files moved into rooms: six steps on a drawn web (16 groups, 4 pictures
each) with a preset of its own, saved at the third; four sampling steps with seed 3, two variations of each condition.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from semantica import SemanticaPipeline
from semantica.benchmarks.quality.web import draw_web
from semantica.cli import main
from semantica.model.presets import PRESETS
from semantica.train.config import TrainConfig
from semantica.train.data.open import open_data
from semantica.train.loop import train

STORED = Path(__file__).parent / "stored"
CONDITIONS = [STORED / "images" / f"condition-{i}.png" for i in (0, 1)]


def levels_apart(made: Path, expected: str) -> int:
    """The largest difference of any pixel, of 255, between the pictures of a folder and the stored ones."""
    pictures = sorted(made.glob("*.png"))
    assert len(pictures) == 4
    stored = [STORED / "images" / f"{expected}-00{i // 2}-00-{i % 2}.png" for i in range(4)]
    pairs = [[np.asarray(Image.open(path), np.int16) for path in pair] for pair in zip(pictures, stored)]
    return max(int(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("model", "solver", "expected"),
    [
        ("run", "dpmpp_2m", "run-dpmpp_2m"),
        ("run", "ddim", "run-ddim"),
        ("bundle", "dpmpp_2m", "bundle-dpmpp_2m"),
        ("bundle", "ddim", "bundle-ddim"),
        ("bundle", "ddpm", "bundle-ddpm"),
        # one seed is one noise, whatever runs the model
        ("run", "ddpm", "bundle-ddpm"),
    ],
)
def test_the_same_pictures(model, solver, expected, tmp_path):
    conditions = [tmp_path / f"00-{i}.png" for i in (0, 1)]
    for source, place in zip(CONDITIONS, conditions):
        shutil.copy(source, place)
    options = ["--n", "2", "--steps", "4", "--solver", solver, "--seed", "3", "--device", "cpu"]
    images = list(map(str, conditions))
    out = tmp_path / "out"
    assert main(["sample", "--model", str(STORED / model), "--image", *images, "--out", str(out), *options]) == 0
    # other processors round otherwise, by a level at most
    assert levels_apart(out, expected) <= 1


def test_a_checkpoint_goes_on(tmp_path, monkeypatch, capsys):
    """With other noise, which it says: figures up to the checkpoint stay, those behind it are close."""
    micro = dict(image_size=32, patch_size=4, channels=(16,), depths=(1,), width=32, depth=1, heads=1, emb_dim=32)
    monkeypatch.setitem(PRESETS, "micro", micro | {"encoder": dict(width=32, depth=1, heads=1, grid=16)})
    draw_web(tmp_path / "web", groups=16, images_per_group=4)
    run = shutil.copytree(STORED / "run", tmp_path / "run")
    before = {name: load_file(run / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "encoder")}
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train(
        TrainConfig(
            data=str(tmp_path / "web" / "train"), out=run, steps=6, preset="micro", batch=8, accumulate=2, warmup=2,
            lr=3e-3, ema=0.9, save_every=3, log_every=1, eval_every=3, sample_every=100, keep=2, workers=0,
            precision="fp32", conditioning="both", held_out=0.2, device="cpu",
        )
    )  # fmt: skip
    now = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in now] == [row["step"] for row in losses] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert now[:4] == losses[:4]
    for was, row in zip(losses[4:], now[4:]):
        for name in ("loss", "held_out_loss", "held_out_loss_shuffled"):
            if name in was:
                assert row[name] == pytest.approx(was[name], rel=0.2)
    assert "noise and crops in another way" in capsys.readouterr().out
    for name, weights in before.items():
        after = load_file(run / name / "diffusion_pytorch_model.safetensors")
        assert after.keys() == weights.keys()
        # three steps of Adam at 3e-3, averaged, each at most the wrong way
        assert max((after[key] - weights[key]).abs().max().item() for key in weights) < 2e-2


def test_shards_and_stored_tokens():
    data = open_data(str(STORED / "shards"), "auto", None, None, str(STORED / "shards.tokens"))
    assert data.describe() == "9 pictures on 3 pages, tokens stored"


def test_names_in_a_run_folder_of_before():
    named = json.loads((STORED / "run" / "model_index.json").read_text())
    assert named["unet"] == ["semantica.uvit", "UViT"] and named["encoder"] == ["semantica.encoder", "ViTEncoder"]
    pipeline = SemanticaPipeline.from_pretrained(STORED / "run")
    weights = load_file(STORED / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in pipeline.unet.state_dict().items())
