"""Every kernel once on every case, for a tool that watches it: memory and race checkers, profilers."""

import torch

from semantica.benchmarks.kernels.implementations import ours
from semantica.benchmarks.kernels.problems import Problem
from semantica.benchmarks.kernels.verify import evaluate
from semantica.kernels import OPERATORS
from semantica.kernels.group_norm.cases import GroupNormCase
from semantica.train.data.noise import noise

# beyond one tile: statistics in chunks, merged by the pass that applies them, and by a launch of their own
SPLIT = [
    GroupNormCase(shape, groups, channels_last=last)
    for shape, groups in (((1, 64, 128, 128), 8), ((2, 30, 67, 129), 3), ((1, 8, 256, 256), 1))
    for last in (False, True)
]


def exercise(device: str) -> int:
    """Forward and backward of every implementation of ours on every case of the tables, and noise; returns how many
    ran."""
    ran = 0
    for name, operator in OPERATORS.items():
        for case in [*operator.cases.values(), *(SPLIT if name == "group_norm" else [])]:
            problem = Problem(name, case, torch.bfloat16, device)
            cotangent = torch.ones_like(operator.output(case, problem.dtype), device=device)
            for implementation in ours(name):
                if implementation.serves(problem):
                    evaluate(implementation.load(), problem.inputs(0), cotangent)
                    ran += 1
    # one program, and several of which the last is cut
    for shape in ((3, 5, 7), (3, 67, 129)):
        noise(0, torch.tensor([1, 2**40], device=device), shape)
        ran += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return ran
