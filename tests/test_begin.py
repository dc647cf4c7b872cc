"""What a run begins with and leaves: weights of another run, several averages, models that one process alone holds."""

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file

from semantica import SemanticaPipeline, UserError
from semantica.model.conditioner import Conditioner
from semantica.model.uvit import UViT
from semantica.model.words import WordEncoder
from semantica.pipelines.networks import NetworkPipeline
from semantica.train import loop, setup
from semantica.train.build import begin_with, build
from semantica.train.config import TrainConfig, ema_decay
from semantica.train.data.folders import scan
from semantica.train.data.heldout import held_out_batches
from semantica.train.loop import train
from semantica.train.preemption import Stop
from semantica.train.processes import World
from semantica.train.run import checkpoint
from semantica.train.run.folder import Run


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


def test_a_run_whose_texts_have_no_encoder_of_their_own_is_told_so(monkeypatch):
    """As networks that were put together by hand, whose one encoder fills every stream."""
    words = WordEncoder.learn(["a red ring"])
    unet = UViT(image_size=8, channels=(8,), depths=(1,), width=16, depth=1, heads=1, streams={"text": words.token_dim})
    found = SimpleNamespace(unet=unet, encoder=words)
    monkeypatch.setattr(NetworkPipeline, "load", lambda source: found)
    with pytest.raises(UserError, match="reads texts by another WordEncoder than this run: give --text-encoder x"):
        begin_with("x", unet, Conditioner({"text": words}))


def test_whether_a_run_goes_on_is_what_the_first_process_sees(photos, tmp_path, monkeypatch):
    """A file system may show the checkpoints to another one later, which then must not look for --init."""

    def reached(*_):
        raise InterruptedError

    monkeypatch.setattr(World, "from_main", lambda self, work: True)
    monkeypatch.setattr(setup, "alignment", reached)
    with pytest.raises(InterruptedError):
        train(config(photos, tmp_path / "run", init="/no/such/run"))


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


def test_a_run_that_saved_nothing_binds_to_nothing(photos, tmp_path, monkeypatch):
    """A GPU that was full at the first step asks for a smaller batch: the same folder has to take it."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / "g0" / "broken.jpg").write_text("no picture")
    settings = config(data, tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(UserError, match="the GPU's memory is full"):
        patched.setattr(loop, "backward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
        train(settings)
    assert (tmp_path / "run" / "config.json").is_file()
    train(dataclasses.replace(settings, data=str(photos), batch=2, steps=1))
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["train"]["batch"] == 2 and not (tmp_path / "run" / "bad_samples.jsonl").exists()
    with pytest.raises(UserError, match="was made with --batch 2, not 4"):
        train(dataclasses.replace(settings, data=str(photos)))


def test_a_model_without_checkpoints_is_not_trained_over(photos, tmp_path, published):
    """The same command would begin at step 0, forget the log, and replace the model in the end."""
    out = shutil.copytree(published, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    settings = config(photos, out, seed=5, lr=3e-3, steps=3)
    with pytest.raises(UserError, match="run has a model and no checkpoint to go on from: .* --init .*run to begin"):
        train(settings)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    train(dataclasses.replace(settings, out=tmp_path / "more", init=str(out), steps=1))


def test_frozen_encoders_are_those_that_the_run_was_made_with(photos, tmp_path, save_tower):
    """No checkpoint has their weights: what lies under a name may have changed since."""
    for name in ("seen", "aligned"):
        save_tower(tmp_path / name, "dinov2")
    settings = config(
        photos, tmp_path / "run", steps=1, encoder=str(tmp_path / "seen"), encoder_size=28, repa=0.5,
        repa_encoder=str(tmp_path / "aligned"),
    )  # fmt: skip
    train(settings)
    for name, option in (("seen", "encoder"), ("aligned", "repa-encoder")):
        path = tmp_path / name / "model.safetensors"
        before = path.read_bytes()
        save_file({key: value + 1 for key, value in load_file(path).items()}, path, {"format": "pt"})
        with pytest.raises(UserError, match=f"the weights of --{option} .*{name} changed since .*: choose another"):
            train(dataclasses.replace(settings, steps=2))
        path.write_bytes(before)
        # the same weights of other pictures
        said = tmp_path / name / "preprocessor_config.json"
        kept = said.read_text() if said.exists() else None
        said.write_text(json.dumps({"size": {"shortest_edge": 56}, "crop_size": 28, "image_std": [0.5, 0.5, 0.5]}))
        with pytest.raises(UserError, match=f"how pictures are prepared for --{option} .*{name} changed since .*run"):
            train(dataclasses.replace(settings, steps=2))
        said.write_text(kept) if kept else said.unlink()
    # one from before runs knew their encoders goes on
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["encoders"].keys() == {"encoder", "repa_encoder"}
    (tmp_path / "run" / "config.json").write_text(json.dumps({k: v for k, v in record.items() if k != "encoders"}))
    train(dataclasses.replace(settings, steps=2))


def test_tensorboard_shows_each_step_once(photos, tmp_path):
    """A run goes on from a checkpoint, behind which the start before had logged."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = config(photos, tmp_path / "run", steps=3, save_every=1, keep=3)
    train(settings)
    for folder in checkpoint.folders(tmp_path / "run" / "checkpoints")[1:]:
        shutil.rmtree(folder)
    train(settings)
    # whole once the run is over, though this process goes on
    shown = accumulator.EventAccumulator(str(tmp_path / "run" / "logs"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3]


def test_pictures_held_out_that_prove_broken_are_named(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "val")
    whole = (photos / "g1" / "2.png").read_bytes()
    # its header is sound
    (tmp_path / "val" / "g1" / "2.png").write_bytes(whole[: len(whole) // 2])
    train(config(photos, tmp_path / "run", steps=1, val=str(tmp_path / "val")))
    (line,) = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "g1/2.png"


def test_what_is_found_bad_is_written_down_before_its_step_is_saved(photos, tmp_path):
    """A run that goes on from there does not see those samples again."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for path in sorted(data.glob("*/0.png")):
        # whole as far as its header goes
        path.write_bytes(path.read_bytes()[:1500])
    steps = iter(range(1, 9))

    class Third(Stop):
        def __call__(self) -> bool:
            return next(steps) == 3

    train(config(data, tmp_path / "run", steps=8, log_every=100, save_every=100, held_out=0.0), Third())
    named = [json.loads(line)["path"] for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(named) > 1 and {path.split("/")[1] for path in named} == {"0.png"}
    assert newest(tmp_path / "run").name == "step-00000003" and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_held_out_samples_are_of_the_groups_that_they_show(photos, tmp_path):
    """Also where a whole group proves broken, and others take its place."""
    found = held_out_batches(scan(photos, "folders"), 0, 32, 32, torch.device("cpu"))
    seen = [(group, target.mean((1, 2))) for b in found for group, target in zip(b["group"], b["target"])]
    colours = {name: torch.stack([mean for group, mean in seen if group == name]).mean(0) for name, _ in seen}
    shutil.copytree(photos, tmp_path / "val")
    for path in (tmp_path / "val" / "g0").iterdir():
        path.write_bytes(path.read_bytes()[:1500])
    (batch,) = held_out_batches(scan(tmp_path / "val", "folders"), 0, 32, 32, torch.device("cpu"))
    nearest = [min(colours, key=lambda g: (colours[g] - t.mean((1, 2))).abs().sum()) for t in batch["target"]]
    assert batch["group"] == nearest and len({*nearest}) == 5


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


@pytest.mark.parametrize("also", [(0.9999,), (0.5, 0.5), (1.5,)])
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


def test_a_tracker_that_fails_costs_the_tracking_and_not_the_run(tmp_path, capsys):
    run = Run(config(tmp_path, tmp_path / "run"), "", World())
    run.tracked = StandIn()
    run.tracked.log = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route\nto host"))
    for step in (1, 2):
        run.log({"step": step})
    run.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "--track" in line]
    assert lines == ["--track none fails (no route): no more is sent there, metrics.jsonl goes on"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
