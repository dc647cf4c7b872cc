"""Training on a GPU: what is proved elsewhere with stand-ins, on the real thing. Skipped where there is none."""

import dataclasses
import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from semantica.benchmarks.quality.web import draw_web
from semantica.benchmarks.training.worker import Trainer
from semantica.model.float8 import CAPABILITY
from semantica.train.config import TrainConfig
from semantica.train.loop import backward, inputs, train
from semantica.train.processes import joined
from semantica.train.repeatable import SIZES, WORKSPACE
from semantica.train.run import checkpoint
from semantica.train.setup import prepare

DEVICE = "cuda"
# read once, when CUDA starts, which may be in a test of another file
os.environ.setdefault(WORKSPACE, SIZES[0])
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def config(photos, out, **changes) -> TrainConfig:
    options = dict(
        data=str(photos), out=out, steps=4, batch=8, accumulate=2, warmup=0, held_out=0.0, log_every=1, save_every=2,
        sample_every=100, workers=0, device=DEVICE,
    )  # fmt: skip
    return TrainConfig(**{**options, **changes})


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_continued_run_has_the_same_bits_with_deterministic(photos, tmp_path):
    settings = config(photos, tmp_path / "straight", deterministic=True, align=0.1)
    train(settings)
    train(dataclasses.replace(settings, out=tmp_path / "parts", steps=2))
    train(dataclasses.replace(settings, out=tmp_path / "parts"))
    straight, parts = (checkpoint.folders(tmp_path / n / "checkpoints")[-1] for n in ("straight", "parts"))
    for path in straight.glob("*.safetensors"):
        a, b = load_file(path), load_file(parts / path.name)
        assert all(torch.equal(a[key], value) for key, value in b.items()), path.name


def test_a_recorded_run_is_the_run(photos, tmp_path):
    settings = config(photos, tmp_path / "called", precision="fp32", deterministic=True)
    train(settings)
    train(dataclasses.replace(settings, out=tmp_path / "recorded", graph=True))
    assert losses(tmp_path / "recorded") == pytest.approx(losses(tmp_path / "called"), rel=1e-4)


def test_no_step_waits_for_the_device(photos, tmp_path):
    settings = config(photos, tmp_path / "run", align=0.1)
    with joined(settings) as world, ExitStack() as opened:
        t = prepare(settings, world, opened)
        given = next(t.feed)
        for _ in range(2):
            backward(t, *inputs(t, given))
            t.state.update()
        torch.cuda.set_sync_debug_mode("error")
        try:
            t.measure.start()
            loss, _ = backward(t, *inputs(t, given))
            t.measure.step(loss, t.state.update())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        t.feed.close()
    # anything that waited has raised; and a step was made
    assert torch.isfinite(loss)


def test_a_parked_contender_leaves_the_device(tmp_path):
    draw_web(tmp_path / "web", groups=4, images_per_group=4)
    for rung in ("plain", "+ recorded"):
        trainer = Trainer()
        trainer.build(rung, str(tmp_path / "web" / "train"), "tiny", 2, DEVICE, 0)
        trainer.steps(2)
        # tables of positions, noise levels and what libraries keep
        assert trainer.park()["parked_bytes"] < 64 << 20
        trainer.wake()
        assert all(loss == loss for loss in trainer.steps(2)["losses"])
        del trainer


def test_float8_trains_close_to_bf16(photos, tmp_path):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("this GPU multiplies no float8")
    settings = config(photos, tmp_path / "bf16", precision="bf16", compile=True)
    train(settings)
    train(dataclasses.replace(settings, out=tmp_path / "float8", float8=True))
    assert losses(tmp_path / "float8") == pytest.approx(losses(tmp_path / "bf16"), rel=5e-2)


def test_fp16_trains_close_to_fp32(photos, tmp_path):
    for precision in ("fp32", "fp16"):
        train(config(photos, tmp_path / precision, precision=precision))
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
