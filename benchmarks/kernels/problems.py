"""What is timed: each operator at the shapes of the presets, of the published figures, and of small machines."""

import dataclasses
import math
from collections.abc import Callable
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
    dtypes = [torch.bfloat16]
    if device == "cpu":
        dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    # a preset's case may be a published figure's too
    found = dict.fromkeys((op, case) for op, operator in OPERATORS.items() for case in timed(operator, device, quick))
    return [Problem(op, case, dtype, device) for op, case in found for dtype in dtypes]
