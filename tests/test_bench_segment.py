"""Figures of segmentation on drawn scenes: the score is what it says, nothing leaks, and the verb writes it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from semantica import UserError
from semantica.benchmarks.bench import run
from semantica.benchmarks.quality.labelled import (
    EVERY,
    KNOWN,
    SEEN,
    UNSEEN,
    draw_labelled,
    held_out,
    intersections,
    labels_of,
    large,
)
from semantica.benchmarks.quality.segment import figures


def test_intersection_over_union_is_counted_by_pixels():
    rng = np.random.default_rng(0)
    found, right = rng.integers(-1, 4, (3, 8, 8)), rng.integers(0, 3, (3, 8, 8))
    made = intersections(found, right, 5)
    for number in range(4):
        a, b = found == number, right == number
        assert made[number] == pytest.approx((a & b).sum() / (a | b).sum(), rel=1e-12)
    assert np.isnan(made[4])


def test_scores_tell_seen_from_unseen():
    _, right = held_out(0, 24)
    perfect = figures(right, right)
    assert perfect["seen"] == perfect["unseen"] == perfect["grounds"] == perfect["right"] == perfect["ratio"] == 1
    # what knows no unseen crossing calls it by another name
    blind = np.where(right >= len(KNOWN), 0, right)
    scored = figures(blind, right)
    assert scored["unseen"] == 0 and 0.8 < scored["seen"] < 1 and scored["grounds"] == 1


def test_training_never_shows_an_unseen_crossing(tmp_path):
    draw_labelled(tmp_path / "data", 3, 40)
    masks = [np.array(Image.open(path)) for path in sorted((tmp_path / "data/masks").iterdir())]
    assert len(masks) == 40 and max(mask.max() for mask in masks) < len(KNOWN)
    assert json.loads((tmp_path / "data/classes.json").read_text()) == list(KNOWN)
    assert len(EVERY) == len(SEEN) + 4 + len(UNSEEN) == 28 and not set(SEEN) & set(UNSEEN)
    _, right = held_out(3, 12)
    # each of the second half shows one
    assert right[:12].max() < len(KNOWN) and all(labels.max() >= len(KNOWN) for labels in right[12:])
    assert (labels_of("val", 3, large("val", 3, 0, 6)[5]) == right[17]).all()
    with pytest.raises(UserError, match="holds other pictures"):
        draw_labelled(tmp_path / "data", 4, 40)


@pytest.mark.slow
def test_the_verb_measures(tmp_path, capsys):
    given = ["--out", tmp_path / "out", "--pictures", 8, "--held-out", 4, "--tower-steps", 2, "--steps", 2]
    given += ["--batch", 2, "--json", tmp_path / "s.json", "--html", tmp_path / "s.html"]
    with torch.random.fork_rng():
        assert run(["segment", *map(str, given)]) == 0
    stored = json.loads((tmp_path / "s.json").read_text())
    assert [row["method"] for row in stored["rows"]][-1] == "CAT-Seg" and len(stored["rows"]) == 3
    assert all(0 <= row[name] <= 1 for row in stored["rows"] for name in ("seen", "unseen", "grounds", "right"))
    assert (tmp_path / "s.html").read_text().count("<img") == 2
    assert "mIoU, unseen crossings" in capsys.readouterr().out
    with pytest.raises(UserError, match="--steps is 0"):
        run(["segment", "--out", str(tmp_path / "out"), "--steps", "0"])
