"""`semantica bench tune`: the launch table of an operator, tuned on the GPU at hand and written for its architecture.

Each row of each ladder is improved by coordinate descent: its neighbours, one field changed by one notch, are raced
against it on every problem whose launches it changes, whole operators at a time, since one kernel's settings may decide
the work of the next. Nothing is tuned at run time: what is found here is shipped.
"""

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from semantica.benchmarks.harness.race import QUICK, CudaClock, race
from semantica.benchmarks.harness.table import show
from semantica.benchmarks.kernels.implementations import implementations
from semantica.benchmarks.kernels.problems import problems
from semantica.benchmarks.kernels.verify import Answers, Wrong, verify
from semantica.errors import ArtifactError, UserError
from semantica.files import write_text
from semantica.kernels import OPERATORS, launch
from semantica.kernels.dispatch import load
from semantica.kernels.launch import Launch

if TYPE_CHECKING:
    from semantica.benchmarks.kernels.tune_command import TuneConfig

# what a field may be: a power of two between these, or for stages any number
BOUNDS = {"warps": (1, 16), "stages": (1, 6), "block_n": (16, 256), "block_m": (16, 256)}
OTHERS = (16, 1 << 16)

Planner = Callable[[], list[Launch]]
# plans of one problem that compete -> seconds of each; inf for one that cannot run
Timer = Callable[[list[list[Launch]]], list[float]]


@dataclass(frozen=True)
class Change:
    """A row that was replaced. ratio: time of the new one to that of the old one, geometric mean over the problems."""

    kernel: str
    before: dict
    after: dict
    ratio: float
    problems: int


def neighbours(row: dict) -> Iterator[dict]:
    """Rows that differ from this one by one notch in one field; `width`, which says where a row applies, stays."""
    for name, value in row.items():
        low, high = BOUNDS.get(name, OTHERS)
        if name == "width":
            continue
        if isinstance(value, list):
            for i, entry in enumerate(value):
                for other in (entry // 2, entry * 2):
                    changed = [*value[:i], other, *value[i + 1 :]]
                    if low <= other <= high and changed == sorted(changed):
                        yield {**row, name: changed}
            continue
        # tiles per program count from one
        low = 1 if name == "tiles" else low
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, value * 2):
            if low <= other <= high:
                yield {**row, name: other}


def signature(launches: list[Launch]) -> list[tuple]:
    """Equal for plans that run the same programs the same way."""
    return [(a.kernel.__name__, a.grid, sorted(map(str, a.constants.items())), a.warps, a.stages) for a in launches]


def with_row(op: str, kernel: str, arch: str, index: int, row: dict) -> dict:
    """The operator's table with one row of an architecture's ladder replaced."""
    table = copy.deepcopy(launch.table(op))
    ladder = copy.deepcopy(table[kernel].get(arch, table[kernel]["default"]))
    ladder[index] = row
    table[kernel][arch] = ladder
    return table


def planned_with(planner: Planner, op: str, table: dict) -> list[Launch] | None:
    """The launches that a table leads to; None where its numbers do not fit together."""
    with launch.trial(op, table):
        try:
            return planner()
        except (ArithmeticError, AssertionError, ValueError):
            return None


def rate(op: str, planners: list[Planner], now: dict, then: dict, timer: Timer) -> tuple[float, int]:
    """Time with table `then` to that with `now`, geometric mean over the problems that change, and how many these are.

    inf where one of them cannot run, or nothing changes.
    """
    ratios = []
    for planner in planners:
        old, new = planned_with(planner, op, now), planned_with(planner, op, then)
        if new is None:
            return math.inf, 0
        if signature(old) != signature(new):
            before, after = timer([old, new])
            ratios.append(after / before)
            if math.isinf(after):
                break
    # 0 where the row in use cannot run at all
    return (math.prod(ratios) ** (1 / len(ratios)), len(ratios)) if ratios else (math.inf, 0)


def search(
    op: str, arch: str, planners: list[Planner], timer: Timer, kernels: Sequence[str], margin: float, deadline: float
) -> tuple[dict, list[Change]]:
    """The table with every row of the architecture's ladders improved until no neighbour is faster, and the changes.

    kernels: only these ladders; none = all. deadline: on `time.monotonic`'s clock.
    """
    table, changes = copy.deepcopy(launch.table(op)), []
    for name in kernels or list(table):
        for index in range(len(table[name].get(arch, table[name]["default"]))):
            with launch.trial(op, table):
                row = table[name].get(arch, table[name]["default"])[index]
                tried = [row]
                while time.monotonic() < deadline:
                    now, best = with_row(op, name, arch, index, row), (1 - margin, None, 0)
                    for candidate in neighbours(row):
                        if candidate in tried or time.monotonic() >= deadline:
                            continue
                        tried.append(candidate)
                        then = with_row(op, name, arch, index, candidate)
                        ratio, count = rate(op, planners, now, then, timer)
                        best = min(best, (ratio, candidate, count), key=lambda found: found[0])
                    ratio, candidate, count = best
                    if candidate is None:
                        break
                    changes.append(Change(name, row, candidate, ratio, count))
                    row = candidate
                improved = with_row(op, name, arch, index, row)
            if row is not tried[0]:
                table = improved
    return table, changes


def dump(table: dict) -> str:
    """A launch table as its file holds it: one row a line."""
    kernels = []
    for kernel, ladders in table.items():
        parts = [
            f'    "{arch}": [\n' + ",\n".join(f"      {json.dumps(row)}" for row in ladder) + "\n    ]"
            for arch, ladder in ladders.items()
        ]
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def planners_of(op: str) -> list[Planner]:
    """Forward and backward of every problem of the benchmarks, on the GPU; inputs are drawn once."""
    planners = load(OPERATORS[op].planners)
    own = [problem for problem in problems("cuda", quick=False) if problem.op == op]
    return [planner for problem in own for planner in planners(**problem.inputs(seed=0))]


def device_timer() -> Timer:
    """Races plans on the GPU: median device time, L2 cold, calls of all in random order."""
    clock = CudaClock()

    def timer(plans: list[list[Launch]]) -> list[float]:
        contenders = {}
        for i, launches in enumerate(plans):
            try:
                launch.run(launches)
            # the compiler raises whatever its passes raise, and the driver what does not fit
            except Exception:
                continue
            contenders[str(i)] = lambda number, launches=launches: lambda: launch.run(launches)
        times, _ = race(contenders, clock, QUICK)
        return [times[str(i)].quantile(0.5) if str(i) in times else math.inf for i in range(len(plans))]

    return timer


def tune(config: "TuneConfig") -> int:
    """Search, check that the operator is still accurate with what was found, write the table, print the changes.

    Raises:
        UserError: no NVIDIA GPU, no Triton, an unknown ladder, or impossible numbers.
    """
    if config.op not in launch.LADDERS:
        raise UserError(f"--op {config.op!r} has no launch table: choose one of {', '.join(launch.LADDERS)}")
    if unknown := [name for name in config.kernel if name not in launch.table(config.op)]:
        raise UserError(f"--kernel {unknown[0]!r}: {config.op} has {', '.join(launch.table(config.op))}")
    if not 0 <= config.margin < 1 or not config.seconds > 0:
        raise UserError(f"--margin {config.margin} and --seconds {config.seconds}: give a share below 1, and a time")
    if not torch.cuda.is_available() or launch.DEVICE != "cuda":
        raise UserError("bench tune needs an NVIDIA GPU and Triton: the table is made of times measured there")
    path = config.out or launch.LADDERS[config.op]
    begun = begun_table(path, config.op)
    arch = launch.architecture(torch.device("cuda"))
    deadline = time.monotonic() + config.seconds
    with launch.trial(config.op, begun):
        table, changes = search(
            config.op, arch, planners_of(config.op), device_timer(), config.kernel, config.margin, deadline
        )
    with launch.trial(config.op, table):
        check(config.op)
    write_text(path, dump(table))
    columns = ("kernel", "width", "before", "after", "time", "problems")
    body = [
        (c.kernel, str(c.before["width"]), *map(json.dumps, (c.before, c.after)), f"{c.ratio:.3f}x", str(c.problems))
        for c in changes
    ]
    if body:
        show(columns, body)
    print(f"{len(changes)} changes for {arch} in {path}")
    return 0


def begun_table(path: Path, op: str) -> dict:
    """The table to go on from: the file to be written where it exists, so that ladders can be tuned one run at a time.

    Raises:
        UserError: the file cannot be written, or is not a table of this operator.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # minutes of tuning must not end at a folder that is read-only
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else launch.table(op)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}): choose another file") from error
    except ValueError as error:
        raise UserError(f"--out {path} is no launch table ({error}): choose another file") from error
    if not isinstance(table, dict) or list(table) != list(launch.table(op)):
        raise UserError(f"--out {path} is not a launch table of {op}: choose another file")
    return copy.deepcopy(table)


def check(op: str) -> None:
    """Raises `ArtifactError` where the operator, as it is planned now, is not accurate on one of the problems."""
    fused = next(i for i in implementations(op) if i.name == "fused")
    for problem in problems("cuda", quick=False):
        if problem.op == op:
            try:
                verify(fused.load(), Answers.of(problem, gradients=True), gradients=True, leeway=fused.leeway)
            except Wrong as wrong:
                raise ArtifactError(f"with the table found, {problem.name} is wrong: {wrong}; nothing kept") from wrong
