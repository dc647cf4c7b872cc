"""The pytest-benchmark suite of the operators: one test a row, all implementations of a problem raced together.

Run by `semantica bench kernels`, or as any suite: `pytest benchmarks/suite_kernels.py --benchmark-json out.json`.
Each race is run once, by the first of its tests; the clock that pytest-benchmark reads then replays its samples, so
that its statistics, comparisons and histograms hold of them.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semantica import kernels
from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness.store import Replay, environment, kernel_hash
from semantica.benchmarks.kernels.implementations import Implementation, available
from semantica.benchmarks.kernels.problems import Problem, problems
from semantica.benchmarks.kernels.verify import (
    CONTENTS,
    Accuracy,
    Answers,
    Wrong,
    differentiable,
    each,
    tensors,
    verify,
)
from semantica.kernels.registry import PLAIN

PLUGIN = "semantica-bench"
# sets of input buffers that calls take in turn
SETS = 3


@dataclass
class Plan:
    """What to run, and, as a plugin of pytest, what came of it."""

    ops: list[str] = field(default_factory=lambda: list(kernels.OPERATORS))
    words: list[str] = field(default_factory=list)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    directions: tuple[str, ...] = ("forward", "backward")
    own: tuple[str, ...] = ()
    quick: bool = False
    part: tuple[int, int] = (1, 1)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[dict] = field(default_factory=list)

    def rows(self) -> list[tuple[Problem, str, Implementation]]:
        present, self.absent = available(self.ops, self.device, self.own)
        return [
            (problem, direction, implementation)
            for problem in problems(self.device, self.quick)[self.part[0] - 1 :: self.part[1]]
            for direction in self.directions
            for implementation in present
            if implementation.op == problem.op and implementation.serves(problem)
            if all(word in f"{problem.name} {direction} {implementation.name}" for word in self.words)
        ]

    def pytest_benchmark_update_json(self, output_json: dict) -> None:
        output_json["semantica"] = {"wrong": self.wrong, "absent": self.absent}
        output_json["machine_info"].get("cpu", {}).pop("flags", None)
        for benchmark in output_json["benchmarks"]:
            # quantiles are kept in the row: every single call would make the file ten times larger
            del benchmark["stats"]["data"]

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            name = report.nodeid.partition("[")[2].removesuffix("]")
            print(f"{'timed' if report.passed else 'WRONG'}  {name}", file=sys.__stderr__, flush=True)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that each operator of plain torch reads and writes; views move nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        makes_views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not makes_views and not func.name().startswith("aten::empty"):
            moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            # an expanded tensor is read once
            self.total += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in moved)
        return out


def contender(function: Callable, answers: Answers, direction: str) -> timing.Contender:
    """Calls of an implementation: each with other buffers, filled anew, so that no earlier result can be right."""
    buffers = [each(answers.inputs[0], torch.clone) for _ in range(SETS)]
    sets = [differentiable(arguments, direction != "forward") for arguments in buffers]

    def prepare(number: int) -> Callable:
        arguments, content = sets[number % SETS], number % CONTENTS
        for name, tensor in tensors(buffers[number % SETS]).items():
            tensor.copy_(answers.inputs[content][name])
        if direction == "forward":
            return lambda: (function(**arguments), ())
        leaves = [t for t in tensors(arguments).values() if t.requires_grad]
        cotangent = answers.cotangents[content]
        if direction == "backward":
            out = function(**arguments)
            return lambda: (None, torch.autograd.grad(out, leaves, cotangent))

        def both():
            out = function(**arguments)
            return out.detach(), torch.autograd.grad(out, leaves, cotangent)

        return both

    return prepare


def returned(result: tuple, answers: Answers) -> dict[str, Tensor]:
    """What a contender's call returned, by name."""
    out, gradients = result
    names = [k for k, v in tensors(answers.inputs[0]).items() if v.is_floating_point()]
    named = dict(zip(names, gradients)) if gradients else {}
    return named if out is None else {"out": out, **named}


class Field:
    """A problem with its implementations: each verified, and all that passed raced, once for each direction."""

    def __init__(self, problem: Problem, entrants: list[Implementation], directions: tuple[str, ...]):
        # compiled code is kept by shape: without this, the ninth shape would not be compiled
        torch.compiler.reset()
        self.problem, self.entrants = problem, {entrant.name: entrant for entrant in entrants}
        self.functions = {entrant.name: entrant.load() for entrant in entrants}
        self.answers = Answers.of(problem, gradients=directions != ("forward",))
        self.accuracy: dict[tuple[str, bool], Accuracy] = {}
        self.wrong: dict[tuple[str, str], str] = {}
        self.races: dict[str, tuple[dict[str, timing.Times], dict[str, float]]] = {}

    def check(self, name: str, direction: str) -> None:
        """Verify an implementation for a direction; a fault in the backward leaves the forward a fair entry."""
        gradients, entrant = direction != "forward", self.entrants[name]
        try:
            if (name, gradients) not in self.accuracy:
                self.accuracy[name, gradients] = verify(
                    self.functions[name], self.answers, gradients, entrant.leeway, entrant.compiled
                )
        except Wrong as error:
            self.wrong[name, direction] = str(error)
        # whatever an implementation raises is its own failure, and must not end the suite
        except Exception as error:
            self.wrong[name, direction] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def race(
        self, direction: str, clock, protocol: timing.Protocol
    ) -> tuple[dict[str, timing.Times], dict[str, float]]:
        """Times of all that are right, and the ceilings in the same rounds. The last results are judged again."""
        if direction not in self.races:
            for name in self.functions:
                self.check(name, direction)
            fair = {n: f for n, f in self.functions.items() if (n, direction) not in self.wrong}
            runners = {n: contender(f, self.answers, direction) for n, f in fair.items()}
            runners["copy"], copied = timing.copy_contender(self.problem.device)
            runners["matrix"], multiplied = timing.matrix_contender(self.problem.device, self.problem.dtype)
            times, last = timing.race(runners, clock, protocol)
            for name in fair:
                number, result = last[name]
                try:
                    leeway = self.entrants[name].leeway
                    self.answers.judge(number % CONTENTS, returned(result, self.answers), leeway)
                except Wrong as error:
                    self.wrong[name, direction] = f"while it was timed: {error}"
            ceilings = {
                "copy_gbps": copied / times["copy"].quantile(0.5) / 1e9,
                "matrix_tflops": multiplied / times["matrix"].quantile(0.5) / 1e12,
            }
            self.races[direction] = times, ceilings
        return self.races[direction]

    def moved(self, name: str, direction: str, cache: int) -> int | None:
        """Bytes really moved: counted by operator for eager, by its passes for a fused kernel, else unknown."""
        if name == "eager":
            call = contender(self.functions[name], self.answers, direction)(0)
            with Traffic() as traffic:
                call()
            return traffic.total
        if name == "fused" and who_serves(self.problem) != PLAIN[0]:
            return self.problem.two_pass_bytes(direction, cache)
        return None


def who_serves(problem: Problem) -> str:
    """What the public operator runs on the problem's device."""
    return kernels.implementations()[problem.op][problem.device][0]


def describe(field: Field, direction: str, name: str, times: timing.Times, ceilings: dict, cache: int) -> dict:
    """The fields of a row."""
    problem, median = field.problem, times.quantile(0.5)
    effective, moved = problem.effective_bytes(direction), field.moved(name, direction, cache)
    operations, accuracy = problem.operations(direction), field.accuracy[name, direction != "forward"]
    gbps, tflops = None if moved is None else moved / median / 1e9, operations / median / 1e12
    where = environment(problem.device)
    fused = name == "fused"
    return {
        "op": problem.op, "impl": name, "shape": problem.shape, "layout": problem.layout,
        "dtype": problem.dtype_name, "direction": direction,
        "uses": who_serves(problem) if fused else name,
        "median_us": median * 1e6, "p20_us": times.quantile(0.2) * 1e6, "p80_us": times.quantile(0.8) * 1e6,
        "wall_us": timing.quantile(times.wall, 0.5) * 1e6, "rounds": len(times.device),
        "bytes": moved, "gbps": gbps, "share_of_copy": None if gbps is None else gbps / ceilings["copy_gbps"],
        "effective_bytes": effective, "effective_gbps": effective / median / 1e9,
        "effective_share_of_copy": effective / median / 1e9 / ceilings["copy_gbps"],
        "flops": operations, "tflops": tflops, "share_of_matrix_rate": tflops / ceilings["matrix_tflops"],
        **ceilings,
        "max_err": accuracy.error, "max_err_eager": accuracy.eager, "max_err_tensor": accuracy.tensor,
        **where, "kernel_hash": kernel_hash(problem.op, where["arch"]) if fused else None,
    }  # fmt: skip


replay = Replay()


@functools.cache
def clock_of(device: str):
    return timing.clock(device)


def plan_of(config) -> Plan:
    plan = config.pluginmanager.get_plugin(PLUGIN)
    if plan is None:
        plan = Plan()
        config.pluginmanager.register(plan, PLUGIN)
    return plan


def pytest_generate_tests(metafunc):
    rows = plan_of(metafunc.config).rows()
    ids = [f"{p.name} {direction} {i.name}".replace(" ", "-") for p, direction, i in rows]
    plain = [(p.name, direction, i.name) for p, direction, i in rows]
    metafunc.parametrize(("problem", "direction", "impl"), plain, ids=ids)


@pytest.fixture(scope="module")
def fields(request) -> Callable[[str], Field]:
    """The field of a problem, by name; only the last one is kept, since its tensors may fill a GPU."""
    plan, kept = plan_of(request.config), {}
    entered: dict[str, tuple[Problem, dict[str, Implementation]]] = {}
    for problem, _, entrant in plan.rows():
        entered.setdefault(problem.name, (problem, {}))[1][entrant.name] = entrant

    def get(name: str):
        if name not in kept:
            kept.clear()
            problem, entrants = entered[name]
            kept[name] = Field(problem, list(entrants.values()), plan.directions)
        return kept[name]

    return get


@pytest.mark.benchmark(timer=replay)
def test_kernel(problem, direction, impl, fields, benchmark, request):
    plan = plan_of(request.config)
    field, clock = fields(problem), clock_of(plan.device)
    times, ceilings = field.race(direction, clock, timing.QUICK if plan.quick else timing.Protocol())
    reason = field.wrong.get((impl, direction))
    if reason is not None:
        plan.wrong.append({"problem": problem, "direction": direction, "impl": impl, "reason": reason})
        pytest.fail(f"{impl}: {reason}", pytrace=False)
    benchmark.group = f"{problem} {direction}"
    replay.play(benchmark, times[impl].device)
    benchmark.extra_info.update(describe(field, direction, impl, times[impl], ceilings, clock.cache))
