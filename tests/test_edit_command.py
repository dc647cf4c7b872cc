"""`semantica edit` from end to end: pictures by pictures, pictures by prompts, and what is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantica import WordEncoder
from semantica.cli import main
from semantica.editing.command import EditConfig, inputs_of


@pytest.fixture(scope="module")
def folder(foreign, tmp_path_factory):
    return foreign.write(tmp_path_factory.mktemp("foreign") / "model", "sd")


@pytest.fixture
def other(tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / "other.jpg")
    return tmp_path / "other.jpg"


def run(tmp_path, capsys, *options, code=0):
    """The command's last line on standard error or output; what it has written is read back."""
    left = main(["edit", *map(str, options), "--out", str(tmp_path / "made" / "e.png")])
    out, err = capsys.readouterr()
    assert left == code, err
    if code:
        assert not (tmp_path / "made").exists()
        return err.strip().splitlines()[-1]
    return np.asarray(Image.open(tmp_path / "made" / "e.png")).astype(int)


@pytest.mark.parametrize("method", ["cds", "dds", "sds"])
def test_a_run_edits_a_picture_towards_another(small_run, picture, other, tmp_path, capsys, method):
    given = ["--model", small_run, "--image", picture, "--to", other, "--method", method, "--iterations", 4]
    strip = ["--strip", tmp_path / "strip.png"]
    made = run(tmp_path, capsys, *given, *strip)
    assert made.shape == (16, 16, 3) and json.loads((tmp_path / "made/e.json").read_text())["method"] == method
    # the picture, then every one of the four iterations
    assert Image.open(tmp_path / "strip.png").size == (5 * 18 + 2 + 4, 20)
    again = run(tmp_path, capsys, *given)
    assert np.array_equal(again, made)
    assert np.abs(run(tmp_path, capsys, *given, "--seed", 1) - made).max() > 0


def test_prompts_edit_in_latents(folder, picture, tmp_path, capsys):
    given = ["--model", folder, "--image", picture, "--prompt-to", "two red bicycles", "--iterations", 2]
    both = ["--prompt-from", "a lighthouse"]
    made = {}
    for method, more in (("cds", both), ("dds", both), ("sds", [])):
        made[method] = run(tmp_path, capsys, *given, *more, "--method", method)
        assert made[method].shape == (64, 64, 3)
    # weights given on the command line arrive
    heavy = run(tmp_path, capsys, *given, *both, "--w-cut", 3000)
    assert np.abs(heavy - made["cds"]).max() > np.abs(made["cds"] - made["dds"]).max()
    assert np.abs(run(tmp_path, capsys, *given, *both, "--checkpoint") - made["cds"]).max() <= 1
    less = np.abs(run(tmp_path, capsys, *given, *both, "--precision", "bf16") - made["cds"])
    assert 0 < less.mean() < 10


def test_what_cannot_be_edited_is_one_line(small_run, folder, picture, other, tmp_path, capsys):
    own, public = ["--model", small_run, "--image", picture], ["--model", folder, "--image", picture]

    def said(*options):
        return run(tmp_path, capsys, *options, code=2)

    assert "--to is missing" in said(*own)
    assert "reads no text: give --to" in said(*own, "--to", other, "--prompt-to", "x")
    assert "--prompt-from is missing" in said(*public, "--prompt-to", "x")
    assert "reads no pictures" in said(*public, "--prompt-from", "a", "--prompt-to", "x", "--to", other)
    assert "--prompt-from is nothing for sds" in said(*public, "--prompt-from", "a", "--method", "sds")
    assert "--w-cut is nothing for dds" in said(*own, "--to", other, "--method", "dds", "--w-cut", 2)
    assert "is a bundle, whose engines give no gradients" in said(
        "--model", Path(__file__).parent / "stored" / "bundle", "--image", picture, "--to", other
    )
    assert "--rate is nan" in said(*own, "--to", other, "--rate", "nan")
    assert "0 iterations" in said(*own, "--to", other, "--iterations", 0)
    assert "cannot use the picture" in said(*own, "--to", tmp_path / "none.png")
    assert "finite no more after iteration" in said(*own, "--to", other, "--rate", "1e38", "--iterations", 3)
    assert "is no name that ends in .png" in said(*own, "--to", other, "--strip", tmp_path / "s.jpg")
    # the same file by another name
    (tmp_path / "x").mkdir()
    same, taken = tmp_path / "x" / ".." / picture.name, tmp_path / "x" / ".." / "made" / "e.png"
    assert "is --image too" in said(*own, "--to", other, "--strip", same)
    assert "is --out too" in said(*own, "--to", other, "--strip", taken)
    assert "--strip: nothing can be written in" in said(*own, "--to", other, "--strip", picture / "a.png")
    assert "--precision fp16 is for GPUs" in said(*own, "--to", other, "--precision", "fp16")


def test_score_distillation_reads_the_target_alone_of_any_words():
    """A source that is never read has to be a text that the model knows: words know no empty one."""
    config = EditConfig(Path("run"), Path("a.png"), prompt_to="red ring", method="sds")
    made = inputs_of(config, {"text": False}, Image.new("RGB", (4, 4)))
    assert WordEncoder(("red", "ring"), 4, 16).prepare(made["text"]) is not None
