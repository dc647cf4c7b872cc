"""`semantica sweep`: what a description may say, what of a sweep is kept and what is made again, cells that fail."""

import json
import shutil
from pathlib import Path

import pytest

from semantica import UserError
from semantica.benchmarks.quality.demo import STEPS, DemoConfig, train_options
from semantica.benchmarks.quality.sweep import cell, kept
from semantica.benchmarks.quality.sweep.command import SweepConfig, sweep
from semantica.benchmarks.quality.sweep.description import read_sweep
from semantica.benchmarks.quality.sweep.progress import Estimate, Work
from semantica.benchmarks.quality.sweep.runners import Local, threads_here
from semantica.benchmarks.quality.web import draw_web
from semantica.cli import main

# a network that a processor trains in no time, at a rate that shows in its samples
TRAIN = {
    "steps": 2, "batch": 4, "channels": [32], "depths": [1], "width": 32, "depth": 1, "heads": 1, "image_size": 16,
    "lr": 0.02, "warmup": 0, "ema": 0.5, "flip": False, "workers": 0, "device": "cpu", "precision": "fp32",
}  # fmt: skip
EVALUATE = {"conditions": 8, "n": 2, "steps": 2, "bootstrap": 20, "device": "cpu"}


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("web") / "web"
    draw_web(out, groups=4, images_per_group=2)
    return out


def description(web: Path, **changes) -> dict:
    """Pairs against reconstruction, as a sweep of two cells."""
    content = {
        "train": TRAIN | {"data": str(web / "train"), "val": str(web / "val")},
        "axes": {"mode": ["folders", "reconstruct"]},
        "seeds": [0],
        "evaluate": EVALUATE | {"data": str(web / "val"), "guidance": [2.0]},
    }
    return {**content, **changes}


def write(folder: Path, content) -> Path:
    path = folder / "SWEEP.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class Inline:
    """A runner that does a cell's work in this process, and keeps their names."""

    room = 1

    def __init__(self):
        self.started, self.closed = [], False

    def start(self, place: Path):
        self.started.append(place.name)
        try:
            self.reason = "" if cell.run(place) == 0 else "stopped"
        except UserError as error:
            self.reason = str(error)
        return self

    def poll(self) -> str:
        return self.reason

    def close(self) -> None:
        self.closed = True


class Failing(Inline):
    """Cells of one name end badly, others are not run at all and say that all went well."""

    def start(self, place: Path):
        self.started.append(place.name)
        self.reason = "its process ended with code -9: it said nothing" if "folders" in place.name else ""
        return self


def run(folder: Path, content: dict, out: Path, runner=None) -> tuple[int, list[str], dict]:
    """Exit code, cells that were started, and what sweep.json then holds."""
    runner = runner or Inline()
    code = sweep(SweepConfig(write(folder, content), out), runner)
    return code, runner.started, json.loads((out / "sweep.json").read_text())


@pytest.fixture(scope="module")
def swept(web, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    code, started, content = run(folder, description(web), folder / "out")
    assert code == 0 and started == ["mode-folders_seed-0", "mode-reconstruct_seed-0"] and len(content["rows"]) == 2
    return folder / "out"


def test_a_sweep_has_a_row_of_all_figures_for_each_cell_and_guidance(swept):
    content = json.loads((swept / "sweep.json").read_text())
    for row, mode in zip(content["rows"], ("folders", "reconstruct"), strict=True):
        name = f"mode-{mode}_seed-0"
        evaluation = json.loads((swept / "cells" / name / "guidance-2.json").read_text())
        assert (row["cell"], row["settings"], row["seed"], row["guidance"]) == (name, {"mode": mode}, 0, 2.0)
        metrics = evaluation["metrics"]["rows"]
        found = {label: own | metrics.get(label, {}) for label, own in evaluation["figures"].items()}
        assert row["figures"] == found["model"] and {"on_topic", "vendi"} <= found["model"].keys()
        assert row["loss"] == evaluation["loss"]
        # what no run has a part in stands once, what the model makes without a condition beside each row
        assert row["baselines"] == {"ignore the condition": found["ignore the condition"]}
        assert content["baselines"]["copy the condition"] == found["copy the condition"]
        assert {"model", *row["baselines"], *content["baselines"]} == {*found, *metrics}
        config = json.loads((swept / "runs" / name / "config.json").read_text())["train"]
        assert config["mode"] == mode and config["lr"] == 0.02
    assert content["rows"][0]["figures"] != content["rows"][1]["figures"]
    assert {state["state"] for state in content["cells"].values()} == {"finished"}
    assert (swept / "sweep.html").exists() and not (swept / ".lock").exists()


def test_the_same_command_starts_nothing_twice_also_elsewhere(web, swept, tmp_path):
    shutil.copytree(swept, tmp_path / "moved")
    before = (swept / "sweep.json").read_bytes()
    code, started, _ = run(tmp_path, description(web), tmp_path / "moved")
    assert code == 0 and started == [] and (tmp_path / "moved" / "sweep.json").read_bytes() == before
    # fewer cells, and options that change no step
    train = description(web)["train"] | {"log_every": 7}
    content = run(tmp_path, description(web, train=train, axes={"mode": ["reconstruct"]}), tmp_path / "moved")
    assert content[:2] == (0, []) and [row["cell"] for row in content[2]["rows"]] == ["mode-reconstruct_seed-0"]


def test_another_guidance_is_evaluated_and_nothing_trained_again(web, swept, tmp_path, monkeypatch):
    shutil.copytree(swept, tmp_path / "out")
    monkeypatch.setattr("semantica.train.loop.train", lambda *_: pytest.fail("a finished cell was trained"))
    before = json.loads((swept / "sweep.json").read_text())["rows"]
    more = description(web, axes={"mode": ["folders"]})
    more["evaluate"]["guidance"] = [2.0, 4.0]
    code, started, content = run(tmp_path, more, tmp_path / "out")
    assert code == 0 and started == ["mode-folders_seed-0"]
    assert [row["guidance"] for row in content["rows"]] == [2.0, 4.0]
    assert content["rows"][0]["figures"] == before[0]["figures"] != content["rows"][1]["figures"]


def request_of(web: Path, folder: Path, out: Path, **changes) -> dict:
    found = read_sweep(write(folder, description(web, **changes)), out)
    kept.content.cache_clear()
    return kept.asked(found, found.cells[0])


def test_only_what_is_still_the_same_is_kept(web, swept, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    place, run_folder = kept.place_of(out, "mode-folders_seed-0"), out / "runs" / "mode-folders_seed-0"
    asked = request_of(web, tmp_path, out)
    assert kept.complete(place, asked)
    # evaluations of other options, or of changed pictures, are made again; the training stays
    for other in ({"evaluate": asked["evaluate"] | {"steps": 3}}, {"evaluate_inputs": {"data": "0" * 64}}):
        assert not kept.complete(place, asked | other) and kept.trained(place, asked | other)
    # so does everything of a run that is no longer what was evaluated
    log = (run_folder / "metrics.jsonl").read_text()
    for file in ("metrics.jsonl", "unet/config.json"):
        text = (run_folder / file).read_text()
        (run_folder / file).write_text(text + "\n")
        assert kept.trained(place, asked) is None and not kept.complete(place, asked)
        (run_folder / file).write_text(text)
    assert kept.complete(place, asked) and kept.steps_of(run_folder) == 2
    (run_folder / "metrics.jsonl").write_text(log + '{"step": 99, "lo')
    assert kept.steps_of(run_folder) == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", 0.01, r"was made with lr 0\.02, not 0\.01: choose another --out"),
        ("steps", 1, "was made with steps 2, not 1"),
        ("data", "other", r"\(data\) changed since .* was made"),
    ],
)
def test_a_cell_of_other_settings_or_data_is_refused_before_anything_runs(web, swept, tmp_path, name, value, words):
    shutil.copytree(swept, tmp_path / "out")
    if value == "other":
        value = str(tmp_path / "other")
        shutil.copytree(web / "train", tmp_path / "other")
        shutil.rmtree(next((tmp_path / "other").iterdir()))
    changed = description(web, train=description(web)["train"] | {name: value})
    runner = Inline()
    with pytest.raises(UserError, match=words):
        run(tmp_path, changed, tmp_path / "out", runner)
    assert runner.started == []
    # more steps continue it
    kept.check(
        kept.place_of(tmp_path / "out", "mode-folders_seed-0"),
        request_of(web, tmp_path, tmp_path / "out", train=description(web)["train"] | {"steps": 9}),
    )


def test_a_failed_cell_is_named_and_the_others_go_on(web, tmp_path, capsys):
    runner = Failing()
    code, started, content = run(tmp_path, description(web, seeds=[0, 1]), tmp_path / "out", runner)
    assert code == 1 and len(started) == 4 and runner.closed and content["rows"] == []
    cells = content["cells"]
    assert cells["mode-folders_seed-1"]["reason"] == "its process ended with code -9: it said nothing"
    # one that says that all went well must have left something
    assert "storage that all nodes share" in cells["mode-reconstruct_seed-0"]["reason"]
    said = capsys.readouterr()
    assert "2/4 mode-reconstruct_seed-0: FAILED" in said.out
    assert said.err.count("semantica: cell mode-") == 4 and "the same command tries them again" in said.err
    assert "mode-folders_seed-1" in (tmp_path / "out" / "sweep.html").read_text()


def test_cells_are_a_grid_of_values_and_named_points_seed_by_seed(web, tmp_path):
    axes = {
        "conditioning": ["tokens", "global"],
        "thresholds": {"all pairs": {}, "strict": {"low": 0.4, "high": 0.9}},
        "channels": [[32], [32, 64]],
    }
    content = description(web, axes=axes, seeds=[3, 1])
    content["train"].pop("channels")
    content["train"]["depths"] = [1, 1]
    found = read_sweep(write(tmp_path, content), tmp_path / "out")
    assert len(found.cells) == 16 and [cell.seed for cell in found.cells] == [3] * 8 + [1] * 8
    assert found.cells[2].name == "conditioning-tokens_thresholds-strict_channels-32_seed-3"
    last = found.cells[-1]
    assert last.settings == {"conditioning": "global", "thresholds": "strict", "channels": "32x64"}
    chosen = {name: last.train[name] for name in ("conditioning", "low", "high", "channels", "seed", "lr")}
    assert chosen == {
        "conditioning": "global", "low": 0.4, "high": 0.9, "channels": [32, 64], "seed": 1, "lr": 0.02,
    }  # fmt: skip
    assert found.cells[0].train["low"] is None and found.guidance == (2.0,)
    assert last.train["out"] == str(tmp_path / "out" / "runs" / last.name)


def test_the_example_describes_a_sweep_of_the_demo_s_pictures(web, tmp_path):
    text = (Path(__file__).parents[1] / "examples" / "sweep.json").read_text()
    found = read_sweep(write(tmp_path, text.replace("demo/web", str(web))), tmp_path / "out")
    assert len(found.cells) == 8 and found.guidance == (1.0, 2.0, 4.0)
    assert found.cells[5].name == "pairs-pages_conditioning-global_seed-1"
    options = train_options(DemoConfig(out=tmp_path, steps=STEPS))
    # settings of the demo but for what the sweep varies, and where things lie
    same = options.keys() - {"data", "val", "out", "conditioning"}
    assert {name: found.cells[0].train[name] for name in same} == {name: options[name] for name in same}


WRONG = [
    ("{", "is no JSON"),
    ("[1]", "holds no JSON object"),
    ('{"train": {}, "train": {}}', "'train' is there twice in one object"),
    ('{"train": {"lr": NaN}}', "NaN is no number of JSON"),
    ({"trian": {}}, "'trian' is no part of a sweep (train, axes, seeds, evaluate): did you mean 'train'?"),
    ({"train": None}, "train is None: give an object of options"),
    ({"train": {"learning_rate": 1}}, "train.learning_rate is no option of 'semantica train'"),
    ({"train": {"stesp": 1}}, "train.stesp is no option of 'semantica train': did you mean 'steps'?"),
    ({"train": {"steps": "many"}}, "train.steps is 'many': give a whole number"),
    ({"train": {"steps": True}}, "train.steps is True: give a whole number"),
    ({"train": {"flip": 1}}, "train.flip is 1: give true or false"),
    ({"train": {"mode": "pears"}}, "train.mode is 'pears': give 'auto' or 'folders'"),
    ({"train": {"channels": [32, "a"]}}, "train.channels is [32, 'a']: give a list, each a whole number"),
    ({"train": {"betas": [0.9]}}, "train.betas is [0.9]: give a list of 2, each a number"),
    ({"train": {"seed": 1}}, 'train.seed is the sweep\'s own: give a list "seeds" beside "train"'),
    ({"train": {"out": "x"}}, "train.out is the sweep's own"),
    ({"train": {"data": "/no/where"}}, "data /no/where does not exist"),
    ({"train": {"steps": 0}}, "--steps is 0: give at least 1"),
    ({"train": {"conditioning": "none"}}, "runs are evaluated that pictures alone condition"),
    ({"axes": {}}, "axes is {}: give an object of options"),
    ({"axes": {"mode": []}}, "axes.mode is []: give a list of values"),
    ({"axes": {"mode": "folders"}}, "axes.mode is 'folders': give a list of values"),
    ({"axes": {"guidance": [1, 2]}}, "axes.guidance is no option of 'semantica train'"),
    ({"axes": {"lr": [1, "a"]}}, "axes.lr is 'a': give a number"),
    ({"axes": {"lr": [0.1, 0.1]}}, "two are called alike, '0.1' and '0.1'"),
    ({"axes": {"lr": [0.02]}}, "'lr' is given by train and by axes.lr: give it in one place"),
    ({"axes": {"a": {"x": {"low": 0.1}}, "b": {"y": {"low": 0.2}}}}, "'low' is given by axes.a and by axes.b"),
    ({"axes": {"a": {"x": {"low": 0.1}, "X": {"low": 0.2}}}}, "two are called alike, 'x' and 'X'"),
    ({"axes": {"a": {"x": {"low": 0.1}, "y": {"low": 0.1}}}}, "'x' and 'y' are the same options"),
    ({"axes": {"a": {"x": {"lwo": 0.1}}}}, "axes.a.x.lwo is no option of 'semantica train': did you mean 'low'?"),
    ({"axes": {"a": {"x": 1}}}, "axes.a.x is 1: give an object of options"),
    ({"axes": {"a": {"?": {"low": 0.1}}}}, "'?' cannot name a folder"),
    ({"axes": {"a": {"x" * 201: {}}}}, "name the points of axes, in less than 200 letters"),
    ({"seeds": []}, "seeds is []: give a list with at least one value"),
    ({"seeds": [0, 0]}, "seeds: two are called alike"),
    ({"seeds": [0.5]}, "seeds[0] is 0.5: give a whole number"),
    ({"seeds": [-1]}, "must not be negative"),
    ({"evaluate": {}}, "evaluate.data is missing"),
    ({"evaluate": {"data": "/no/where"}}, "evaluate.data /no/where does not exist"),
    ({"evaluate": {"guidance": []}}, "evaluate.guidance is []: give a list with at least one value"),
    ({"evaluate": {"guidance": [1, 1.0]}}, "evaluate.guidance: two are called alike"),
    ({"evaluate": {"guidance": ["high"]}}, "evaluate.guidance[0] is 'high': give a number"),
    ({"evaluate": {"model": "run"}}, "evaluate.model is the sweep's own: it is each cell's run"),
    ({"evaluate": {"n": 1, "data": "."}}, "evaluate: --n is 1"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_description_is_one_line_before_anything_runs(web, tmp_path, capsys, content, words):
    if isinstance(content, dict):
        whole = description(web)
        (part, given), *_ = content.items()
        merged = isinstance(given, dict) and part == "train"
        content = whole | {part: whole[part] | given if merged else given}
    path = write(tmp_path, content)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and str(path) in error, error
    assert not (tmp_path / "out").exists()


def test_impossible_options_and_folders_are_one_line(web, tmp_path, capsys):
    path = write(tmp_path, description(web))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    for options, words in (
        (["--out", tmp_path / "out", "--jobs", "0"], "--jobs is 0"),
        (["--out", tmp_path / "out", "--jobs", "2", "--ray"], "--jobs 2 is for this machine"),
        (["--out", tmp_path / "out", "--ray-cpus", "2"], "--ray-cpus 2 is nothing without --ray"),
        (["--out", tmp_path / "taken"], "exists and is no sweep"),
        (["--out", path], "exists and is no sweep"),
        ([], "--out"),
    ):
        assert main(["sweep", str(path), *map(str, options)]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and "\n" not in error, error
    assert main(["sweep", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_threads_and_gpus_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert threads_here() == 6 and Local(4, list).threads == 1 and Local(2, list).threads == 3
    started = []

    class Fake:
        def __init__(self, place, threads, more):
            started.append((threads, more))
            self.process = self

        def poll(self):
            return None if len(started) < 3 else 0

    monkeypatch.setattr("semantica.benchmarks.quality.sweep.runners.Process", Fake)
    runner = Local(3, lambda: ["0", "GPU-7"])
    for _ in range(4):
        runner.start(tmp_path)
    # the fourth cell has the place of the first, which has ended by then
    assert started == [(2, {"CUDA_VISIBLE_DEVICES": name}) for name in ("0", "GPU-7", "0", "0")]
    # one cell alone takes what it finds
    assert Local(1, lambda: ["0", "1"]).gpus == []


def test_what_is_left_is_estimated_by_kind_of_cell(tmp_path):
    def work(name: str, **known) -> Work:
        place = tmp_path / name
        place.mkdir()
        for file, content in known.items():
            (place / f"{file.replace('_', '-')}.json").write_text(json.dumps(content))
        request = {"train": {"out": str(place / "run"), "steps": 100}, "guidance": [1, 2]}
        return Work(name.split("_")[0], place, request)

    estimate = Estimate(together=2)
    todo = [work("slow_1"), work("fast_1"), work("new_1")]
    assert estimate.left(todo) == "" and estimate.left([]) == ""
    evaluation = {"sweep": {"seconds": 10.0}}
    estimate.learn(work("slow_0", trained={"seconds": 200.0, "steps": 100}, guidance_1=evaluation))
    assert estimate.left(todo[:1]) == "about 4 min left"
    estimate.learn(work("fast_0", trained={"seconds": 20.0, "steps": 50}, guidance_2=evaluation))
    # 200 s and 40 s, and of the mean pace (220 s for 150 steps) 147 s; two evaluations each; two at a time
    assert estimate.left(todo) == "about 4 min left" and estimate.left(todo[1:2]) == "about 60 s left"
    # half of the steps are there
    (tmp_path / "fast_1" / "run").mkdir()
    (tmp_path / "fast_1" / "run" / "metrics.jsonl").write_text('{"step": 50, "loss": 1.0}\n')
    assert estimate.left(todo[1:2]) == "about 40 s left"
