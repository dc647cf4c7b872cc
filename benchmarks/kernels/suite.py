"""The operators' rows: each implementation verified, then all of a problem raced together.

Run by `semantica bench kernels`, or by plain pytest, with a few small shapes.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness import sources, store
from semantica.benchmarks.harness.process import give_back
from semantica.benchmarks.harness.race import Protocol, Times
from semantica.benchmarks.harness.suite import Bench, Outcome, bench, pytest_generate_tests, test_row
from semantica.benchmarks.harness.summary import EVALUATION, evaluations
from semantica.benchmarks.kernels.implementations import Implementation, available
from semantica.benchmarks.kernels.problems import Problem, problems, public_problems, too_large
from semantica.benchmarks.kernels.traffic import bytes_moved, who_serves
from semantica.benchmarks.kernels.verify import CONTENTS, Accuracy, Answers, Wrong, as_leaves, each, tensors, verify
from semantica.errors import ArtifactError, first_line
from semantica.kernels import OPERATORS

__all__ = ["bench", "pytest_generate_tests", "test_row"]
# sets of input buffers that calls take in turn
SETS = 3
# what stands beside every race: the field of a row, and from device and dtype the call and its bytes or operations
CEILINGS = {
    "copy": ("copy_gbps", 1e9, lambda device, dtype: timing.copy_contender(device)),
    "matrix": ("matrix_tflops", 1e12, lambda device, dtype: timing.matrix_contender(device, dtype)),
}


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
    sets = [as_leaves(arguments, direction != "forward") for arguments in buffers]

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


def usable(name: str, device: str) -> None:
    """After a fault: raises `ArtifactError` where it has cost the process its GPU, as an illegal address does. All that
    came after it would be called wrong, and be stored so."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        said = f"{name} has left the GPU unusable ({first_line(error)})"
        raise ArtifactError(f"{said}: what was measured before is kept; compute-sanitizer finds the fault") from error


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
                    self.functions[name], self.answers, gradients, entrant.leeway, entrant.compiled, entrant.least,
                    entrant.ulps,
                )  # fmt: skip
        except Wrong as error:
            self.wrong[name, direction] = str(error)
        # whatever an implementation raises is its own failure, and must not end the suite
        except Exception as error:
            self.refuse(name, direction, error)

    def refuse(self, name: str, direction: str, error: BaseException, when: str = "") -> None:
        """An implementation is out for what it raised. Raises `ArtifactError` where the GPU is gone, too."""
        self.wrong[name, direction] = f"{when}{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        usable(f"{name} of {self.problem.name}", self.problem.device)

    def race(self, direction: str, clock, protocol: Protocol) -> tuple[dict[str, Times], dict[str, float | None]]:
        """Times of all that are right, and the ceilings in the same rounds, None for one that could not be measured.
        The last results are judged again."""
        for name in self.functions:
            self.check(name, direction)
        above = list(CEILINGS)
        while True:
            fair = {n: f for n, f in self.functions.items() if (n, direction) not in self.wrong}
            try:
                return self.among(fair, above, direction, clock, protocol)
            except timing.Failed as failed:
                # a race of the others begins anew: one that wants too much memory costs nobody else the rows
                if failed.name in fair:
                    self.refuse(failed.name, direction, failed.__cause__, "while it was timed: ")
                else:
                    above.remove(failed.name)
                    usable(f"the ceiling {failed.name}", self.problem.device)
            give_back()

    def among(self, fair: dict[str, Callable], above: list[str], direction: str, clock, protocol: Protocol):
        """One race; above: which ceilings are in it. Raises `timing.Failed` where one of all these cannot go on."""
        runners, amounts = {n: contender(f, self.answers, direction) for n, f in fair.items()}, {}
        for name in above:
            try:
                runners[name], amounts[name] = CEILINGS[name][2](self.problem.device, self.problem.dtype)
            except (RuntimeError, MemoryError) as error:
                raise timing.Failed(name) from error
        times, last = timing.race(runners, clock, protocol)
        for name in fair:
            number, result = last[name]
            try:
                made, entrant = returned(result, self.answers), self.entrants[name]
                self.answers.judge(number % CONTENTS, made, entrant.leeway, entrant.least, entrant.ulps)
            except Wrong as error:
                self.wrong[name, direction] = f"while it was timed: {error}"
        return times, {
            field: amounts[name] / times[name].quantile(0.5) / unit if name in above else None
            for name, (field, unit, _) in CEILINGS.items()
        }

    def moved(self, name: str, direction: str, cache: int) -> int | None:
        """Bytes really moved: counted by operator for eager, by its passes for a kernel of ours, else unknown."""
        if name == "eager":
            call = contender(self.functions[name], self.answers, direction)(0)
            with Traffic() as traffic:
                call()
            return traffic.total
        return bytes_moved(self.problem, name, direction, cache) if name in store.OURS else None

    def row(self, name: str, direction: str, times: Times, ceilings: dict[str, float | None], cache: int) -> dict:
        """The fields of an implementation's row."""
        problem, fused = self.problem, name == "fused"
        named = (problem.op, name, problem.shape, problem.layout, problem.dtype_name, direction)
        row = store.row(named, times, problem.device, problem.operations(direction), ceilings)
        accuracy = self.accuracy[name, direction != "forward"]
        for kind, moved in (
            ("", self.moved(name, direction, cache)),
            ("effective_", problem.effective_bytes(direction)),
        ):
            gbps = None if moved is None else moved / row["median_us"] / 1e3
            row |= {f"{kind}bytes": moved, f"{kind}gbps": gbps}
            row[f"{kind}share_of_copy"] = store.share(gbps, ceilings["copy_gbps"])
        row |= {"max_err": accuracy.error, "max_err_eager": accuracy.eager, "max_err_tensor": accuracy.tensor}
        row |= {"wall_us": timing.quantile(times.wall, 0.5) * 1e6}
        row |= {"uses": who_serves(problem, direction) if fused else name}
        return row | {"kernel_hash": sources.kernel_hash(problem.op, row["arch"], name) if name in store.OURS else None}


@dataclass(eq=False)
class KernelBench(Bench):
    """Races of operators: a problem in a direction each.

    Attributes:
        words: that a row must all have. own: the user's "module:function"s. part: every n-th problem from the k-th on.
        models: public ones whose shapes are timed instead.
    """

    ops: tuple[str, ...] = tuple(OPERATORS)
    words: tuple[str, ...] = ()
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    directions: tuple[str, ...] = ("forward", "backward")
    own: tuple[str, ...] = ()
    quick: bool = False
    part: tuple[int, int] = (1, 1)
    models: tuple[str, ...] = ()
    # every single call would make the file ten times larger: quantiles are kept in the row
    keeps_samples = False

    def __post_init__(self):
        present, self.absent = available(list(self.ops), self.device, self.own)
        self.problems: dict[str, tuple[Problem, dict[str, Implementation]]] = {}
        self.calls = public_problems(self.models, self.device, self.quick) if self.models else {}
        every = list(self.calls) or problems(self.device, self.quick)
        for problem in every[self.part[0] - 1 :: self.part[1]]:
            if self.models and problem.op in self.ops and (reason := too_large(problem)):
                self.absent[problem.name] = reason
                continue
            entrants = {i.name: i for i in present if i.op == problem.op and i.serves(problem)}
            self.problems[problem.name] = problem, entrants
            for direction in self.directions:
                full = {name: f"{problem.name} {direction} {name}" for name in entrants}
                names = [name for name, text in full.items() if all(word in text for word in self.words)]
                if names:
                    self.races[problem.name, direction] = names
        self.current: ProblemRace | None = None

    @functools.cached_property
    def clock(self) -> timing.CpuClock | timing.CudaClock:
        return timing.clock(self.device)

    def code(self, race: tuple[str, str], name: str) -> dict:
        op, arch = self.problems[race[0]][0].op, store.environment(self.device)["arch"]
        ours = name in store.OURS
        return {"op": op, "arch": arch, "kernel_hash": sources.kernel_hash(op, arch, name)} if ours else {}

    def run(self, race: tuple[str, str], what: str) -> dict[str, Outcome]:
        try:
            return self.raced(race)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, ArtifactError) or not store.lacks_memory(error):
                raise
            # by no implementation's fault: what all of them are given is too much
            self.current = None
            return dict.fromkeys(self.races[race], f"the race does not fit: {first_line(error)}")

    def raced(self, race: tuple[str, str]) -> dict[str, Outcome]:
        name, direction = race
        if self.current is None or self.current.problem.name != name:
            # its tensors may fill a GPU: gone before the next ones are drawn
            self.current = None
            problem, entrants = self.problems[name]
            asked = {n for other in self.directions for n in self.races.get((name, other), ())}
            self.current = ProblemRace(problem, [i for n, i in entrants.items() if n in asked], self.directions)
        found = self.current
        times, ceilings = found.race(direction, self.clock, timing.QUICK if self.quick else Protocol())

        def outcome(name: str) -> Outcome:
            if (name, direction) in found.wrong:
                return found.wrong[name, direction]
            row = found.row(name, direction, times[name], ceilings, self.clock.cache)
            return times[name].device, row | self.asked(found.problem) | ({"quick": True} if self.quick else {})

        return {name: outcome(name) for name in self.races[race]}

    def renewed(self, row: dict) -> dict:
        """A shape may be another model's, too: the row has the calls of all that asked for it."""
        problem, _ = self.problems[" ".join(row[field] for field in ("op", "shape", "layout", "dtype"))]
        return row | {field: row.get(field, {}) | calls for field, calls in self.asked(problem).items()}

    def asked(self, problem: Problem) -> dict[str, dict[str, int]]:
        """Of public models alone: how often one evaluation of each asks for a problem, and for any of its operator."""
        if not self.calls:
            return {}
        alike = [calls for other, calls in self.calls.items() if (other.op, other.dtype) == (problem.op, problem.dtype)]
        calls = self.calls[problem]
        return {"calls": calls, "calls_of_all": {what: sum(of.get(what, 0) for of in alike) for what in calls}}

    def tables(self, rows: list[dict]) -> dict:
        lines = evaluations(rows)
        return {"one evaluation of each model": (EVALUATION, lines)} if lines else {}


DEFAULT = functools.partial(KernelBench, quick=True)
