"""The trainer: exact resume, what it writes, what it refuses."""

import builtins
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from semantica import SemanticaPipeline, UserError
from semantica.train.config import TrainConfig, ema_decay, learning_rate
from semantica.train.data.folders import scan
from semantica.train.data.heldout import contrasted, held_out_batches, partners
from semantica.train.data.pairs import Pairs
from semantica.train.loop import train
from semantica.train.objective import Objective
from semantica.train.processes import World
from semantica.train.run import checkpoint
from semantica.train.run.measure import Measure


def config(photos, out, **changes) -> TrainConfig:
    options = dict(
        data=photos, out=out, steps=4, batch=4, accumulate=2, warmup=2, precision="fp32", held_out=0.2,
        log_every=2, save_every=2, eval_every=4, sample_every=6, workers=0, device="cpu",
    )  # fmt: skip
    return TrainConfig(**{**options, **changes})


def newest(out: Path) -> Path:
    return checkpoint.folders(out / "checkpoints")[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def rows(out: Path) -> list[dict]:
    timing = {"images_per_s", "data_wait", "peak_memory_bytes", "mfu", "peak_flops"}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    train(config(photos, out, steps=6))
    return out


def test_a_run_folder_is_complete_and_samples(straight):
    names = {p.name for p in straight.iterdir()}
    expected = {
        "config.json",
        "metrics.jsonl",
        "model_index.json",
        "unet",
        "encoder",
        "scheduler",
        "checkpoints",
        "samples",
    }
    assert expected <= names and not [n for n in names if n.startswith(".")]
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    pipeline = SemanticaPipeline.from_pretrained(straight)
    pipeline.set_progress_bar_config(disable=True)
    ema = load_file(newest(straight) / "ema_unet.safetensors")
    assert all(torch.equal(ema[k], v) for k, v in pipeline.unet.state_dict().items())
    assert pipeline(Image.new("RGB", (40, 30)), num_inference_steps=2).images[0].size == (32, 32)
    with Image.open(straight / "samples" / "step-00000006.png") as grid:
        assert grid.width > grid.height / 6
    row = rows(straight)[0]
    assert row["step"] == 2 and row["loss"] > 0 and row["grad_norm"] > 0 and row["lr"] == 3e-4
    record = json.loads((straight / "config.json").read_text())
    assert record["train"]["preset"] == "tiny" and record["train"]["seed"] == 0 and record["data_digest"]


def test_weights_and_their_average_follow_the_definition(photos, tmp_path):
    """Two steps of the trainer against a plain loop written here."""
    settings = config(photos, tmp_path / "run", steps=2, accumulate=1, held_out=0.0, drop=0.0)
    train(settings)
    from semantica.diffusion import noise_levels
    from semantica.train.build import build

    unet, encoder, scheduler = build(settings, torch.device("cpu"))
    unet.set_attention_backend("_native_math")
    encoder.set_attention_backend("_native_math")
    named = {f"{n}.{k}": p for n, m in (("unet", unet), ("encoder", encoder)) for k, p in m.named_parameters()}
    mean = {k: p.detach().clone() for k, p in named.items()}
    groups = [[p for p in named.values() if p.ndim > 1], [p for p in named.values() if p.ndim <= 1]]
    adam = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    pairs = Pairs(scan(photos, "folders"), seed=0, image_size=32, global_batch=4, drop=0.0)
    objective = Objective(unet, encoder)
    for step in range(2):
        batch = pairs.batch(range(step * 4, step * 4 + 4))
        logsnr = noise_levels(batch["u"], scheduler.schedule)
        objective(batch["condition"], batch["target"], batch["noise"], logsnr, batch["drop"])[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        for group in adam.param_groups:
            group["lr"] = 3e-4 * (step + 1) / 2
        adam.step()
        adam.zero_grad()
        decay = (1 + step) / (10 + step)
        mean = {k: decay * mean[k] + (1 - decay) * p.detach() for k, p in named.items()}
    for name in ("unet", "encoder"):
        saved, averaged = (load_file(newest(tmp_path / "run") / f"{p}{name}.safetensors") for p in ("", "ema_"))
        for key, value in saved.items():
            torch.testing.assert_close(value, named[f"{name}.{key}"].detach(), rtol=0, atol=1e-6)
            torch.testing.assert_close(averaged[key], mean[f"{name}.{key}"], rtol=0, atol=1e-6)


def test_accumulation_does_not_change_the_batch(photos, tmp_path, straight):
    train(config(photos, tmp_path / "run", steps=6, accumulate=1))
    whole, parts = (load_file(newest(out) / "unet.safetensors") for out in (tmp_path / "run", straight))
    # the same samples and gradients, summed in another order; Adam turns rounding near zero into steps of lr
    difference = max((whole[k] - parts[k]).abs().mean().item() for k in whole)
    assert difference < 2e-5


def test_killed_and_continued_is_bit_equal(photos, tmp_path, straight):
    """SIGKILL in a later step; the same command goes on from the checkpoint and ends the same."""
    out = tmp_path / "run"
    given = {**config(photos, out, steps=6, workers=1).record()}
    names = (
        "data",
        "out",
        "steps",
        "batch",
        "accumulate",
        "warmup",
        "precision",
        "held-out",
        "log-every",
        "save-every",
    )
    names += ("eval-every", "sample-every", "workers", "device")
    options = [f"--{name}={given[name.replace('-', '_')]}" for name in names]
    command = [sys.executable, "-P", "-m", "semantica.cli", "train", *options]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 100
        while not checkpoint.folders(out / "checkpoints") and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert checkpoint.folders(out / "checkpoints"), "no checkpoint was written"
    assert not (out / "model_index.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"continuing from step (2|4)", done.stdout + done.stderr)
    for name in ("unet", "encoder", "ema_unet", "ema_encoder", "optimizer"):
        a, b = (load_file(newest(o) / f"{name}.safetensors") for o in (out, straight))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert rows(out) == rows(straight)
    grids = [(o / "samples" / "step-00000006.png").read_bytes() for o in (out, straight)]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "state"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(photos, tmp_path, straight, capsys, damage):
    out = tmp_path / "run"
    train(config(photos, out, steps=4))
    file = newest(out) / ("state.json" if damage == "state" else "ema_unet.safetensors")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes(flipped if damage == "flip" else content[:middle])
    train(config(photos, out, steps=6))
    said = capsys.readouterr().out
    assert "step-00000004 is damaged" in said and "continuing from step 2" in said
    a, b = (load_file(newest(o) / "unet.safetensors") for o in (out, straight))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_checkpoints_that_must_not_be_read(photos, tmp_path):
    out = tmp_path / "run"
    train(config(photos, out, steps=2))
    folder = newest(out)
    (folder / "unet.pt").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(UserError, match="unet.pt is refused unopened"):
        train(config(photos, out, steps=4))
    (folder / "unet.pt").unlink()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="checkpoint format 99"):
        train(config(photos, out, steps=4))
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match="every checkpoint .* is damaged"):
        train(config(photos, out, steps=4))


def test_another_configuration_data_or_folder_is_refused(photos, tmp_path):
    out = tmp_path / "run"
    train(config(photos, out, steps=2))
    before = contents(newest(out))
    for changes, message in (
        (dict(lr=1e-3), "made with --lr 0.0003, not 0.001"),
        (dict(batch=8), "made with --batch 4, not 8"),
        (dict(preset="small"), "made with --preset tiny, not small"),
        (dict(seed=1), "made with --seed 0, not 1"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(photos, out, **changes))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a run folder"):
        train(config(photos, taken))
    assert [p.name for p in taken.iterdir()] == ["thesis.txt"] and contents(newest(out)) == before
    record = json.loads((out / "config.json").read_text())
    # of runs with another share of what they never dropped, which was no mistake once
    record["train"]["drop_picture"] = 0.3
    for tokens, what in ((None, "pictures"), ("elsewhere", "pictures or tokens")):
        record["train"]["tokens"] = tokens
        (out / "config.json").write_text(json.dumps({**record, "data_digest": "0" * 16}))
        with pytest.raises(UserError, match=f"^the {what} of .* changed since"):
            train(config(photos, out, steps=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "--steps is 0"),
        (dict(steps=-5), "--steps is -5"),
        (dict(batch=5), "--batch 5 cannot be split"),
        (dict(image_size=40), "image size 40 does not fit preset 'tiny'"),
        (dict(preset="huge"), "preset 'huge' is unknown"),
        (dict(device="abacus"), "device 'abacus' cannot be used"),
        (dict(device="cuda:7"), "device 'cuda:7' cannot be used"),
        (dict(attention="flash"), "attention backend 'flash' cannot run"),
        (dict(drop=1.5), "--drop is 1.5"),
        (dict(lr=0.0), "--lr is 0.0"),
        (dict(lr=float("nan")), "--lr is nan"),
        (dict(scales=(5,)), "--scales 5"),
        (dict(encoder="/no/such/encoder"), "encoder '/no/such/encoder' cannot be loaded"),
        (dict(encoder_size=64), "--encoder-size is for frozen encoders"),
        (dict(encoder_tokens="all"), "--encoder-tokens is for frozen encoders"),
        (dict(seed=1 << 32), "--seed is 4294967296: give less than 4294967296"),
        (dict(betas=(0.9, 1.0)), "--betas is 0.9 1.0"),
        (dict(graph=True, checkpointing=True), "--graph records no blocks that are computed again"),
        (dict(held_out=0.99), "cannot hold out 6 of 6"),
        (dict(channels=(16, -4)), "--channels is 16 -4: give at least 1"),
        (dict(depths=(-1,)), "--depths is -1: give at least 0"),
        (dict(width=0), "--width is 0: give at least 1"),
        (dict(patch_size=-2), "--patch-size is -2: give at least 1"),
        (dict(depth=-1), "--depth is -1: give at least 1"),
        (dict(weight_decay=float("nan")), "--weight-decay is nan: give a finite number"),
        (dict(lr=float("inf")), "--lr is inf: give a finite number"),
        (dict(compile_scope="network"), "--compile-scope network is nothing without --compile"),
        (dict(drop_picture=0.2), "--drop-picture is for pictures and texts: leave it out, or give --condition-on both"),
        (dict(drop_text=0.0, condition_on="text"), "--drop-text is for pictures and texts"),
        (dict(align=0.1, accumulate=4), "--batch 4 in --accumulate 4 parts leaves one in each"),
    ],
)
def test_impossible_options_write_nothing(photos, tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        train(config(photos, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(photos, tmp_path):
    settings = config(photos, tmp_path / "run")
    measure = Measure(settings, torch.device("cpu"), torch.float32, 10**9, World())
    measure.start()
    measure.step(torch.tensor(1.0), torch.tensor(2.0))
    measure.check()
    measure.step(torch.tensor(1.0), torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="nothing was saved since"):
        measure.row(2, 1e-4)
    with pytest.raises(FloatingPointError):
        train(config(photos, tmp_path / "run", lr=1e30, clip=1e30, warmup=0, steps=40, log_every=1))
    assert all(s < 40 for s in (int(p.name[5:]) for p in checkpoint.folders(tmp_path / "run" / "checkpoints")))
    for folder in checkpoint.folders(tmp_path / "run" / "checkpoints"):
        assert all(v.isfinite().all() for v in load_file(folder / "unet.safetensors").values())


@pytest.mark.parametrize(
    ("name", "saved"),
    [(".config.json", 2), ("metrics.jsonl", 2), ("bad_samples", 2), ("samples/", 4), ("unet/config.json", 4)],
)
def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(photos, tmp_path, monkeypatch, name, saved):
    def no_space(function):
        def call(path, mode="r", *arguments, **more):
            if mode != "r" and name in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return function(path, mode, *arguments, **more)

        return call

    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "g0" / "broken.jpg").write_text("no picture")
    settings = config(tmp_path / "data", tmp_path / "run", log_every=4, sample_every=4)
    train(dataclasses.replace(settings, steps=2))
    (tmp_path / "run" / "bad_samples.jsonl").unlink()
    with monkeypatch.context() as patched, pytest.raises(UserError, match="(?i)no space left") as caught:
        for owner in (builtins, io):
            patched.setattr(owner, "open", no_space(open))
        train(settings)
    assert "\n" not in str(caught.value) and newest(tmp_path / "run").name == f"step-{saved:08d}"
    train(settings)
    assert SemanticaPipeline.from_pretrained(tmp_path / "run") and newest(tmp_path / "run").name == "step-00000004"


def test_bad_pictures_are_named_counted_and_left_out(photos, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    shutil.copytree(photos / "g0", data / "lonely", ignore=lambda _, names: sorted(names)[1:])
    (data / "g0" / "broken.jpg").write_text("no picture")
    Image.new("RGB", (1, 1)).save(data / "g1" / "dot.png")
    train(config(data, tmp_path / "run", steps=2))
    assert "1 groups of one picture are left out, the first is 'lonely'; train with" in capsys.readouterr().out
    named = tmp_path / "run" / "bad_samples.jsonl"
    bad = [json.loads(line) for line in named.read_text().splitlines()]
    assert [b["path"] for b in bad] == ["g0/broken.jpg", "g1/dot.png"] and all(b["reason"] for b in bad)
    # as a crash leaves it: none is named twice, and what is cut is named again
    text = named.read_text()
    for steps, cut in ((4, text + '{"pa'), (6, text[:-9]), (8, "\0\0\n" + text)):
        named.write_text(cut)
        train(config(data, tmp_path / "run", steps=steps))
        assert named.read_text().lstrip("\0\n") == text


def test_reconstruct_mode_and_a_frozen_encoder(photos, tmp_path):
    import transformers

    torch.manual_seed(0)
    tower = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(tower).save_pretrained(tmp_path / "dino")
    out = tmp_path / "run"
    train(
        config(
            photos,
            out,
            steps=2,
            mode="reconstruct",
            encoder=str(tmp_path / "dino"),
            encoder_size=28,
            conditioning="both",
        )
    )
    names = {p.name for p in newest(out).iterdir()}
    assert names == {"unet.safetensors", "ema_unet.safetensors", "optimizer.safetensors", "state.json"}
    pipeline = SemanticaPipeline.from_pretrained(out)
    original = transformers.Dinov2Model.from_pretrained(tmp_path / "dino").state_dict()
    assert all(torch.equal(original[k], v) for k, v in pipeline.encoder.tower.state_dict().items())


def test_schedules_are_functions_of_the_step(photos, tmp_path):
    settings = config(photos, tmp_path, steps=100, warmup=10, decay=0.5, lr=1.0, ema=0.9)
    assert [learning_rate(settings, s) for s in (0, 4, 9, 10, 50, 75, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.02]
    assert ema_decay(settings, 0) == 0.1 and ema_decay(settings, 8) == 0.5 and ema_decay(settings, 1000) == 0.9


def test_held_out_batches_pair_each_sample_with_another_group(photos, tmp_path):
    assert partners(["a", "a", "b", "c"]).tolist() == [2, 2, 3, 0]
    assert partners(["a", "a"]).tolist() == [0, 1]
    assert contrasted([{"group": ["a", "a"]}, {"group": ["a", "b"]}]) and not contrasted([{"group": ["a", "a"]}])
    data = scan(photos, "folders")
    found = held_out_batches(data, 0, 32, 32, torch.device("cpu"))
    assert sum(len(b["u"]) for b in found) == len(data) == 24
    for batch in found:
        assert all(batch["group"][i] != batch["group"][j] for i, j in enumerate(batch["other"].tolist()))
        assert not batch["drop"].any()
    # one picture that is its own condition, twice
    alone = scan(photos, "reconstruct").keep({"g0": ("g0/0.png",)})
    assert not contrasted(held_out_batches(alone, 0, 32, 32, torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(conditioning="both", align=0.1),
        dict(conditions=2, scales=(16, 32), checkpointing=True, checkpointing_keeps="products"),
        dict(encoder="dinov2", encoder_size=28, repa=0.5),
    ],
    ids=str,
)
def test_a_run_compiled_as_one_graph_is_the_same_run(photos, tmp_path, save_tower, changes):
    if "encoder" in changes:
        save_tower(tmp_path / "tower", changes["encoder"])
        changes = {**changes, "encoder": str(tmp_path / "tower")}
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for name, scope in (("eager", {}), ("compiled", dict(compile=True, compile_scope="network"))):
        assert counters["stats"]["unique_graphs"] == 0
        train(config(photos, tmp_path / name, accumulate=1, **changes, **scope))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    eager, compiled = (
        [{k: v for k, v in row.items() if not isinstance(v, str)} for row in rows(tmp_path / name)]
        for name in ("eager", "compiled")
    )
    assert [a.keys() for a in eager] == [b.keys() for b in compiled]
    for a, b in zip(eager, compiled):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_training_step_compiles_whole_and_once(photos):
    """fullgraph, gradients as in eager, one graph for several batch sizes."""
    from semantica.train.build import build

    unet, encoder, _ = build(config(photos, photos), torch.device("cpu"))
    objective = Objective(unet, encoder)
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(objective, fullgraph=True, backend=backend, dynamic=None)

    def batch(size):
        g = torch.Generator().manual_seed(size)
        images = [torch.randn(size, 3, 32, 32, generator=g) for _ in range(3)]
        tensors = [*images, torch.randn(size, generator=g), torch.zeros(size, dtype=torch.bool)]
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        return tensors

    for size in (4, 4, 6, 3):
        tensors = batch(size)
        torch.testing.assert_close(compiled(*tensors)[0], objective(*tensors)[0], rtol=1e-4, atol=1e-5)
    assert len(frames) == 1
    compiled(*tensors)[0].mean().backward()
    actual = {k: p.grad.clone() for k, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    objective(*tensors)[0].mean().backward()
    for key, p in objective.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(actual[key], p.grad, rtol=1e-3, atol=1e-6)
