"""What is timed: each operator at the shapes of the presets, of published figures, and of public models."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from semantica.kernels import OPERATORS, Case, Operator
from semantica.kernels.cross_attention.cases import CrossAttentionCase
from semantica.kernels.group_norm.cases import GroupNormCase
from semantica.model.presets import PRESETS


@dataclass(frozen=True)
class Problem:
    """An operator's case in one dtype on one device."""

    op: str
    case: Case
    dtype: torch.dtype
    device: str

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.op]

    @property
    def shape(self) -> str:
        return self.case.description

    @property
    def layout(self) -> str:
        return self.case.layout

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.layout} {self.dtype_name}"

    def inputs(self, seed: int) -> dict:
        """Keyword arguments of the operator, drawn from a seed."""
        return self.case.inputs(self.dtype, self.device, seed)

    def operations(self, direction: str) -> int:
        """Floating-point operations, a multiply-add counted as 2."""
        return self.operator.flops(self.case, direction)

    def effective_bytes(self, direction: str) -> int:
        """Least traffic: every input read once, every result written once."""
        return self.operator.bytes(self.case, self.dtype, direction)

    def two_pass_bytes(self, direction: str, cache: int) -> int:
        """Traffic of a kernel that fuses everything: some read what exceeds the cache a second time."""
        return self.effective_bytes(direction) + self.case.reread_bytes(self.dtype, direction, cache)


def norms(preset: str, batch: int) -> list[GroupNormCase]:
    """The norms of a preset's U-ViT: each level, then its concatenation with the skip."""
    settings, cases = PRESETS[preset], []
    side = settings["image_size"] // settings["patch_size"]
    for channels in settings["channels"]:
        cases.append(GroupNormCase((batch, channels, side, side), math.gcd(32, channels)))
        cases.append(GroupNormCase((batch, 2 * channels, side, side), math.gcd(32, 2 * channels), film=False))
        side //= 2
    # GPUs run the network channels-last
    return cases if preset in BATCHES["cpu"] else [dataclasses.replace(case, channels_last=True) for case in cases]


def attention(preset: str, batch: int) -> list[CrossAttentionCase]:
    """The cross-attention of a preset's U-ViT."""
    settings = PRESETS[preset]
    side = settings["image_size"] // settings["patch_size"] >> len(settings["channels"])
    tokens, dim = settings["encoder"]["grid"] ** 2, settings["width"] // settings["heads"]
    return [CrossAttentionCase(batch, side**2, settings["heads"], dim, (tokens,))]


# operators that the network calls: their cases from a preset's name and a batch
PRESET_CASES: dict[str, Callable[[str, int], list[Case]]] = {"group_norm": norms, "cross_attention": attention}
BATCHES = {"cpu": {"tiny": 32}, "cuda": {"small": 64, "base": 8, "large": 8}}


def timed(operator: Operator, device: str, quick: bool) -> list[Case]:
    cases = list(operator.timed(device, quick) if operator.timed else operator.cases.values())
    if not quick and operator.name in PRESET_CASES:
        for preset, batch in BATCHES[device].items():
            cases += PRESET_CASES[operator.name](preset, batch)
    return cases


def problems(device: str, quick: bool) -> list[Problem]:
    """Every problem for a kind of device; `quick` takes a few small ones."""
    # a preset's case may be a published figure's too
    found = dict.fromkeys((op, case) for op, operator in OPERATORS.items() for case in timed(operator, device, quick))
    return in_dtypes(found, device, quick)


def in_dtypes(found: Iterable[tuple[str, Case]], device: str, quick: bool) -> list[Problem]:
    dtypes = [torch.bfloat16]
    if device == "cpu":
        dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    return [Problem(op, case, dtype, device) for op, case in found for dtype in dtypes]


def public_problems(models: Iterable[str], device: str, quick: bool) -> dict[Problem, dict[str, int]]:
    """The problems of public models, each with how often one evaluation of what asks for it, see `public.counts`.

    Raises:
        UserError: an unknown model.
    """
    from semantica.benchmarks.kernels.public import counts

    found: dict[tuple[str, Case], Counter[str]] = {}
    for model in models:
        for what, calls in counts(model).items():
            for asked, count in calls.items():
                found.setdefault(asked, Counter())[what] += count
    return {problem: dict(found[problem.op, problem.case]) for problem in in_dtypes(found, device, quick)}


# a race holds two contents and three sets of buffers, results and gradients in float64 and in the problem's own type
BYTES_EACH = 120


def too_large(problem: Problem) -> str:
    """Why the memory of the device does not hold a race; empty where it does."""
    if problem.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = BYTES_EACH * problem.effective_bytes("forward") // (2 * problem.dtype.itemsize)
    return f"needs some {needed >> 30} GiB, there are {memory >> 30}" if needed > memory else ""
