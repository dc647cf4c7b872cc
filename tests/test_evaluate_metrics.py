"""The metrics of `semantica evaluate`: rows of known figures, folders with conditions.csv, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from semantica.benchmarks.quality.evaluate import EvaluateConfig, evaluate
from semantica.benchmarks.quality.metrics.baselines import Asked
from semantica.benchmarks.quality.metrics.inception import Inception, load_inception, resized
from semantica.benchmarks.quality.metrics.judges import Judge, judge
from semantica.benchmarks.quality.metrics.jury import REAL, Jury, Row
from semantica.benchmarks.quality.metrics.listing import Listed, read_listing, write_listing
from semantica.benchmarks.quality.metrics.store import Store
from semantica.cli import main
from semantica.errors import UserError

# a run of a few steps
RUN = Path(__file__).parent / "stored" / "run"
ROWS = {"images", "ignore the condition", "copy the condition", REAL, "noise"}


def listing(folder: Path, rows: list[tuple], columns=("file", "condition", "class")) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "conditions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder


def copies(photos: Path, folder: Path, each: int = 2) -> list[tuple]:
    """Pictures that are their conditions, two a group; gives the lines of their list."""
    folder.mkdir()
    rows = []
    for group in sorted(p.name for p in photos.iterdir()):
        for k in range(2):
            for i in range(each):
                name = f"{group}-{k}-{i}.png"
                (folder / name).write_bytes((photos / group / f"{k}.png").read_bytes())
                rows.append((name, f"{group}/{k}.png", group))
    return rows


def test_copies_score_as_copies(photos, tmp_path, capsys):
    images = tmp_path / "made"
    listing(images, copies(photos, images))
    config = EvaluateConfig(data=photos, images=images, bootstrap=20, cache=tmp_path / "cache")
    result = evaluate(config)
    assert set(result["metrics"]["rows"]) == ROWS and result["metrics"]["units"] == "conditions"
    made, copy = (result["metrics"]["rows"][name] for name in ("images", "copy the condition"))
    assert made == copy
    known = {"copies": 1, "precision": 1, "diversity": 0, "vendi_per_condition": 1, "condition_similarity": 1}
    assert {name: made[name]["value"] for name in known} == pytest.approx(known)
    # twelve of 24 pictures are shown, and every group is held by them
    assert made["nearest_class"]["value"] == 1 and 1 <= made["vendi"]["value"] <= 12
    noise = result["metrics"]["rows"]["noise"]
    assert noise["copies"]["value"] == noise["recall"]["value"] == 0 and noise["fd"]["value"] > made["fd"]["value"]
    for row in result["metrics"]["rows"].values():
        for figure in row.values():
            assert figure["low"] <= figure["value"] <= figure["high"]
        assert row["fd"]["low"] >= 0 and row["copies"]["high"] <= 1
    # 24 pictures say little of 388 features, and real ones say how little
    assert made["fd"]["biased"] and made["fd"]["pictures"] == 24
    assert made["fd"]["of_real"] == result["metrics"]["rows"][REAL]["fd"]["value"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "biased upwards for few pictures (24 pictures, 24 real ones, 388 features): 12 others of the real" in said
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == result["metrics"]
    # the same again, from features that were kept
    assert evaluate(config)["metrics"] == result["metrics"]


def test_a_run_is_judged_and_its_pictures_can_be_judged_again(photos, small_run, tmp_path):
    given = dict(data=photos, bootstrap=20, device="cpu")
    made = evaluate(
        EvaluateConfig(model=small_run, keep=tmp_path / "kept", out=tmp_path / "a.json", shots=2, n=2, steps=2, **given)
    )
    assert made["metrics"]["conditions"] == 12 and len(list((tmp_path / "kept").glob("*.png"))) == 24
    size = np.asarray(Image.open(tmp_path / "kept" / "0000-0.png")).shape[0]
    again = evaluate(EvaluateConfig(images=tmp_path / "kept", size=size, out=tmp_path / "b.json", **given))
    assert again["metrics"]["rows"]["images"] == made["metrics"]["rows"]["model"]
    assert again["figures"]["images"] == made["figures"]["model"]
    with pytest.raises(UserError, match="^--keep .*kept exists: give a new folder"):
        evaluate(EvaluateConfig(model=small_run, keep=tmp_path / "kept", **given))


def test_folders_of_labels_have_no_conditions(photos, tmp_path):
    result = evaluate(EvaluateConfig(data=photos, images=photos, out=tmp_path / "e.json", bootstrap=20, conditions=6))
    row = result["metrics"]["rows"]["images"]
    assert result["metrics"]["units"] == "pictures" and "condition_similarity" not in row
    assert row["fd"]["value"] == pytest.approx(0, abs=1e-6) and row["recall"]["value"] == row["precision"]["value"] == 1


def test_figures_are_written_also_where_nobody_reads_the_table(photos, tmp_path, monkeypatch):
    """`semantica evaluate ... | head` after an hour of sampling."""

    def left(*given, **named):
        raise BrokenPipeError

    monkeypatch.setattr("rich.console.Console.print", left)
    config = EvaluateConfig(data=photos, images=photos, out=tmp_path / "e.json", bootstrap=20, conditions=6)
    with pytest.raises(BrokenPipeError):
        evaluate(config)
    assert "figures" in json.loads((tmp_path / "e.json").read_text())


def test_lists_that_are_wrong_are_one_line_each(photos, tmp_path, capsys):
    folder, out = tmp_path / "made", tmp_path / "evaluation.json"
    good = copies(photos, folder)

    def said(rows, columns=("file", "condition", "class"), *more):
        listing(folder, rows, columns)
        command = ["evaluate", "--data", photos, "--images", folder, "--out", out, *more]
        assert main([str(a) for a in command]) == 2 and not out.exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "has no column 'class'" in said(good, ("file", "condition", "group"))
    assert "lists no pictures" in said([])
    assert "line 2: class 'cat' is no label of --data, such as 'g0'" in said([(*good[0][:2], "cat")])
    assert "line 3: condition 'g1/0.png' is no picture of class 'g0'" in said([good[0], (good[1][0], "g1/0.png", "g0")])
    assert "line 2: there is no file 'x.png'" in said([("x.png", *good[0][1:])])
    assert "line 2: there is no file '../" in said([("../made/" + good[0][0] + "/../../x", *good[0][1:])])
    assert "listed twice" in said([good[0], good[0]])
    assert "leave --shots and --conditions out" in said(good, ("file", "condition", "class"), "--shots", 1)
    assert "--bootstrap is 5: an interval needs at least 20" in said(
        good, ("file", "condition", "class"), "--bootstrap", 5
    )
    (folder / good[0][0]).write_bytes(b"no picture")
    assert "cannot use the picture" in said(good)
    (folder / "conditions.csv").write_bytes(b"\xff\xfe\x00")
    assert main(["evaluate", "--data", str(photos), "--images", str(folder)]) == 2
    assert "cannot be read as CSV" in capsys.readouterr().err


def test_a_list_of_any_names_is_read_as_it_was_written(tmp_path):
    files, paths = ["0.png", "1.png", "2.png"], ['a/12" wide.jpg', "a/b, c.jpg", "a/d\re.jpg"]
    for name in files:
        (tmp_path / name).touch()
    listed = Listed(files, paths, ["a"] * 3)
    write_listing(tmp_path, listed)
    assert read_listing(tmp_path, {"a": tuple(paths)}) == listed


def test_judges_and_places_that_are_none_are_one_line(photos, tmp_path, capsys):
    def said(*options):
        assert main(["evaluate", "--data", str(photos), "--images", str(photos), *map(str, options)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    file = tmp_path / "inception.safetensors"
    assert "cannot be read as safetensors" in said("--features", file)
    file.write_bytes(b"pickled")
    assert "cannot be read as safetensors" in said("--features", file)
    save_file({"fc.weight": torch.zeros(2, 2), "Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, file)
    assert "is not FID's Inception network" in said("--features", file)
    assert "encoder" in said("--features", tmp_path)
    file.write_bytes(b"")
    assert "--cache" in said("--cache", file / "below")
    assert "--keep says nothing to pictures that are there" in said("--keep", tmp_path / "k")


def test_too_few_pictures_leave_figures_out_and_say_so(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for group in "ab":
        (tmp_path / "data" / group).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "data" / group / f"{i}.png")
    images = listing(tmp_path / "made", [("0.png", "a/0.png", "a")])
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(images / "0.png")
    row = evaluate(EvaluateConfig(data=tmp_path / "data", images=images))["metrics"]["rows"]["images"]
    assert {"fd", "kd", "precision", "recall", "diversity"}.isdisjoint(row) and row["vendi"]["low"] is None
    said = " ".join(capsys.readouterr().out.split())
    assert "too few pictures for distances, precision, recall" in said and "there is one condition" in said


class Counting:
    """A judge that counts what it describes."""

    def __init__(self, identity="a" * 64):
        self.seen = 0
        self.judge = Judge("counting", identity, self.describe, unit=False)

    def describe(self, pictures):
        self.seen += len(pictures)
        return pictures.reshape(len(pictures), -1)[:, :5].astype(np.float32)


def test_features_are_kept_by_judge_and_content(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    first, second, other = Counting(), Counting(), Counting("b" * 64)
    described = Store(first.judge, tmp_path).describe(pictures[:6])
    # what is known is found in any order, what is new is made
    again = Store(second.judge, tmp_path).describe(pictures[::-1])
    assert (first.seen, second.seen) == (6, 4) and (again[::-1][:6] == described).all()
    Store(other.judge, tmp_path).describe(pictures)
    assert other.seen == 10
    # a broken file, and one that was renamed from another judge's, are made again
    mine, theirs = (sorted((tmp_path / f"v1-{x * 16}").iterdir()) for x in "ab")
    mine[0].write_bytes(mine[0].read_bytes()[:40])
    mine[1].write_bytes(theirs[0].read_bytes())
    third = Counting()
    assert (Store(third.judge, tmp_path).describe(pictures) == again[::-1]).all() and third.seen == 10


def test_an_interrupted_extraction_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("semantica.benchmarks.quality.metrics.store.PART", 4)
    pictures = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    counting = Counting()

    def dies(some):
        if counting.seen >= 8:
            raise KeyboardInterrupt
        return counting.describe(some)

    with pytest.raises(KeyboardInterrupt):
        Store(Judge("counting", "a" * 64, dies, unit=False), tmp_path).describe(pictures)
    after = Counting()
    Store(after.judge, tmp_path).describe(pictures)
    assert (counting.seen, after.seen) == (8, 2)


def test_judges_are_told_apart_by_weights_not_by_place(tmp_path):
    shutil.copytree(RUN / "encoder", tmp_path / "copy")
    here, there = judge(str(RUN), "cpu"), judge(str(tmp_path / "copy"), "cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    assert here.identity == there.identity and (here.describe(pictures) == there.describe(pictures)).all()
    assert np.linalg.norm(here.compared(here.describe(pictures)), axis=1) == pytest.approx(1)
    (file,) = (tmp_path / "copy").glob("*.safetensors")
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file, {"format": "pt"})
    assert judge(str(tmp_path / "copy"), "cpu").identity != here.identity


def test_a_dinov2_judges_by_its_pooled_vector(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    from semantica.images import to_tensor
    from semantica.model.encoders import frozen_encoder

    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(tmp_path / "dinov2")
    judging = judge(str(tmp_path / "dinov2"), "cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    made = judging.describe(pictures)
    expected = frozen_encoder(str(tmp_path / "dinov2"))(to_tensor(pictures)).pooled.numpy()
    assert judging.distance == "fd" and made == pytest.approx(expected, abs=1e-5)
    assert not np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-2)


def test_baselines_of_real_pictures_are_others_and_none_twice():
    groups = np.repeat(["a", "b"], 10)
    asked = Asked(np.array([0, 1, 10]), np.array(["a", "a", "b"]), np.repeat([0, 1, 2], 4))
    gallery = np.arange(20, dtype=np.float32)[:, None]
    row = asked.others(gallery, groups, 0)
    # four for each is more than half of class a
    assert np.bincount(row.sets).tolist() == [3, 2, 4] and len(set(row.own)) == 9
    assert (groups[row.own] == row.classes).all() and not set(row.own) & {0, 1, 10}
    ignoring = asked.any(gallery, 0)
    assert len(set(ignoring.own)) == 10 and not set(ignoring.own) & {0, 1, 10}


def test_real_pictures_are_judged_against_the_others():
    described = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    jury = Jury(Judge("x", "", None, unit=False), described, np.repeat(["a", "b"], 20), 20, 0)
    own = np.arange(0, 40, 2)
    row = Row(described[own], np.repeat(["a", "b"], 10), np.arange(20), np.arange(20), np.full(20, -1), own)
    assert jury.figures(row)["copies"]["value"] < 0.5
    seen = Row(described[own], row.classes, row.units, row.sets, row.conditions)
    assert jury.figures(seen)["copies"]["value"] == 1


@pytest.mark.slow
def test_inception_has_the_published_size_and_reads_its_own_file(tmp_path):
    torch.manual_seed(0)
    network = Inception()
    # 94 convolutions with norms: torchvision's without its classifier of 1000 classes and its auxiliary head
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 - 1000 * 2049
    weights = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(weights) == 94 * 5
    save_file(
        weights | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, tmp_path / "i.safetensors"
    )
    judging = judge(str(tmp_path / "i.safetensors"), "cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    made = judging.describe(pictures)
    expected = load_inception(tmp_path / "i.safetensors")(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert made.shape == (2, 2048) and judging.distance == "fid" and (made == expected.numpy()).all()


def test_pictures_are_enlarged_as_tensorflow_does():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    made = resized(x, 6)
    # source = target * scale: the first of each pair of rows is a row of the source, the last is repeated
    assert made[0, 0, ::2, 0].tolist() == [0, 4, 8] and made[0, 0, 1, 0] == 2 and made[0, 0, 5, 0] == 8
    assert made[0, 0, 0].tolist() == pytest.approx([0, 2 / 3, 4 / 3, 2, 8 / 3, 3])
