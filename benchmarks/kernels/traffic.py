"""Who serves a problem of the operators, and how many bytes that moves: what stands beside the times of a row."""

import math

import torch

from semantica.benchmarks.kernels.implementations import in_cuda, sizes_in_cuda
from semantica.benchmarks.kernels.problems import Problem
from semantica.kernels import cuda, launch
from semantica.kernels.dispatch import PLAIN

CUDA, TRITON = "CUDA", "Triton"


def parts(direction: str) -> tuple[str, ...]:
    return ("forward", "backward") if direction == "both" else (direction,)


def who_serves(problem: Problem, direction: str) -> str:
    """What the public operator runs on the problem's device; of both directions both, where they differ."""
    registered = problem.operator.implementations[problem.device][0]
    return ", ".join(dict.fromkeys(CUDA if by_cuda(problem, part) else registered for part in parts(direction)))


def by_cuda(problem: Problem, direction: str) -> bool:
    """Whether the table of choices leaves a problem to the CUDA kernels."""
    if problem.op != "group_norm" or problem.device != "cuda":
        return False
    from semantica.kernels.group_norm.cuda import CHOICE

    case, arch = problem.case, launch.architecture(torch.device("cuda", 0))
    size = math.prod(case.shape) * problem.dtype.itemsize
    return cuda.has_rows(CHOICE) and cuda.chosen(CHOICE, direction, arch, case.layout, size) and in_cuda(problem)


def bytes_moved(problem: Problem, name: str, direction: str, cache: int) -> int | None:
    """Bytes that one of the package's own implementations really moves; None where nobody knows."""
    found = [moved_one_way(problem, name, part, cache) for part in parts(direction)]
    return None if None in found else sum(found)


def moved_one_way(problem: Problem, name: str, direction: str, cache: int) -> int | None:
    who = {"triton": TRITON, "cuda": CUDA}.get(name) or who_serves(problem, direction)
    if who == PLAIN[0]:
        return None
    if who == CUDA:
        return by_plan(problem, direction)
    if who == TRITON and problem.op == "group_norm" and reads_once(problem, direction):
        return problem.effective_bytes(direction)
    return problem.two_pass_bytes(direction, cache)


def by_plan(problem: Problem, direction: str) -> int:
    """Of the CUDA kernels: as the plan reckons it."""
    from semantica.kernels.group_norm import cuda as calls

    device, operands = torch.device("cuda", 0), 1 if direction == "forward" else 2
    sizes = sizes_in_cuda(problem)
    return calls.planned(sizes, operands, device).traffic(sizes, operands, calls.card(device))


def reads_once(problem: Problem, direction: str) -> bool:
    """Whether Triton's kernels hold whole groups in registers."""
    from semantica.kernels.group_norm.tiles import Sizes, resident

    shape, last = problem.case.shape, problem.case.channels_last
    sizes = Sizes(*shape[:2], math.prod(shape[2:]), problem.case.groups, last, 16 // problem.dtype.itemsize)
    kernel = "resident" if direction == "forward" else "resident_backward"
    return resident(sizes, kernel, torch.device(problem.device)) is not None
