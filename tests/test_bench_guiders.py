"""`semantica bench guiders`: distances of sets against closed forms, and a small measurement of every way."""

import json

import numpy as np
import pytest

from semantica.benchmarks.quality.guiders import WAYS
from semantica.benchmarks.quality.metrics.gaussians import frechet
from semantica.benchmarks.quality.metrics.manifolds import precision_recall
from semantica.benchmarks.quality.web import draw_web
from semantica.cli import main


def cloud(mean, deviations, turn=0.0):
    """Points whose sample mean and covariance are exactly those asked for."""
    axes = np.concatenate([np.eye(2), -np.eye(2)])
    points = axes * np.sqrt(3 / 2) * deviations
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ rotation.T + mean


def test_the_frechet_distance_of_gaussians():
    a, b = cloud((0, 0), (1.0, 3.0)), cloud((1, 2), (2.0, 0.5))
    # of covariances along the same axes: |means apart|^2 and the squares of the deviations apart
    assert abs(frechet(a, b) - (5 + 1 + 6.25)) < 1e-9 and abs(frechet(a, a)) < 1e-9
    turned = cloud((0, 0), (1.0, 3.0), 0.7), cloud((0, 0), (2.0, 0.5), 0.2)
    first, second = (np.cov(x, rowvar=False) for x in turned)
    # two by two: tr (A B)^1/2 = sqrt(tr A B + 2 sqrt(det A B))
    root = np.sqrt(np.trace(first @ second) + 2 * np.sqrt(np.linalg.det(first @ second)))
    assert abs(frechet(*turned) - (np.trace(first) + np.trace(second) - 2 * root)) < 1e-9


def test_precision_and_recall_of_sets():
    grid = np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), -1).reshape(-1, 2)
    assert precision_recall(grid, grid) == (1.0, 1.0)
    assert precision_recall(grid + 100, grid) == (0.0, 0.0)
    half = grid[grid[:, 0] < 3]
    precision, recall = precision_recall(half, grid)
    assert precision == 1.0 and 0.5 <= recall < 0.9
    assert precision_recall(grid, half) == (recall, precision)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    out = tmp_path_factory.mktemp("web") / "web"
    draw_web(out, groups=8, images_per_group=4)
    return out


def test_every_way_is_measured(web, small_run, tmp_path, capsys):
    data = ["--data", web / "val", "--train", web / "train", "--attributes", web / "attributes.json"]
    few = ["--conditions", 2, "-n", 2, "--samples", 8, "--steps", 2, "--seeds", 2, "--guidance", 3]
    outputs = ["--json", tmp_path / "rows.json", "--html", tmp_path / "page.html"]
    command = ["bench", "guiders", "--model", small_run, "--weak", small_run, *data, *few, *outputs]
    assert main([str(a) for a in command]) == 0
    content = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["guider"]: row for row in content["variations"]}
    assert tuple(rows) == tuple(WAYS) and rows["none"]["guidance"] == 1 and rows["cfg"]["guidance"] == 3
    assert [row["guider"] for row in content["unconditional"]] == ["none", "tsg", "tsg-constant", "tsg-blocks"]
    for row in rows.values():
        for name in ("on_topic", "same_shape_in_grey", "same_palette", "diversity"):
            values = row["seeds"][name]
            assert row[name] == pytest.approx(np.mean(values)) and row[f"{name}_std"] == pytest.approx(
                np.std(values, ddof=1)
            )
    # a model that is its own bad version is not guided at all
    assert rows["auto"]["diversity"] == pytest.approx(rows["none"]["diversity"], rel=1e-3)
    assert rows["cfg"]["diversity"] != pytest.approx(rows["none"]["diversity"], rel=1e-3)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == len(WAYS) and "Unconditional samples" in page
    assert "Frechet distance" in capsys.readouterr().out


def test_what_is_not_known_is_left_out(web, small_run, tmp_path, capsys):
    """Shapes without attributes: no figure, which JSON has no word for."""
    few = ["--conditions", 2, "-n", 2, "--samples", 8, "--steps", 1, "--seeds", 2, "--only", "none"]
    command = ["bench", "guiders", "--model", small_run, "--data", web / "val", *few, "--json", tmp_path / "rows.json"]
    assert main([str(a) for a in command]) == 0
    assert "nan" not in capsys.readouterr().out.lower() and "NaN" not in (tmp_path / "rows.json").read_text()
    more = ["--train", web / "train", "--samples", 33]
    assert main([str(a) for a in [*command, *more]]) == 2
    assert "and " + str(web / "train") + " holds 32: give fewer" in capsys.readouterr().err


def test_bad_options_are_one_line(small_run, tmp_path, capsys):
    def said(*options):
        given = ["bench", "guiders", "--model", str(small_run), "--data", str(tmp_path)]
        assert main([*given, *map(str, options)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--only dog: choose from none, cfg" in said("--only", "dog")
    assert "--seeds is 1: give at least 2" in said("--seeds", 1)
    assert "--weak has 2 runs for 1 of --model" in said("--weak", small_run, small_run)
    assert "--only auto needs a bad version of each run" in said("--only", "auto")
    assert "cannot be written" in said("--json", tmp_path / "no" / "rows.json")


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (("bench", "guiders"), "reads text by encoders of their own: runs that pictures alone condition"),
        (("evaluate",), "(StableDiffusionPipeline) reads text alone, and a condition is a picture: give --ip-adapter"),
    ],
    ids=["guiders", "evaluate"],
)
def test_a_model_that_is_not_judged_is_one_line(web, foreign, tmp_path, capsys, verb, words):
    folder = foreign.write(tmp_path / "sd", "sd")
    given = (*verb, "--model", folder, "--data", web / "val", "--device", "cpu")
    capsys.readouterr()
    assert main([str(a) for a in given]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
