"""Benches that are killed: what was measured is stored as it came, and --resume goes on from there."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from semantica.benchmarks.finetuning.suite import TuningBench
from semantica.benchmarks.harness import store
from semantica.benchmarks.harness.sources import kernel_hash, stale
from semantica.benchmarks.harness.summary import evaluations
from semantica.benchmarks.harness.table import Column, Kind
from semantica.benchmarks.harness.verb import Outputs, measure, measured
from semantica.benchmarks.kernels import command as bench_kernels
from semantica.benchmarks.kernels import suite
from semantica.benchmarks.kernels.problems import problems
from semantica.benchmarks.kernels.suite import KernelBench
from semantica.benchmarks.sampling.suite import SamplingBench, protocol
from semantica.benchmarks.training.suite import TrainingBench
from semantica.benchmarks.unets.suite import UNetBench
from semantica.cli import main
from semantica.errors import UserError

SUITE = """
from dataclasses import dataclass
from semantica.benchmarks.harness import store
from semantica.benchmarks.harness.sources import kernel_hash, stale
from semantica.benchmarks.harness.suite import Bench, bench, pytest_generate_tests, test_row

@dataclass(eq=False)
class Toy(Bench):
    device: str = "cpu"
    killed_at: str = ""

    def __post_init__(self):
        self.ran = []

    def run(self, race, what):
        self.ran.append(race[0])
        if race[0] == self.killed_at:
            raise KeyboardInterrupt
        row = dict(zip(store.IDENTITY, ("toy", "quick", race[0], "", "fp32", race[1])), kernel_hash=None)
        row |= store.environment("cpu")
        return {"quick": ([0.5, 0.25], {**row, "value": len(self.ran)}), "broken": "it is wrong"}
"""
KIND = Kind("toys", "", (Column("implementation", "{impl}"),), "op", 1, lambda rows: None, lambda rows: {})
RACES = {(name, "forward"): ["quick", "broken"] for name in ("a", "b", "c")}


@pytest.fixture
def toy(tmp_path):
    """A bench of three races, each with a row and one that is wrong; ended where it is told."""
    (tmp_path / "toy_suite.py").write_text(SUITE)
    spec = importlib.util.spec_from_file_location("toy_suite", tmp_path / "toy_suite.py")
    sys.modules["toy_suite"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield lambda killed_at="", races=RACES: module.Toy(
        races={race: list(names) for race, names in races.items()}, killed_at=killed_at
    )
    del sys.modules["toy_suite"]


def shapes(path: Path) -> list[tuple[str, int]]:
    return [(row["shape"], row["value"]) for row in store.rows(path)]


def test_a_killed_bench_keeps_its_rows_and_goes_on(toy, tmp_path, capsys):
    path = tmp_path / "rows.json"
    bench = toy(killed_at="c")
    with pytest.raises(KeyboardInterrupt):
        measure(Outputs(json=path), bench, KIND)
    assert bench.ran == ["a", "b", "c"] and shapes(path) == [("a", 1), ("b", 2)]
    assert [row["problem"] for row in json.loads(path.read_text())["semantica"]["wrong"]] == ["a", "b"]
    bench = toy()
    measure(Outputs(json=path, resume=True), bench, KIND)
    assert bench.ran == ["c"] and shapes(path) == [("a", 1), ("b", 2), ("c", 1)]
    # the exit code is of all rows, and so is what is said
    assert [row["problem"] for row in bench.wrong] == ["a", "b", "c"]
    assert capsys.readouterr().out.count("WRONG, not timed") == 3
    before = path.read_bytes()
    bench = toy()
    measure(Outputs(json=path, resume=True), bench, KIND)
    assert bench.ran == [] and path.read_bytes() == before and len(bench.wrong) == 3
    # unless it is asked to go on, it begins anew
    measure(Outputs(json=path), toy(), KIND)
    assert shapes(path) == [("a", 1), ("b", 2), ("c", 3)]


def test_what_is_not_asked_for_this_time_stays_in_the_file(toy, tmp_path, capsys):
    """A narrower choice, of races or of implementations in one of them."""
    path = tmp_path / "rows.json"
    measure(Outputs(json=path), toy(), KIND)
    capsys.readouterr()
    before = path.read_bytes()
    bench = toy(races={("b", "forward"): ["quick"]})
    measure(Outputs(json=path, resume=True), bench, KIND)
    assert bench.ran == [] and bench.wrong == [] and path.read_bytes() == before
    content = json.loads(before)
    content["benchmarks"][1]["extra_info"] |= {"kernel_hash": "of another version", "op": "group_norm"}
    path.write_text(json.dumps(content))
    bench = toy(races={("b", "forward"): ["quick"]})
    measure(Outputs(json=path, resume=True), bench, KIND)
    # run again alone, and shown alone
    assert bench.ran == ["b"] and shapes(path) == [("a", 1), ("c", 3), ("b", 1)]
    assert [row["problem"] for row in json.loads(path.read_text())["semantica"]["wrong"]] == ["a", "b", "c"]
    assert "WRONG" not in capsys.readouterr().out
    # killed at once, it has lost nothing
    content = json.loads(path.read_text())
    content["benchmarks"][2]["extra_info"] |= {"kernel_hash": "of another version", "op": "group_norm"}
    path.write_text(json.dumps(content))
    with pytest.raises(KeyboardInterrupt):
        measure(
            Outputs(json=path, resume=True), toy("c", {("b", "forward"): ["quick"], ("c", "forward"): ["new"]}), KIND
        )
    assert shapes(path) == [("a", 1), ("c", 3), ("b", 1)]


@pytest.mark.parametrize(("rounds", "steps", "serves"), [(6, 6, True), (6, 5, True), (6, 20, False), (20, 6, False)])
def test_training_rows_are_of_as_many_steps_as_are_asked_for(rounds, steps, serves):
    # whole turns of two
    assert TrainingBench("tiny", 2, steps, "cpu", 0, ("plain",)).serves({"rounds": rounds}) is serves


def test_fewer_rounds_than_are_asked_for_are_not_enough():
    bench = SamplingBench(("tiny",), (1,), (4,), ("plain",), "cpu", protocol=protocol(5, 1.0))
    bench.closing.close()
    row = {"shape": "tiny batch 1, 4 steps", "rounds": 7}
    assert bench.serves(row) and not bench.serves({**row, "rounds": 4}) and not bench.serves({**row, "quick": True})


@pytest.mark.parametrize("kind", ["sample", "unet", "finetune"])
def test_rows_of_another_model_of_the_same_name_are_not_taken_for_its_own(kind, tmp_path):
    """Races are called by the folder's name."""
    benches = []
    for number in (1, 2):
        folder = tmp_path / f"{number}" / "run"
        for part in ("unet", "vae"):
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(f'{{"sample_size": 8, "_class_name": "A", "layers": {number}}}')
        if kind == "sample":
            benches.append(SamplingBench((str(folder),), (1,), (4,), ("plain",), "cpu", protocol=protocol(5, 1.0)))
        elif kind == "unet":
            benches.append(UNetBench((str(folder),), (1,), (4,), ("plain",), "cpu", stages=("unet",)))
        else:
            benches.append(TuningBench({str(folder): 8}, ("full",), 1, 7, ("plain",), "cpu"))
        benches[-1].closing.close()
    own, other = benches
    (race,) = own.races
    row = {"shape": race[0], "rounds": 7, **own.which(race)}
    assert race in other.races and own.serves(row) and not other.serves(row)
    # as it was stored before rows said so
    assert not own.serves({"shape": race[0], "rounds": 7})
    # what was wrong with the one, too
    wrong = own.refusal(race, "plain", "it is wrong")
    path = tmp_path / "rows.json"
    for bench, which, kept in ((other, own, False), (own, own, True)):
        path.write_text(json.dumps({"benchmarks": [], "semantica": {"wrong": [wrong | which.which(race)]}}))
        assert (measured(path, bench)[0]["semantica"]["wrong"] != []) is kept


def test_stale_rows_and_races_that_lack_some_are_run_again(toy, tmp_path):
    path = tmp_path / "rows.json"
    measure(Outputs(json=path), toy(), KIND)
    content = json.loads(path.read_text())
    # b has timed other code, of c one implementation is missing
    content["benchmarks"][1]["extra_info"] |= {"kernel_hash": "of another version", "op": "group_norm"}
    content["semantica"]["wrong"] = content["semantica"]["wrong"][:2]
    path.write_text(json.dumps(content))
    bench = toy()
    measure(Outputs(json=path, resume=True), bench, KIND)
    assert bench.ran == ["b", "c"] and [shape for shape, _ in shapes(path)] == ["a", "b", "c"]


def test_what_was_wrong_is_run_again_once_its_code_changed(toy, tmp_path):
    path = tmp_path / "rows.json"
    measure(Outputs(json=path), toy(), KIND)
    content = json.loads(path.read_text())
    code = {"op": "group_norm", "arch": "x86_64"}
    content["semantica"]["wrong"][1] |= {**code, "kernel_hash": "of another version"}
    content["semantica"]["wrong"][2] |= {**code, "kernel_hash": kernel_hash("group_norm", "x86_64")}
    path.write_text(json.dumps(content))
    bench = toy()
    measure(Outputs(json=path, resume=True), bench, KIND)
    assert bench.ran == ["b"]


def test_rows_of_a_quick_look_are_not_taken_for_others(toy, tmp_path):
    path = tmp_path / "rows.json"
    measure(Outputs(json=path), toy(), KIND)
    content = json.loads(path.read_text())
    content["benchmarks"][0]["extra_info"]["quick"] = True
    path.write_text(json.dumps(content))
    bench = toy()
    measure(Outputs(json=path, resume=True), bench, KIND)
    assert bench.ran == ["a"]


def test_a_wrong_row_says_which_code_it_is_of():
    bench = KernelBench(device="cpu", quick=True)
    race = next(iter(bench.races))
    assert not stale({"impl": "fused", **bench.code(race, "fused")}) and bench.code(race, "eager") == {}
    assert stale({"impl": "fused", **bench.code(race, "fused"), "kernel_hash": "of another version"})


def test_it_does_not_mix_machines(toy, tmp_path, capsys):
    path = tmp_path / "rows.json"
    measure(Outputs(json=path), toy(), KIND)
    content = json.loads(path.read_text())
    content["benchmarks"][0]["extra_info"]["device"] = "another card"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds rows of another card"):
        measure(Outputs(json=path, resume=True), toy(), KIND)
    assert main(["bench", "kernels", "--resume"]) == 2
    assert "--resume needs --json FILE" in capsys.readouterr().err


def test_a_shape_that_two_models_share_is_timed_once_and_has_the_calls_of_both(tmp_path, monkeypatch):
    """Else the evaluation of the second model would lack it for ever."""
    path, problem = tmp_path / "rows.json", problems("cpu", quick=True)[0]
    for number, model in enumerate(("one", "two"), 1):
        calls = {problem: {f"{model} UNet": number}}
        monkeypatch.setattr(suite, "public_problems", lambda *_, calls=calls: calls)
        bench = KernelBench(ops=(problem.op,), device="cpu", quick=True, directions=("forward",), models=(model,))
        bench.races = {race: ["eager"] for race in bench.races}
        measure(Outputs(json=path, resume=True), bench, bench_kernels.KIND)
    (row,) = store.rows(path)
    assert not bench.races and row["calls"] == row["calls_of_all"] == {"one UNet": 1, "two UNet": 2}
    assert {line[0] for line in evaluations([row])} == {"one UNet", "two UNet"}
