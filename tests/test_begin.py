"""What a run begins with and leaves: weights of another run, several averages, models that one process alone holds."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file

from semantica import SemanticaPipeline, UserError
from semantica.train.build import build
from semantica.train.config import TrainConfig, ema_decay
from semantica.train.loop import train
from semantica.train.run import checkpoint


def config(photos, out, **changes) -> TrainConfig:
    options = dict(
        data=str(photos), out=out, steps=2, batch=4, warmup=0, precision="fp32", held_out=0.0, log_every=1,
        sample_every=100, workers=0, device="cpu",
    )  # fmt: skip
    return TrainConfig(**{**options, **changes})


def newest(out: Path) -> Path:
    return checkpoint.folders(out / "checkpoints")[-1]


def weights(out: Path, name: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(out / name / "diffusion_pytorch_model.safetensors")


def distance(a: dict, b: dict) -> float:
    return sum((a[k] - b[k]).square().sum().item() for k in a) ** 0.5


@pytest.fixture(scope="module")
def published(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("published") / "run"
    train(config(photos, out, seed=5, lr=3e-3))
    return out


def test_a_run_begins_with_the_published_weights_of_another(photos, tmp_path, published):
    """All of them, with averages from there on, and a new optimizer; continued, it needs the other no more."""
    source = tmp_path / "source"
    published.rename(source)
    try:
        settings = config(photos, tmp_path / "run", init=str(source), steps=1, lr=1e-9, weight_decay=0.0, save_every=1)
        train(settings)
        for name in ("unet", "encoder"):
            before, after = weights(source, name), weights(tmp_path / "run", name)
            assert before.keys() == after.keys() and distance(before, after) < 1e-5
            assert distance(before, weights_of_seed(settings, name)) > 1
        optimizer = load_file(newest(tmp_path / "run") / "optimizer.safetensors")
        assert {value.item() for key, value in optimizer.items() if key.endswith(".step")} == {1.0}
        source.rename(tmp_path / "gone")
        train(dataclasses.replace(settings, steps=2))
        assert newest(tmp_path / "run").name == "step-00000002"
        with pytest.raises(UserError, match="was made with --init .*source, not None"):
            train(dataclasses.replace(settings, steps=3, init=None))
    finally:
        (tmp_path / "gone").rename(published)


def weights_of_seed(settings: TrainConfig, name: str) -> dict[str, torch.Tensor]:
    unet, encoder, _ = build(settings, torch.device("cpu"))
    return {"unet": unet, "encoder": encoder}[name].state_dict()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(preset="small"), "has a denoiser of image_size 32, this run of 64"),
        (dict(conditioning="both"), "has a denoiser of conditioning tokens, this run of both"),
        (dict(init="/no/such/run"), "/no/such/run"),
    ],
)
def test_another_model_is_refused_before_anything_is_written(photos, tmp_path, published, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        train(config(photos, tmp_path / "run", **{"init": str(published), **changes}))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_averages_of_good_weights_do_not_forget_them(photos, tmp_path):
    given = config(photos, tmp_path, init="somewhere", ema=0.99)
    assert [ema_decay(given, step) for step in (0, 5)] == [0.99, 0.99]
    assert ema_decay(dataclasses.replace(given, init=None), 0) == 0.1
    assert ema_decay(dataclasses.replace(given, init=None), 10**6, 0.5) == 0.5


def test_several_averages_are_kept_continued_and_published(photos, tmp_path):
    """Each is what a run with that decay alone has."""
    common = dict(save_every=1, lr=3e-3)
    straight = config(photos, tmp_path / "straight", ema=0.05, ema_also=(0.9,), **common)
    train(straight)
    train(dataclasses.replace(straight, out=tmp_path / "parts", steps=1))
    train(dataclasses.replace(straight, out=tmp_path / "parts"))
    found = {path.name: load_file(path) for path in newest(tmp_path / "straight").glob("*.safetensors")}
    kinds = ("", "ema_", "ema_0_9_")
    names = {f"{kind}{name}.safetensors" for kind in kinds for name in ("unet", "encoder")}
    assert found.keys() == names | {"optimizer.safetensors"}
    for name, tensors in found.items():
        again = load_file(newest(tmp_path / "parts") / name)
        assert all(torch.equal(again[key], value) for key, value in tensors.items()), name
    train(config(photos, tmp_path / "alone", ema=0.9, **common))
    for kind, place in (("ema_", "."), ("ema_0_9_", "ema-0.9")):
        pipeline = SemanticaPipeline.from_pretrained(tmp_path / "straight" / place)
        for name in ("unet", "encoder"):
            own = getattr(pipeline, name).state_dict()
            assert all(torch.equal(found[f"{kind}{name}.safetensors"][k], value) for k, value in own.items())
            alike = [torch.equal(own[key], value) for key, value in weights(tmp_path / "alone", name).items()]
            assert all(alike) == (kind != "ema_")
    with pytest.raises(UserError, match="made with --ema-also"):
        train(dataclasses.replace(straight, steps=3, ema_also=()))


@pytest.mark.parametrize("also", [(0.9999,), (0.5, 0.5), (1.5,)])
class StandIn:
    """What wandb and trackio both have."""

    def __init__(self):
        self.calls = []

    def init(self, **given):
        self.calls.append(("init", given))
        return self

    def log(self, row, step):
        self.calls.append(("log", step, row))

    def finish(self):
        self.calls.append(("finish",))


def test_a_tracker_gets_the_log_and_continues_its_run(photos, tmp_path, monkeypatch):
    tracker = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setitem(sys.modules, "trackio", None)
    settings = config(photos, tmp_path / "run", track="wandb", steps=1)
    train(settings)
    # in between without it
    train(dataclasses.replace(settings, steps=2, track="none"))
    train(dataclasses.replace(settings, steps=3))
    kinds = [call[0] for call in tracker.calls]
    assert kinds == ["init", "log", "finish"] * 2
    first, second = (call[1] for call in tracker.calls if call[0] == "init")
    assert first["id"] == second["id"] and len(first["id"]) == 8 and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]["batch"]) == ("semantica", "run", 4)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [call[1:] for call in tracker.calls if call[0] == "log"] == [(row.pop("step"), row) for row in rows[::2]]
    with pytest.raises(UserError, match=r"--track trackio needs .*: pip install trackio"):
        train(dataclasses.replace(settings, steps=4, track="trackio"))
    tracker.init = lambda **given: (_ for _ in ()).throw(RuntimeError("no API key\nlong help"))
    with pytest.raises(UserError, match="^--track wandb cannot begin: no API key$"):
        train(config(photos, tmp_path / "other", track="wandb"))
    assert not (tmp_path / "other").exists()


def test_impossible_averages_are_one_line(photos, tmp_path, also):
    with pytest.raises(UserError, match="--ema-also is .*: give other decays than --ema, 0 to 1"):
        config(photos, tmp_path, ema_also=also).check()


def test_one_of_the_processes_holds_values_and_the_others_shapes(photos, tmp_path):
    """Their buffers follow from the configuration; that weights arrive is proved in two processes."""
    settings = config(photos, tmp_path)
    cpu = torch.device("cpu")
    hollow = build(settings, cpu, functools.partial(init_empty_weights, include_buffers=False))
    whole = build(settings, cpu)
    for own, other in zip(whole[:2], hollow[:2]):
        assert all(p.is_meta for p in other.parameters())
        assert {k: v.shape for k, v in own.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
        buffers = dict(own.named_buffers())
        assert buffers and all(torch.equal(buffers[name], value) for name, value in other.named_buffers())
