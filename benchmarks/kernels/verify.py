"""Accuracy first: whether a result is right, really computed now, and complete when the call says so.

An implementation is refused when its output or a gradient is further from float64 than a small multiple (the
operators': 2) of eager torch's error on contiguous input plus one unit in the last place of the type that it is given;
when it returns an earlier result, leaves memory unwritten, writes to an input, or still works after the call (on
another stream or thread), where no clock would see it.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from semantica.benchmarks.harness.process import Wrong
from semantica.benchmarks.kernels.problems import Problem

# two contents, so that no result can be right twice
CONTENTS = 2
# about 10 ms of a GPU's clock: long enough for whoever does not wait to be early
SLEEP_CYCLES = 20_000_000
# seconds: more than the work of another stream may go on, and what another thread is given
LATE, PATIENCE = 50e-6, 0.02


@dataclass(frozen=True)
class Accuracy:
    """Largest error of an implementation against float64, and eager's own, in the tensor where they differ most."""

    tensor: str
    error: float
    eager: float


@dataclass(frozen=True)
class Answers:
    """A problem's contents, and for each the truth (float64) and eager's result on contiguous input."""

    problem: Problem
    inputs: list[dict]
    cotangents: list[Tensor]
    truth: list[dict[str, Tensor]]
    eager: list[dict[str, Tensor]]

    @classmethod
    def of(cls, problem: Problem, gradients: bool) -> "Answers":
        inputs = [problem.inputs(seed) for seed in range(CONTENTS)]
        out, reference = problem.operator.output(problem.case, problem.dtype), problem.operator.reference
        cotangents, truth, eager = [], [], []
        for seed, arguments in enumerate(inputs):
            g = torch.Generator().manual_seed(CONTENTS + seed)
            draw = torch.randn(out.shape, generator=g, dtype=torch.float32).to(problem.device, out.dtype)
            # laid out as the output is
            cotangents.append(torch.empty_like(out, device=problem.device).copy_(draw))
            wide = each(arguments, lambda t: t.double() if t.is_floating_point() else t)
            plain = each(arguments, lambda t: t.contiguous())
            back = cotangents[-1] if gradients else None
            truth.append(evaluate(reference, wide, None if back is None else back.double()))
            eager.append(evaluate(reference, plain, None if back is None else back.contiguous()))
        return cls(problem, inputs, cotangents, truth, eager)

    def judge(
        self, content: int, actual: dict[str, Tensor], leeway: float, least: float = 0.0, ulps: int = 1
    ) -> Accuracy:
        """How accurate results are; their errors may be `leeway` times eager's, and `ulps` units in the last place of
        the problem's type or `least` of a tensor's largest value, whichever is more.

        The problem's type, also where a result is in fp32: what sums up 16-bit numbers for matrix units rounds them.

        Raises:
            Wrong: less accurate than the rule allows, or of another dtype or shape.
        """
        worst, worst_ratio = None, -1.0
        for name, result in actual.items():
            exact, eager = self.truth[content][name], self.eager[content][name]
            if result is None or result.shape != exact.shape or result.dtype != eager.dtype:
                got = "nothing" if result is None else f"{tuple(result.shape)} {result.dtype}"
                raise Wrong(f"{name} is {got}: expected {tuple(exact.shape)} {eager.dtype}")
            largest = max(exact.abs().max().item(), 1e-6)
            ulp = torch.finfo(self.problem.dtype).eps * largest
            error, own = ((r.double() - exact).abs().max().item() for r in (result, eager))
            # written so that NaN fails
            if not error <= leeway * own + max(ulps * ulp, least * largest):
                raise Wrong(f"{name} is wrong: error {error:.3g} against float64, eager's is {own:.3g}")
            if error / (own + ulp) > worst_ratio:
                worst, worst_ratio = Accuracy(name, error, own), error / (own + ulp)
        return worst


def each(arguments: dict, change: Callable[[Tensor], Tensor]) -> dict:
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def tensors(arguments: dict) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor)}


def as_leaves(arguments: dict, gradients: bool = True) -> dict:
    """The same storages as leaves of a graph."""
    return each(arguments, lambda t: t.detach().requires_grad_(gradients and t.is_floating_point()))


def evaluate(function: Callable, arguments: dict, cotangent: Tensor | None) -> dict[str, Tensor]:
    """`{"out": ..., name of each floating-point input: its gradient}`; the output alone without a cotangent."""
    arguments = as_leaves(arguments, cotangent is not None)
    out = function(**arguments)
    if cotangent is None:
        return {"out": out}
    leaves = {k: v for k, v in tensors(arguments).items() if v.requires_grad}
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, up to the kind of NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextlib.contextmanager
def poisoned(device: str, sizes: list[int], fill: bool) -> Iterator[None]:
    """Within, memory that is allocated holds NaN: by torch's own filling, or because freed blocks do."""
    blocks = [torch.full((n // 4,), torch.nan, device=device) for n in sizes for _ in range(4)]
    del blocks
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if fill:
            # what uninitialised memory is filled by; operators that are not deterministic only warn
            torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def verify(
    function: Callable,
    answers: Answers,
    gradients: bool,
    leeway: float,
    compiled: bool = False,
    least: float = 0.0,
    ulps: int = 1,
) -> Accuracy:
    """The accuracy of an implementation's output, with `gradients` of its gradients, over all contents.

    leeway, least, ulps: see `Answers.judge`. compiled: whether other global settings would compile it again.

    Raises:
        Wrong: it must not be timed.
    """
    buffers = each(answers.inputs[0], torch.clone)
    device, found = answers.problem.device, []
    sizes = sorted({t.nbytes for t in answers.eager[0].values() if t.nbytes >= 4})
    for content, given in enumerate(answers.inputs):
        cotangent = answers.cotangents[content] if gradients else None
        # torch's own filling is a global setting that compiled code is specialised on
        with poisoned(device, sizes, fill=not compiled and content == 0):
            result, snapshot, late = call_late(function, buffers, given, cotangent, device)
        for name, kept in snapshot.items():
            if kept is not None and not same(kept, result[name]):
                raise Wrong(f"{name} changed after the call had returned: work on another stream or thread")
        # once may be the system's doing
        if late > LATE and min(call_late(function, buffers, given, cotangent, device)[2] for _ in range(3)) > LATE:
            raise Wrong(f"work went on for {late * 1e6:.0f} us after the current stream was done: another stream")
        for name, before in tensors(given).items():
            if not same(before, buffers[name]):
                raise Wrong(f"it changed its input {name}")
        found.append(answers.judge(content, snapshot, leeway, least, ulps))
    return max(found, key=lambda accuracy: accuracy.error / max(accuracy.eager, 1e-30))


def call_late(function, buffers, given, cotangent, device) -> tuple[dict, dict, float]:
    """Results, a copy of them taken at once, and for how many seconds the device went on after the stream was done.

    The inputs are written just before, in stream order: who does not wait for them reads NaN.
    """
    for tensor in tensors(buffers).values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
    for name, tensor in tensors(buffers).items():
        tensor.copy_(given[name])
    result = evaluate(function, buffers, cotangent)
    snapshot = {name: None if t is None else t.clone() for name, t in result.items()}
    if not cuda:
        time.sleep(PATIENCE)
        return result, snapshot, 0.0
    end = torch.cuda.Event()
    end.record()
    end.synchronize()
    marks = [time.perf_counter()]
    for _ in range(2):
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
    # less what it takes to synchronise with an idle device
    return result, snapshot, marks[1] - marks[0] - (marks[2] - marks[1])
