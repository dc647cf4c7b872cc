"""What a call costs the host: check, choice, plan, allocations and start, and with gradients autograd's part.

On a GPU kernels run, and nothing waits for them; elsewhere they are left out, and so is the driver's part of a start.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from semantica.benchmarks.harness.race import quantile
from semantica.benchmarks.harness.table import Column
from semantica.kernels import OPERATORS, dispatch, replay

# calls of one timing, short enough that a GPU's queue does not fill up, and timings
CALLS, TIMINGS = 40, 25


@contextmanager
def planned_on(device: str) -> Iterator[None]:
    """The kernels for GPUs planned on the device, and left out where it is none."""
    if device == "cuda":
        yield
        return
    before = dict(dispatch.KERNELS)
    # what is registered for GPUs serves the processor's tensors
    dispatch.KERNELS.update({(op, "cpu"): kernel for (op, kind), kernel in before.items() if kind == "cuda"})
    try:
        with replay.idle():
            yield
    finally:
        dispatch.KERNELS.clear()
        dispatch.KERNELS.update(before)


class Floor(torch.autograd.Function):
    """What autograd itself takes of as many tensors, with nothing computed."""

    @staticmethod
    def forward(ctx, shape, *tensors):
        ctx.gradients = tensors
        return tensors[0].new_empty(shape)

    @staticmethod
    def backward(ctx, gradient):
        return None, *ctx.gradients


def timings(call: Callable, device: str) -> list[float]:
    """Microseconds of a call, of each timing."""
    found = []
    for _ in range(TIMINGS):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - began) / CALLS * 1e6)
    # the first plans and compiles
    return found[5:]


def calls(name: str, inputs: dict) -> Iterator[tuple[str, Callable, Callable | None]]:
    """What is timed of an operator: its name, the call, and autograd's own part as another."""
    function = OPERATORS[name].function
    yield "forward", lambda: function(**inputs), None
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if differentiable(v)}
    given, tensors = {**inputs, **leaves}, list(leaves.values())
    gradient = torch.ones_like(function(**given))

    def both(of: Callable) -> Callable:
        return lambda: torch.autograd.grad(of(), tensors, gradient)

    yield "forward + backward", both(lambda: function(**given)), both(lambda: Floor.apply(gradient.shape, *tensors))


def differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def run(device: str, ops: tuple[str, ...], words: tuple[str, ...]) -> list[dict]:
    """Rows of every operator's cases whose names have all the words."""
    rows = []
    with planned_on(device):
        for name in ops:
            for label, case in OPERATORS[name].cases.items():
                inputs = case.inputs(torch.float32, device)
                for what, call, floor in calls(name, inputs):
                    if not all(word in f"{name} {label} {what}" for word in words):
                        continue
                    with torch.no_grad() if floor is None else nullcontext():
                        times = timings(call, device)
                    own = quantile(timings(floor, device), 0.5) if floor else 0.0
                    spread = {f"p{q}_us": quantile(times, q / 100) for q in (20, 50, 80)}
                    rows.append({"op": name, "case": label, "call": what, **spread, "autograd_us": own})
    return rows


COLUMNS = (
    Column("operator", "{op}"),
    Column("case", "{case}"),
    Column("call", "{call}"),
    Column("median us", "{p50_us:.1f}"),
    Column("p20 - p80", "{p20_us:.1f} - {p80_us:.1f}"),
    Column("of it autograd's", "{autograd_us:.1f}"),
)
