"""What is timed: each operator at the shapes of the presets, of the published figures, and of small machines."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from semantica.kernels import cross_attention_ref, group_norm_ref
from semantica.kernels.cases import CrossAttentionCase, GroupNormCase
from semantica.model.presets import PRESETS

OPS = ("group_norm", "cross_attention")
DIRECTIONS = ("forward", "backward", "both")
# nominal operations per element: two statistics (4), normalise (2), affine (2), FiLM (2), SiLU (4); twice that back
GROUP_NORM_OPERATIONS = {"forward": 14, "backward": 28, "both": 42}
# matrix products of 2 * N * M * D operations: scores and output; the scores again, dP, dQ, dK, dV
MATRIX_PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


@dataclass(frozen=True)
class Problem:
    """An operator's case in one dtype on one device."""

    op: str
    case: GroupNormCase | CrossAttentionCase
    dtype: torch.dtype
    device: str

    @property
    def shape(self) -> str:
        case = self.case
        if isinstance(case, GroupNormCase):
            parts = [
                "x".join(map(str, case.shape)),
                f"G{case.groups}",
                "film" * case.film,
                "silu" * (case.activation == "silu"),
            ]
            return " ".join(filter(None, parts))
        keys = "+".join(map(str, case.sizes))
        parts = [f"B{case.batch} N{case.queries} M{keys} H{case.heads} D{case.dim}", "gates" * case.gates]
        return " ".join(filter(None, [*parts, "lengths" * (case.lengths is not None)]))

    @property
    def layout(self) -> str:
        if isinstance(self.case, GroupNormCase):
            return "channels_last" if self.case.channels_last else "contiguous"
        return "strided" if self.case.strided else "contiguous"

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
        case = self.case
        if isinstance(case, GroupNormCase):
            return GROUP_NORM_OPERATIONS[direction] * math.prod(case.shape)
        product = 2 * case.batch * case.heads * case.queries * sum(case.sizes) * case.dim
        return MATRIX_PRODUCTS[direction] * product

    def effective_bytes(self, direction: str) -> int:
        """Least traffic: every input read once, every result written once."""
        inputs = {k: v for k, v in self._on_meta().items() if isinstance(v, Tensor)}
        given = sum(v.nbytes for v in inputs.values())
        out = inputs["x" if self.op == "group_norm" else "q"].nbytes
        gradients = sum(v.nbytes for v in inputs.values() if v.is_floating_point())
        forward, backward = given + out, given + out + gradients
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def two_pass_bytes(self, direction: str, cache: int) -> int:
        """Traffic of a kernel that fuses everything: GroupNorm reads what exceeds the cache a second time."""
        least = self.effective_bytes(direction)
        if self.op != "group_norm":
            return least
        x = math.prod(self.case.shape) * self.dtype.itemsize
        again = {"forward": x, "backward": 2 * x, "both": 3 * x}[direction]
        return least + (again if x > cache else 0)

    def _on_meta(self) -> dict:
        # shapes alone: values are drawn where they are needed
        with torch.device("meta"):
            case = self.case
            if isinstance(case, GroupNormCase):
                batch, channels = case.shape[:2]
                film = dict.fromkeys(("scale", "shift"), (batch, channels)) if case.film else {}
                shapes = {"x": case.shape, "weight": (channels,), "bias": (channels,), **film}
            else:
                keys = (case.batch, sum(case.sizes), case.heads, case.dim)
                shapes = {"q": (case.batch, case.queries, case.heads, case.dim), "k": keys, "v": keys}
                shapes |= {"gates": (case.batch, len(case.sizes), case.heads)} if case.gates else {}
                shapes |= {"q_weight": (case.dim,)} if case.q_norm else {}
            return {name: torch.empty(shape, dtype=self.dtype) for name, shape in shapes.items()}


def reference(op: str) -> Callable[..., Tensor]:
    """The plain-torch meaning of an operator, called with the arguments that `Problem.inputs` draws."""
    if op == "group_norm":
        return lambda **arguments: group_norm_ref(**arguments, eps=1e-5)
    return cross_attention_ref


def preset_cases(name: str, batch: int) -> Iterator[tuple[str, GroupNormCase | CrossAttentionCase]]:
    """The norms and the cross-attention of a preset's U-ViT: each level, then its concatenation with the skip."""
    settings = PRESETS[name]
    side = settings["image_size"] // settings["patch_size"]
    for channels in settings["channels"]:
        yield "group_norm", GroupNormCase((batch, channels, side, side), math.gcd(32, channels))
        yield "group_norm", GroupNormCase((batch, 2 * channels, side, side), math.gcd(32, 2 * channels), film=False)
        side //= 2
    dim = settings["width"] // settings["heads"]
    yield (
        "cross_attention",
        CrossAttentionCase(batch, side**2, settings["heads"], dim, (64 if name == "tiny" else 256,)),
    )


def both_layouts(case: GroupNormCase) -> list[GroupNormCase]:
    return [case, dataclasses.replace(case, channels_last=True)]


def problems(device: str, quick: bool) -> list[Problem]:
    """Every problem for a kind of device; `quick` takes a few small ones."""
    if quick:
        norms = both_layouts(GroupNormCase((2, 64, 32, 32), 32))
        attention = [CrossAttentionCase(2, 64, 3, 64, (64,)), CrossAttentionCase(1, 64, 3, 64, (48, 19), gates=True)]
        cases = [("group_norm", c) for c in norms] + [("cross_attention", c) for c in attention]
        dtypes = [torch.float32 if device == "cpu" else torch.bfloat16]
    elif device == "cpu":
        shapes = ((8, 128, 64, 64), (2, 320, 64, 64), (1, 128, 256, 256), (16, 512, 16, 16))
        cases = [("group_norm", c) for shape in shapes for c in both_layouts(GroupNormCase(shape, 32))]
        cases += preset_cases("tiny", 32)
        cases += [("cross_attention", c) for c in (
            CrossAttentionCase(2, 256, 8, 64, (257,)),
            CrossAttentionCase(2, 256, 8, 64, (256, 77), gates=True),
            CrossAttentionCase(2, 256, 8, 64, (256, 77), ((256, 40), (256, 0)), gates=True),
        )]  # fmt: skip
        dtypes = [torch.float32, torch.bfloat16]
    else:
        # the shapes of published figures, then what the presets run: a batch of 8 is four pictures with guidance
        shapes = ((1, 320, 64, 64), (8, 320, 64, 64), (8, 640, 32, 32), (1, 128, 20, 256, 256), (13, 18, 512, 512))
        groups = {18: 6}
        norms = [GroupNormCase(s, groups.get(s[1], 32), film=s[0] == 8) for s in shapes]
        cases = [("group_norm", c) for norm in norms for c in both_layouts(norm)]
        attention = (
            CrossAttentionCase(16, 256, 32, 128, (256,), q_norm=False),
            CrossAttentionCase(4, 576, 16, 64, (576,), q_norm=False),
            CrossAttentionCase(1, 1344, 16, 64, (257,), q_norm=False),
            CrossAttentionCase(8, 256, 16, 64, (257,)),
            CrossAttentionCase(8, 256, 16, 64, (256, 77), gates=True),
            CrossAttentionCase(8, 256, 16, 64, (256, 77), ((256, 40), (256, 0)) * 4, gates=True),
            CrossAttentionCase(8, 1024, 16, 64, (256,)),
        )
        cases += [("cross_attention", c) for c in attention]
        for name, batch in (("small", 64), ("base", 8), ("large", 8)):
            for op, case in preset_cases(name, batch):
                last = op == "group_norm"
                cases.append((op, dataclasses.replace(case, channels_last=True) if last else case))
        dtypes = [torch.bfloat16]
    found = dict.fromkeys(Problem(op, case, dtype, device) for op, case in cases for dtype in dtypes)
    return sorted(found, key=lambda problem: OPS.index(problem.op))
