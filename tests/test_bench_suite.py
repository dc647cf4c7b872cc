"""What all benches share: one suite that plain pytest runs too, one race of processes, progress in one line a phase."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semantica import progress
from semantica.benchmarks.harness import process
from semantica.benchmarks.harness.process import Entrant, Wrong
from semantica.benchmarks.harness.race import Protocol
from semantica.benchmarks.harness.suite import run as run_suite
from semantica.benchmarks.harness.table import Column, as_markdown, cells
from semantica.benchmarks.kernels import suite
from semantica.benchmarks.kernels.implementations import Implementation
from semantica.benchmarks.kernels.problems import problems
from semantica.benchmarks.kernels.suite import KernelBench
from semantica.errors import ArtifactError

BENCHMARKS = Path(process.__file__).parents[1]
TOY = """
from semantica.benchmarks.harness.suite import Bench, bench, pytest_generate_tests, test_row

class Toy(Bench):
    def run(self, race, what):
        print("ran", what)
        return {"quick": ([0.5, 0.25], {"op": race[0]}), "broken": "it is wrong"}

def DEFAULT():
    return Toy(races={("a b", "forward"): ["quick", "broken"], ("c", "backward"): ["quick"]}, absent={"x": "why"})
"""


def pytest_of(path: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--import-mode=importlib"]
    return subprocess.run([*command, *options, str(path)], capture_output=True, text=True, cwd=path.parent)


def test_plain_pytest_runs_a_suite(tmp_path):
    (tmp_path / "suite.py").write_text(TOY)
    done = pytest_of(tmp_path / "suite.py", "--benchmark-json=rows.json")
    assert done.returncode == 1 and "broken: it is wrong" in done.stdout, done.stdout
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [(b["extra_info"]["op"], b["stats"]["data"]) for b in content["benchmarks"]] == [
        ("a b", [0.5, 0.25]),
        ("c", [0.5, 0.25]),
    ]
    (wrong,) = content["semantica"]["wrong"]
    assert [wrong[k] for k in ("problem", "direction", "impl", "reason")] == ["a b", "forward", "broken", "it is wrong"]
    assert wrong["device"] and wrong["quick"] is False and content["semantica"]["absent"] == {"x": "why"}
    # once for all rows of a race
    assert done.stdout.count("ran a b forward (1 of 2)") == 1 and "ran c backward (2 of 2, about " in done.stdout
    assert [line for line in done.stderr.splitlines() if line.startswith(("timed", "WRONG"))] == [
        "timed  a-b-forward-quick",
        "WRONG  a-b-forward-broken",
        "timed  c-backward-quick",
    ]


def test_a_gpu_that_a_fault_took_ends_the_bench_and_calls_nobody_else_wrong(monkeypatch):
    bench, kept = KernelBench(ops=("group_norm",), device="cpu", quick=True), []
    races = list(bench.races)
    assert len(races) > 2

    def run(race, what):
        if race != races[0]:
            suite.usable("one of them", "cuda")
        return dict.fromkeys(bench.races[race], "it raised")

    def gone(device=None):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore of it")

    monkeypatch.setattr(bench, "run", run)
    bench.keep = kept.append
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    suite.usable("healthy", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    suite.usable("a processor", "cpu")
    words = r"^one of them has left the GPU unusable \(CUDA error: an illegal memory access was enc.*before is kept"
    with pytest.raises(ArtifactError, match=words) as said:
        run_suite(bench)
    # what came before is stored, and nothing of the rest
    wrong = kept[-1]["semantica"]["wrong"]
    assert "\n" not in str(said.value) and {(row["problem"], row["direction"]) for row in wrong} == {races[0]}


def test_a_fault_of_one_implementation_asks_for_the_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(suite, "usable", lambda name, device: asked.append((name, device)))
    problem = problems("cpu", quick=True)[0]

    def faulty(**arguments):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    race = suite.ProblemRace(problem, [Implementation("faulty", problem.op, lambda: faulty)], ("forward",))
    race.check("faulty", "forward")
    assert asked == [(f"faulty of {problem.name}", "cpu")]
    assert race.wrong["faulty", "forward"].startswith("RuntimeError: Triton Error [CUDA]: an illegal memory access")


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("kernels", "test_row[group_norm-2x64x32x32-G32-film-silu-contiguous-"),
        ("sampling", "test_row[tiny-batch-1-4-steps-torch-eager]"),
        ("training", "test_row[tiny-batch-2-plain]"),
    ],
)
def test_every_suite_has_rows_by_default(kind, row):
    done = pytest_of(BENCHMARKS / kind / "suite.py", "--collect-only")
    assert done.returncode == 0 and row in done.stdout, done.stdout + done.stderr


class Instant:
    """The ceilings of no machine."""

    def __init__(self, device: str):
        self.rounds = 0

    def measure(self) -> None:
        self.rounds += 1

    def rates(self) -> dict[str, float]:
        return {"rounds": self.rounds}


@pytest.fixture
def race(monkeypatch):
    """A race of names without processes; returns the entrants, who ran in which round, what was judged, the rates."""
    monkeypatch.setattr("semantica.benchmarks.harness.race.Ceilings", Instant)
    monkeypatch.setattr(process.time, "sleep", lambda seconds: None)

    def run(names: dict[str, int], protocol: Protocol):
        """names: after how many runs each fails."""
        entrants = {name: Entrant(None) for name in names}
        runs, judged = [], []

        def call(entrant: Entrant, content: list) -> dict:
            name = next(n for n, e in entrants.items() if e is entrant)
            content.append(name)
            if sum(n == name for n, _ in runs) >= names[name]:
                raise Wrong("no more")
            runs.append((name, id(content)))
            return {"seconds": [0.5], "peak_bytes": 1}

        def judge(ran: list[Entrant], content: list, rounds: int) -> None:
            judged.append((rounds, sorted(content), len(ran)))

        rates = process.race("it", entrants.values(), protocol, "cpu", list, call, judge)
        return entrants, runs, judged, rates

    return run


def test_whole_runs_are_raced_in_rounds_after_a_warm_up(race):
    entrants, runs, judged, rates = race({"a": 99, "b": 99, "c": 99}, Protocol(warmup=2, least=12, most=12, seconds=0))
    assert [rounds for rounds, _, _ in judged] == [0, 0, *range(1, 13)] and rates == {"rounds": 12}
    assert all(content == ["a", "b", "c"] for _, content, _ in judged)
    assert all(entrant.all("seconds") == [0.5] * 12 and not entrant.reason for entrant in entrants.values())
    # in random order
    assert len({tuple(name for name, _ in runs[i : i + 3]) for i in range(0, len(runs), 3)}) > 2


def test_who_fails_in_a_race_leaves_it(race):
    entrants, _, judged, _ = race({"a": 99, "b": 2}, Protocol(warmup=1, least=3, most=5, seconds=0))
    assert entrants["b"].reason == "no more" and not entrants["a"].reason
    assert [ran for _, _, ran in judged] == [2, 2, 1, 1] and len(entrants["a"].answers) == 3
    # nobody is left
    entrants, _, judged, rates = race({"a": 1}, Protocol(warmup=1, least=3, most=5, seconds=0))
    assert entrants["a"].reason and len(judged) == 2


def test_progress_is_one_line_a_phase_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    with progress.phase("tiny: export onnx", 3) as done:
        for _ in range(3):
            done.update()
    with progress.phase("tiny: export nothing", 0):
        pass
    assert capsys.readouterr().err == "tiny: export onnx\n"
    assert progress.time_left(89) == "about 89 s left" and progress.time_left(600) == "about 10 min left"


def test_progress_is_a_bar_with_the_time_left_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.phase("rounds", 3) as done:
        done.update()
        done.refresh()
    said = capsys.readouterr().err
    assert "rounds:  33%" in said and "1/3" in said and said.count("\n") == 0


def test_a_table_marks_stale_rows_and_leaves_details_out():
    columns = (Column("implementation", "{impl}"), Column("ms", "{ms:.1f}"), Column("runs", "{n}", detail=True))
    rows = [{"impl": "a", "ms": 1.25, "n": 3}, {"impl": "b", "ms": 10, "n": 4}]
    assert cells(columns, rows) == [("a", "1.2", "3"), ("b", "10.0", "4")]
    assert as_markdown(columns, rows, lambda row: row["n"] == 4).splitlines() == [
        "| implementation | ms |",
        "| --- | ---: |",
        "| a | 1.2 |",
        "| b (stale) | 10.0 |",
    ]
