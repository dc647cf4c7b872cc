"""Figures of edits on drawn pictures: what is right is told from what is not, and the verb writes what it measured."""

import json

import numpy as np
import pytest
import torch

from semantica import SemanticaPipeline, SemanticaScheduler, UserError, UViT, ViTEncoder
from semantica.benchmarks.bench import run
from semantica.benchmarks.quality.edits import figures, mask_of, pairs_of, palette_of
from semantica.benchmarks.quality.web import HELD_OUT_PALETTES
from semantica.editing.pictures import edit_pictures


def test_the_right_picture_scores_fully_and_others_do_not():
    pairs = pairs_of(48, 0)
    # three other palettes for each of the sixteen groups, each palette as often
    assert sorted(pair.palette for pair in pairs) == sorted(HELD_OUT_PALETTES * 12)
    right = figures(np.stack([pair.right for pair in pairs]), pairs)
    assert right["palette"] == 1 and right["distance"] == 0 and right["iou"] > 0.97
    assert sum(pair.alike for pair in pairs) == 16 and right["palette_alike"] == 1 and right["iou_alike"] > 0.97
    source = figures(np.stack([pair.source for pair in pairs]), pairs)
    assert source["palette"] == 0 and source["distance"] > 60
    other = figures(np.stack([pair.other for pair in pairs]), pairs)
    # the right palette elsewhere: places and sizes differ little in a group
    assert other["palette"] == 1 and 0.5 < other["iou"] < 0.9
    moved = [np.roll(pair.right, 8, axis=1) for pair in pairs]
    assert figures(np.stack(moved), pairs)["iou"] < 0.5


def test_masks_and_palettes_are_found_again():
    for pair in pairs_of(16, 1):
        assert palette_of(pair.right) == palette_of(pair.other) == pair.palette != palette_of(pair.source)
        assert 0.05 < mask_of(pair.right, pair.palette).mean() < 0.6
        # noise of edits does not hide them
        noisy = pair.right + np.random.default_rng(0).normal(0, 25, pair.right.shape)
        assert palette_of(noisy) == pair.palette


def test_the_verb_measures_a_run(tmp_path, small_run, capsys, monkeypatch):
    torch.manual_seed(0)
    encoder = ViTEncoder(image_size=32, patch_size=8, width=32, depth=1, heads=2)
    unet = UViT(image_size=32, patch_size=4, channels=(8,), depths=(1,), width=32, depth=2, heads=2, emb_dim=8,
                streams={"image": encoder.token_dim})  # fmt: skip
    SemanticaPipeline(unet, encoder, SemanticaScheduler(32, reference=16)).save_pretrained(tmp_path / "run")
    out = ["--json", tmp_path / "e.json", "--html", tmp_path / "e.html"]
    given = ["--model", tmp_path / "run", "--pairs", 2, "--iterations", 2, "--w-cut", 3, 30, *out]
    assert run([str(part) for part in ("edits", *given)]) == 0
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [row["method"] for row in rows][3:] == ["sds", "dds", "cds", "cds"] and rows[-1]["w_cut"] == "30"
    assert (tmp_path / "e.html").read_text().count("<img") == len(rows) and "palette matches" in capsys.readouterr().out
    calls = iter([edit_pictures])
    # the second setting is interrupted
    monkeypatch.setattr("semantica.editing.pictures.edit_pictures", lambda *given: next(calls)(*given))
    given[-3] = tmp_path / "begun.json"
    with pytest.raises(StopIteration):
        run([str(part) for part in ("edits", *given)])
    assert json.loads((tmp_path / "begun.json").read_text())["rows"] == rows[:4]
    for wrong, message in (
        (["--model", small_run], "no run of drawn pictures of 32 pixels"),
        (["--model", tmp_path / "run", "--pairs", 1], "give at least 2 pairs"),
        (["--model", tmp_path / "run", "--w-cut", -1], "w_cut is -1.0"),
    ):
        with pytest.raises(UserError, match=message):
            run([str(part) for part in ("edits", *wrong)])
