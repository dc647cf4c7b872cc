"""The operators' rows: each implementation verified, then all of a problem raced together.

Run by `semantica bench kernels`, or by plain pytest, with a few small shapes.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semantica import kernels
from semantica.benchmarks.harness.race import (
    QUICK,
    Contender,
    Protocol,
    Times,
    clock,
    copy_contender,
    matrix_contender,
    quantile,
    race,
)
from semantica.benchmarks.harness.sources import kernel_hash
from semantica.benchmarks.harness.store import measured
from semantica.benchmarks.harness.suite import Bench, Outcome, bench, pytest_generate_tests, test_row
from semantica.benchmarks.kernels.implementations import Implementation, available
from semantica.benchmarks.kernels.problems import OPS, Problem, problems
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

__all__ = ["bench", "pytest_generate_tests", "test_row"]
# sets of input buffers that calls take in turn
SETS = 3


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


def contender(function: Callable, answers: Answers, direction: str) -> Contender:
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


class ProblemRace:
    """A problem with its implementations: each verified for a direction, and all that passed raced."""

    def __init__(self, problem: Problem, entrants: Iterable[Implementation], directions: tuple[str, ...]):
        # compiled code is kept by shape: without this, the ninth shape would not be compiled
        torch.compiler.reset()
        self.problem, self.entrants = problem, {entrant.name: entrant for entrant in entrants}
        self.functions = {name: entrant.load() for name, entrant in self.entrants.items()}
        self.answers = Answers.of(problem, gradients=directions != ("forward",))
        self.accuracy: dict[tuple[str, bool], Accuracy] = {}
        self.wrong: dict[tuple[str, str], str] = {}

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

    def race(self, direction: str, clock, protocol: Protocol) -> tuple[dict[str, Times], dict[str, float]]:
        """Times of all that are right, and the ceilings in the same rounds. The last results are judged again."""
        for name in self.functions:
            self.check(name, direction)
        fair = {n: f for n, f in self.functions.items() if (n, direction) not in self.wrong}
        runners = {n: contender(f, self.answers, direction) for n, f in fair.items()}
        runners["copy"], copied = copy_contender(self.problem.device)
        runners["matrix"], multiplied = matrix_contender(self.problem.device, self.problem.dtype)
        times, last = race(runners, clock, protocol)
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
        return times, ceilings

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


def describe(found: ProblemRace, direction: str, name: str, times: Times, ceilings: dict, cache: int) -> dict:
    """The fields of a row."""
    problem, seconds = found.problem, times.quantile(0.5)
    effective, moved = problem.effective_bytes(direction), found.moved(name, direction, cache)
    operations, accuracy = problem.operations(direction), found.accuracy[name, direction != "forward"]
    gbps, tflops = None if moved is None else moved / seconds / 1e9, operations / seconds / 1e12
    row = measured(times, problem.device)
    fused = name == "fused"
    return {
        "op": problem.op,
        "impl": name,
        "shape": problem.shape,
        "layout": problem.layout,
        "dtype": problem.dtype_name,
        "direction": direction,
        "uses": who_serves(problem) if fused else name,
        "wall_us": quantile(times.wall, 0.5) * 1e6,
        "bytes": moved,
        "gbps": gbps,
        "share_of_copy": None if gbps is None else gbps / ceilings["copy_gbps"],
        "effective_bytes": effective,
        "effective_gbps": effective / seconds / 1e9,
        "effective_share_of_copy": effective / seconds / 1e9 / ceilings["copy_gbps"],
        "flops": operations,
        "tflops": tflops,
        "share_of_matrix_rate": tflops / ceilings["matrix_tflops"],
        "max_err": accuracy.error,
        "max_err_eager": accuracy.eager,
        "max_err_tensor": accuracy.tensor,
        "kernel_hash": kernel_hash(problem.op, row["arch"]) if fused else None,
        **ceilings,
        **row,
    }


class KernelBench(Bench):
    """Races of operators: a problem in a direction each."""

    # every single call would make the file ten times larger: quantiles are kept in the row
    keeps_samples = False

    def __init__(
        self,
        ops: Iterable[str] = OPS,
        words: Iterable[str] = (),
        device: str | None = None,
        directions: tuple[str, ...] = ("forward", "backward"),
        own: tuple[str, ...] = (),
        quick: bool = False,
        part: tuple[int, int] = (1, 1),
    ):
        """
        words: that a row must all have. device: the GPU where there is one. own: the user's "module:function"s.
        part: (k, n): every n-th problem from the k-th on.
        """
        super().__init__()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.directions, self.quick = directions, quick
        present, self.absent = available(list(ops), self.device, own)
        self.entered: dict[tuple[Problem, str], dict[str, Implementation]] = {}
        for problem in problems(self.device, quick)[part[0] - 1 :: part[1]]:
            for direction in directions:
                entrants = {
                    i.name: i
                    for i in present
                    if i.op == problem.op and i.serves(problem)
                    if all(word in f"{problem.name} {direction} {i.name}" for word in words)
                }
                if entrants:
                    self.entered[problem, direction] = entrants
        self.current: ProblemRace | None = None

    @functools.cached_property
    def clock(self):
        return clock(self.device)

    def races(self) -> dict[tuple[Problem, str], list[str]]:
        return {race: list(entrants) for race, entrants in self.entered.items()}

    def label(self, race: tuple[Problem, str]) -> dict[str, str]:
        return {"problem": race[0].name, "direction": race[1]}

    def run(self, race: tuple[Problem, str], what: str) -> dict[str, Outcome]:
        problem, direction = race
        if self.current is None or self.current.problem != problem:
            # its tensors may fill a GPU: gone before the next ones are drawn
            self.current = None
            entrants: dict[str, Implementation] = {}
            for other in self.directions:
                entrants |= self.entered.get((problem, other), {})
            self.current = ProblemRace(problem, entrants.values(), self.directions)
        found = self.current
        times, ceilings = found.race(direction, self.clock, QUICK if self.quick else Protocol())
        outcomes = {}
        for name in self.entered[race]:
            if (name, direction) in found.wrong:
                outcomes[name] = Outcome(reason=found.wrong[name, direction])
                continue
            row = describe(found, direction, name, times[name], ceilings, self.clock.cache)
            outcomes[name] = Outcome(seconds=times[name].device, row=row)
        return outcomes


DEFAULT = functools.partial(KernelBench, quick=True)
