"""The one suite of pytest-benchmark: a test for each row.

A race is run once, by the first of its tests; the clock that pytest-benchmark reads then replays the samples, so that
its statistics, comparisons and histograms hold of them. Each kind of rows is a `Bench`, in a module that takes over
`pytest_generate_tests`, `bench` and `test_row` from here and says in `DEFAULT` what plain pytest runs:
`pytest --import-mode=importlib benchmarks/kernels/suite.py --benchmark-json out.json`.
"""

import contextlib
import inspect
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from semantica.benchmarks.harness import store
from semantica.benchmarks.harness.arithmetic import exact_fp32
from semantica.errors import ArtifactError, UserError
from semantica.progress import time_left

PLUGIN = "semantica-bench"


# why an implementation was not timed, or the seconds of its calls and the fields of its row
Outcome = str | tuple[list[float], dict]


@dataclass(eq=False, kw_only=True)
class Bench:
    """What is raced, and, as a plugin of pytest, what came of it.

    Attributes:
        races: the names of implementations in each race, in the order in which they are run. A race is known by its
            problem, and by its direction where there are several.
        absent: implementations that are not raced, and why. wrong: rows that were not timed, and why.
        rows: what the file will hold of those that were. keep: is given the file as it stands, after each row.
        broken: what ended it before its end. failures: tests that failed.
    """

    races: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[dict] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    keep: Callable[[dict], None] = lambda content: None
    broken: ArtifactError | UserError | None = None
    failures: int = 0
    outcomes: dict[tuple[str, ...], dict[str, Outcome]] = field(default_factory=dict)
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    began: float = field(default_factory=time.perf_counter)
    # whether the file holds the seconds of every call
    keeps_samples: ClassVar[bool] = True

    def run(self, race: tuple[str, ...], what: str) -> dict[str, Outcome]:
        """Outcomes by name. what: the race, for the progress bar.

        Raises:
            ArtifactError, UserError: nothing can be measured any more.
        """
        raise NotImplementedError

    def code(self, race: tuple[str, ...], name: str) -> dict:
        """`op`, `arch` and `kernel_hash` of an implementation of this package: what was wrong may be mended later."""
        return {}

    def serves(self, row: dict) -> bool:
        """Whether a row that was stored before stands for what would be measured now."""
        # a few rounds of --quick stand for no others
        alike = row.get("quick", False) == getattr(self, "quick", False)
        return alike and self.which((row.get("shape"),)).get("model") == row.get("model")

    def renewed(self, row: dict) -> dict:
        """A row that was stored before and stands for what is asked for now, with what is known of it by now."""
        return row

    def which(self, race: tuple[str, ...]) -> dict:
        """`model`, of a race of a folder: races are called by its name, and others may have it."""
        return {}

    def refusal(self, race: tuple[str, ...], name: str, reason: str) -> dict:
        """What the file holds of an implementation that was not timed."""
        named = dict(zip(("problem", "direction"), race))
        found = store.environment(getattr(self, "device", "cpu"))
        where = {field: found[field] for field in ("device", "torch", "triton", "commit", "date")}
        told = {"impl": name, "reason": reason, "quick": getattr(self, "quick", False)}
        return {**named, **told, **where, **self.which(race), **self.code(race, name)}

    def more(self) -> dict:
        """What the file holds beside the rows."""
        return {}

    def tables(self, rows: list[dict]) -> dict[str, tuple[Sequence[str], list[tuple[str, ...]]]]:
        """What is shown beside the rows, which are all that the file holds: `{heading: (columns, lines)}`."""
        return {}

    def outcome(self, race: tuple[str, ...], name: str) -> Outcome:
        """Of an implementation in a race, which is run when it is asked for first."""
        if race not in self.outcomes:
            every, run = len(self.races), len(self.outcomes)
            left = f", {time_left((time.perf_counter() - self.began) / run * (every - run))}" if run else ""
            self.outcomes[race] = self.run(race, f"{' '.join(race)} ({run + 1} of {every}{left})")
        return self.outcomes[race][name]

    def content(self) -> dict:
        """What the file holds beside what pytest-benchmark says of the machine."""
        return {"benchmarks": self.rows, "semantica": {"wrong": self.wrong, "absent": self.absent, **self.more()}}

    def pytest_benchmark_update_json(self, output_json: dict) -> None:
        output_json["semantica"] = self.content()["semantica"]
        output_json["machine_info"].get("cpu", {}).pop("flags", None)
        for benchmark in output_json["benchmarks"] if not self.keeps_samples else ():
            del benchmark["stats"]["data"]

    def pytest_runtest_logreport(self, report) -> None:
        self.failures += report.failed
        if report.when == "call":
            name = report.nodeid.partition("[")[2].removesuffix("]")
            print(f"{'timed' if report.passed else 'WRONG'}  {name}", file=sys.__stderr__, flush=True)


replay = store.Replay()


def bench_of(config, module) -> Bench:
    found = config.pluginmanager.get_plugin(PLUGIN)
    if found is None:
        found = module.DEFAULT()
        config.pluginmanager.register(found, PLUGIN)
    return found


def pytest_generate_tests(metafunc):
    races = bench_of(metafunc.config, metafunc.module).races
    rows = [(race, name) for race, names in races.items() for name in names]
    ids = [" ".join((*race, name)).replace(" ", "-").replace(",", "") for race, name in rows]
    metafunc.parametrize(("race", "impl"), rows, ids=ids)


@pytest.fixture(scope="module")
def bench(request) -> Iterator[Bench]:
    found = bench_of(request.config, request.module)
    exact_fp32()
    with found.closing:
        yield found


@contextlib.contextmanager
def ending(bench: Bench) -> Iterator[None]:
    """What is meant for the person at the keyboard ends all: nothing more can be measured, or be stored."""
    try:
        yield
    except (ArtifactError, UserError) as error:
        bench.broken = error
        pytest.exit(str(error))


@pytest.mark.benchmark(timer=replay)
def test_row(race, impl, bench, benchmark):
    with ending(bench):
        outcome = bench.outcome(race, impl)
    if isinstance(outcome, str):
        bench.wrong.append(bench.refusal(race, impl, outcome))
        with ending(bench):
            bench.keep(bench.content())
        pytest.fail(f"{impl}: {outcome}", pytrace=False)
    seconds, row = outcome
    benchmark.group = " ".join(race)
    replay.play(benchmark, seconds)
    benchmark.extra_info.update(row)
    bench.rows.append(benchmark.stats.as_dict(include_data=bench.keeps_samples))
    with ending(bench):
        bench.keep(bench.content())


def run(bench: Bench) -> dict:
    """Everything of a bench; returns the results file of pytest-benchmark, as a value. Raises as `Bench.run`, and
    `RuntimeError` where a test failed for another reason than a wrong result: its row would be missing."""

    class Named:
        @staticmethod
        def pytest_configure(config):
            config.pluginmanager.register(bench, PLUGIN)

    suite, said, before = Path(inspect.getfile(type(bench))), io.StringIO(), len(bench.wrong)
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "rows.json"
        # no configuration but this: neither the user's project nor ours
        options = ["-c", os.devnull, "--rootdir", str(suite.parents[1]), "--noconftest", "--import-mode=importlib"]
        options += ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*options, f"--benchmark-json={stored}", str(suite)], plugins=[Named()])
        if bench.broken is not None:
            raise bench.broken
        if code == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        wrong = len(bench.wrong) - before
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or bench.failures != wrong:
            raise RuntimeError(f"the suite broke:\n{said.getvalue()}")
        if not stored.exists() or not stored.stat().st_size:
            return bench.content()
        content = json.loads(stored.read_text())
        # results are published, host names are not
        for name in ("node", "release"):
            content["machine_info"].pop(name, None)
        return content
