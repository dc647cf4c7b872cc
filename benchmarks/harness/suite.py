"""The one suite of pytest-benchmark: a test for each row.

A race is run once, by the first of its tests; the clock that pytest-benchmark reads then replays the samples, so that
its statistics, comparisons and histograms hold of them. Each kind of rows is a `Bench`, in a module that takes over
`pytest_generate_tests`, `bench` and `test_row` from here and says in `DEFAULT` what plain pytest runs:
`pytest --import-mode=importlib benchmarks/kernels/suite.py --benchmark-json out.json`.
"""

import contextlib
import functools
import inspect
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from semantica.benchmarks.harness.progress import time_left
from semantica.benchmarks.harness.store import Replay
from semantica.report import Part

PLUGIN = "semantica-bench"


@dataclass(frozen=True)
class Outcome:
    """What a race found of one implementation: its seconds and the fields of its row, or why it was not timed."""

    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    row: dict = field(default_factory=dict)


class Bench:
    """What is raced, and, as a plugin of pytest, what came of it.

    Attributes:
        absent: implementations that are not raced, and why. wrong: rows that were not timed, and why.
        keeps_samples: whether the file holds the seconds of every call.
    """

    keeps_samples = True

    def __init__(self):
        self.absent: dict[str, str] = {}
        self.wrong: list[dict] = []
        self.outcomes: dict[str, dict[str, Outcome]] = {}
        self.closing = contextlib.ExitStack()
        self.began = time.perf_counter()

    def races(self) -> dict[Hashable, list[str]]:
        """Names of implementations by race, in the order in which they are run."""
        raise NotImplementedError

    def label(self, race: Hashable) -> dict[str, str]:
        """What tells a race from the others: its `problem`, and its `direction` where there are several."""
        raise NotImplementedError

    def run(self, race: Hashable, what: str) -> dict[str, Outcome]:
        """Outcomes by name. what: the race, for the progress bar."""
        raise NotImplementedError

    def more(self) -> dict:
        """What the file holds beside the rows."""
        return {}

    def parts(self) -> list[Part]:
        """What the page holds beside the rows."""
        return []

    @functools.cached_property
    def plan(self) -> dict[str, tuple[Hashable, list[str]]]:
        """What a race is called -> it, and the names in it."""
        return {" ".join(self.label(race).values()): (race, names) for race, names in self.races().items()}

    def outcome(self, text: str, name: str) -> Outcome:
        """Of an implementation in a race, which is run when it is asked for first."""
        if text not in self.outcomes:
            every, run = len(self.plan), len(self.outcomes)
            place = f"{run + 1} of {every}"
            if run:
                place += f", {time_left((time.perf_counter() - self.began) / run * (every - run))}"
            self.outcomes[text] = self.run(self.plan[text][0], f"{text} ({place})")
        return self.outcomes[text][name]

    def pytest_benchmark_update_json(self, output_json: dict) -> None:
        output_json["semantica"] = {"wrong": self.wrong, "absent": self.absent, **self.more()}
        output_json["machine_info"].get("cpu", {}).pop("flags", None)
        for benchmark in output_json["benchmarks"] if not self.keeps_samples else ():
            del benchmark["stats"]["data"]

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            name = report.nodeid.partition("[")[2].removesuffix("]")
            print(f"{'timed' if report.passed else 'WRONG'}  {name}", file=sys.__stderr__, flush=True)


replay = Replay()


def bench_of(config, module) -> Bench:
    found = config.pluginmanager.get_plugin(PLUGIN)
    if found is None:
        found = module.DEFAULT()
        config.pluginmanager.register(found, PLUGIN)
    return found


def pytest_generate_tests(metafunc):
    plan = bench_of(metafunc.config, metafunc.module).plan
    rows = [(text, name) for text, (_, names) in plan.items() for name in names]
    ids = [f"{text} {name}".replace(" ", "-").replace(",", "") for text, name in rows]
    metafunc.parametrize(("race", "impl"), rows, ids=ids)


@pytest.fixture(scope="module")
def bench(request) -> Iterator[Bench]:
    found = bench_of(request.config, request.module)
    with found.closing:
        yield found


@pytest.mark.benchmark(timer=replay)
def test_row(race, impl, bench, benchmark):
    outcome = bench.outcome(race, impl)
    if outcome.reason:
        bench.wrong.append({**bench.label(bench.plan[race][0]), "impl": impl, "reason": outcome.reason})
        pytest.fail(f"{impl}: {outcome.reason}", pytrace=False)
    benchmark.group = race
    replay.play(benchmark, outcome.seconds)
    benchmark.extra_info.update(outcome.row)


def run(bench: Bench) -> dict:
    """Everything of a bench; returns the results file of pytest-benchmark, as a value."""

    class Named:
        @staticmethod
        def pytest_configure(config):
            config.pluginmanager.register(bench, PLUGIN)

    suite, said = Path(inspect.getfile(type(bench))), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "rows.json"
        # no configuration but this: neither the user's project nor ours
        options = ["-c", os.devnull, "--rootdir", str(suite.parents[1]), "--noconftest", "--import-mode=importlib"]
        options += ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*options, f"--benchmark-json={stored}", str(suite)], plugins=[Named()])
        if code == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or (code and not bench.wrong):
            raise RuntimeError(f"the suite broke:\n{said.getvalue()}")
        if not stored.exists() or not stored.stat().st_size:
            return {"benchmarks": [], "semantica": {"wrong": bench.wrong, "absent": bench.absent, **bench.more()}}
        content = json.loads(stored.read_text())
        # results are published, host names are not
        for name in ("node", "release"):
            content["machine_info"].pop(name, None)
        return content
