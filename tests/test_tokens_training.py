"""Training with stored tokens: the same draws, the same figures as with the encoder, the same run where they moved."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from semantica import PretrainedEncoder, SemanticaPipeline, UserError
from semantica.cli import main
from semantica.condition import Stream
from semantica.train.config import TrainConfig
from semantica.train.data.loading import batches
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Pairs
from semantica.train.loop import train

SIDE = 28


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "tokens"))


def config(home: Path, out: Path, **changes) -> TrainConfig:
    options = dict(
        data=str(home / "photos"), out=out, steps=3, batch=4, warmup=2, precision="fp32", held_out=0.2, log_every=1,
        eval_every=3, sample_every=9, workers=0, device="cpu", encoder=str(home / "dino"), encoder_size=SIDE,
        image_size=16, conditioning="both", ema=0.5,
    )  # fmt: skip
    return TrainConfig(**options | changes)


def test_a_batch_draws_what_it_draws_without_tokens(home, stored):
    options = dict(seed=3, image_size=16, condition_size=SIDE, global_batch=4)
    plain, known = (Pairs(open_data(home / "photos", tokens=t), **options) for t in (None, stored))
    for index in range(12):
        a, b = plain[index], known[index]
        assert "condition" not in b and np.array_equal(a["target"], b["target"]) and a["u"] == b["u"]
        assert a["flips"] == b["flips"] and a["drop"] == b["drop"]
        view = plain.data.draw(3, index).conditions[0]
        assert np.array_equal(b["tokens"][0], known.data.tokens.read(view.ref, view.flip)[0])
    several = Pairs(known.data, **options, conditions=3)
    batch = several.batch(range(4))["condition"]
    views = known.data.draw(3, 2, 3).conditions
    rows = [known.data.tokens.read(view.ref, view.flip) for view in views]
    assert np.array_equal(batch.tokens[2].numpy(), np.concatenate([tokens for tokens, _ in rows]))
    mean = np.mean([pooled.astype(np.float32) for _, pooled in rows], 0)
    np.testing.assert_allclose(batch.pooled[2], mean, rtol=1e-6)


def test_workers_map_the_same_bytes(home, stored):
    pairs = Pairs(open_data(home / "photos", tokens=stored), seed=0, image_size=16, global_batch=4)
    assert pickle.loads(pickle.dumps(pairs.data)).tokens.read("g0/0.png", False)[0].shape == (4, 32)
    feeds = [batches(pairs, first_index=8, batch=4, workers=workers) for workers in (0, 2)]
    for _ in range(3):
        a, b = (next(feed) for feed in feeds)
        assert torch.equal(a["condition"].tokens, b["condition"].tokens) and torch.equal(a["target"], b["target"])
        assert a["condition"].tokens.dtype == torch.float16


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("held_out_loss")) for row in rows]


def test_training_is_the_same_as_with_the_encoder_at_a_fixed_view(home, stored, tmp_path, monkeypatch):
    views = dict(crop="centre", flip=False)
    train(config(home, tmp_path / "plain", **views))

    real = PretrainedEncoder.forward

    def rounded(encoder, images):
        stream = real(encoder, images)
        return Stream(stream.tokens.half().float(), stream.pooled.half().float())

    def absent(encoder, images):
        # only its operations are counted, without values
        assert images.is_meta, "the encoder ran"
        return real(encoder, images)

    for name, forward, tokens in (("rounded", rounded, None), ("stored", absent, str(stored))):
        with monkeypatch.context() as patched:
            patched.setattr(PretrainedEncoder, "forward", forward)
            train(config(home, tmp_path / name, **views, tokens=tokens))
    plain, rounded, known = (np.array(losses(tmp_path / name)) for name in ("plain", "rounded", "stored"))
    # three steps and a held-out loss; the encoder saw batches of another size, then Adam made steps of tiny gradients
    assert len(plain) == len(known) == 4 and np.abs(known - rounded).max() < 2e-5 and np.ptp(plain) > 1e-2
    # the rounding of tokens to 11 bits
    assert 0 < np.abs(known - plain).max() < 1e-3
    weights = [SemanticaPipeline.from_pretrained(tmp_path / name).encoder.state_dict() for name in ("plain", "stored")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.slow
def test_a_run_continues_where_the_tokens_moved_and_refuses_others(home, stored, copy, tmp_path):
    out = tmp_path / "run"
    train(config(home, out, steps=1, tokens=str(stored), held_out=0.0, sample_every=1))
    assert (out / "samples" / "step-00000001.png").exists()
    train(config(home, out, steps=2, tokens=str(copy), held_out=0.0))
    assert len(losses(out)) == 2
    with pytest.raises(UserError, match="changed since"):
        train(config(home, out, steps=3, held_out=0.0))


@pytest.mark.slow
def test_pictures_held_out_elsewhere_are_encoded_once(home, stored, tmp_path):
    shutil.copytree(home / "photos" / "g0", tmp_path / "val" / "a")
    shutil.copytree(home / "photos" / "g1", tmp_path / "val" / "b")
    changes = dict(steps=1, val=str(tmp_path / "val"), crop="centre", flip=False)
    for name, tokens in (("plain", None), ("stored", str(stored))):
        train(config(home, tmp_path / name, **changes, tokens=tokens))
    a, b = (losses(tmp_path / name) for name in ("plain", "stored"))
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_the_encoder_of_a_run_can_be_the_frozen_one(home, small_run, tmp_path):
    out = tmp_path / "tokens"
    options = ["--encoder", small_run, "--encoder-size", 16, "--precision", "fp32", "--processes", 1]
    assert main([str(a) for a in ("pairs", "--tokens", home / "photos", "--out", out, *options)]) == 0
    run = str(small_run)
    changes = dict(encoder=run, encoder_size=None, steps=1, crop="centre", flip=False)
    train(config(home, tmp_path / "plain", **changes))
    train(config(home, tmp_path / "stored", **changes, tokens=str(out)))
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "stored"), atol=1e-4)
    kept = SemanticaPipeline.from_pretrained(tmp_path / "stored").encoder.state_dict()
    original = SemanticaPipeline.from_pretrained(run).encoder.state_dict()
    assert all(torch.equal(original[key], value) for key, value in kept.items())
