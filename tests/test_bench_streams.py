"""`semantica bench streams`: drawn crossings and who recognises them, the baselines, and what is refused."""

import functools
import json

import numpy as np
import pytest

from semantica.benchmarks.quality import streams
from semantica.benchmarks.quality.crossings import (
    CHOSEN,
    EVERY,
    TEXTURES,
    Crossing,
    draw,
    draw_crossings,
    recognise,
    shares,
    trials,
)
from semantica.benchmarks.quality.scenes import SHAPES
from semantica.benchmarks.quality.web import philox
from semantica.cli import main
from semantica.errors import UserError
from semantica.words import split_words


def test_every_attribute_of_a_drawn_crossing_is_recognised():
    chosen = [EVERY[int(i)] for i in philox(0, 1).permutation(len(EVERY))[:72]]
    assert [recognise(draw(crossing, philox(1, i))) for i, crossing in enumerate(chosen)] == chosen
    # nothing there, and other things than asked for
    empty = np.full((32, 32, 3), (30, 52, 172), np.uint8)
    assert recognise(empty) == Crossing("", "plain", "night", 0, "")
    found, wanted = Crossing("ring", "dots", "rose", 1, "top"), Crossing("ring", "plain", "rose", 1, "left")
    figures = shares([found, wanted], [wanted, wanted])
    assert figures == dict(shape=1, texture=0.5, palette=1, count=1, place=0.5, identity=0.5, text=0.5)


def test_texts_name_no_identity_and_held_out_crossings_are_new():
    assert not any({*split_words(crossing.caption)} & {*SHAPES, *TEXTURES} for crossing in EVERY)
    assert len({crossing.caption for crossing in EVERY}) == len(CHOSEN) * 12
    held = [crossing for crossing in EVERY if crossing.held_out]
    assert len(held) * 4 == len(EVERY) and {c.shape for c in held} == {*SHAPES}
    assert {c.palette for c in EVERY if not c.held_out} == {*CHOSEN}
    for condition, target in trials(96, 0):
        assert target.held_out and not condition.held_out
        assert (condition.shape, condition.texture) == (target.shape, target.texture)
        assert all(getattr(condition, name) != getattr(target, name) for name in ("palette", "count", "place"))


def test_folders_share_an_identity_and_every_picture_has_its_text(tmp_path):
    draw_crossings(tmp_path / "web", each=1)
    rows = [json.loads(line) for line in (tmp_path / "web" / "train" / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 648 and len({row["file"].split("/")[0] for row in rows}) == 12
    before = (tmp_path / "web" / "web.json").stat().st_mtime_ns
    draw_crossings(tmp_path / "web", each=1)
    assert (tmp_path / "web" / "web.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="each=0: give seed >= 0 and each >= 1"):
        draw_crossings(tmp_path / "web", each=0)


@pytest.mark.slow
def test_models_are_trained_scored_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "draw_crossings", functools.partial(draw_crossings, each=1))
    options = ["--only", "concatenated", "--steps", 1, "--batch", 2, "--tests", 4, "-n", 1, "--sample-steps", 1]
    options += ["--out", tmp_path, "--device", "cpu", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html"]
    assert main(["bench", "streams", *map(str, options)]) == 0
    rows = {row["model"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert rows.keys() == {"(the condition)", "(another picture)", "(a right one)", "concatenated"}
    # a copy keeps all of the identity and has nothing of the text
    copied, right = rows["(the condition)"], rows["(a right one)"]
    assert copied["identity"] == 1 and not any(copied[name] for name in ("text", "palette", "count", "place"))
    assert right["identity"] == right["text"] == 1
    assert trials(4, 0)[0][1].caption in (tmp_path / "a.html").read_text()
    (run,) = tmp_path.glob("*-1x2")
    config = json.loads((run / "config.json").read_text())["train"]
    assert config["fusion"] == "concatenated" and not config["flip"]
    # what is there is not trained again
    before = (run / "model_index.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["bench", "streams", *map(str, options)]) == 0
    assert (run / "model_index.json").stat().st_mtime_ns == before
    assert "train" not in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (["--only", "both"], "--only both: choose from parallel, concatenated, added, picture, text"),
    (["--steps", "0"], "--steps is 0: give at least 1"),
    (["--guidance", "1"], "--guidance 1 turns guidance off"),
])  # fmt: skip
def test_bad_options_are_one_line(tmp_path, capsys, options, message):
    assert main(["bench", "streams", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and not (tmp_path / "out").exists()
