"""`group_norm` through the CUDA kernels of `semantica._cuda`: tensors whose channels are innermost in memory.

What it computes and what it returns is what the Triton kernels do; a call that it does not serve goes to them.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from semantica.kernels import cuda
from semantica.kernels.group_norm.cuda_plan import ACCESS, Limits, Plan, plan

CHOICE = Path(__file__).with_name("choice.json")
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def channels_innermost(x: Tensor) -> bool:
    """Whether memory is `[B, *spatial, C]`, spatial in any order, and dense."""
    spatial = sorted(range(2, x.ndim), key=x.stride, reverse=True)
    return x.permute(0, *spatial, 1).is_contiguous()


def sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Samples, channels, groups, pixels."""
    samples, channels = x.shape[:2]
    return samples, channels, groups, x.numel() // (samples * channels)


@functools.cache
def limits(device: torch.device) -> Limits:
    """Of a card, and of the code that it runs: clusters are in what was compiled for sm_90a and newer."""
    card, (version, _) = torch.cuda.get_device_properties(device), cuda.code(device)
    # 16 must be asked for, and data-centre cards alone have them
    cluster = 1 if version < 90 else 16 if version < 120 else 8
    return Limits(card.multi_processor_count, card.shared_memory_per_block_optin, cluster)


@functools.cache
def planned(of: tuple[int, int, int, int], itemsize: int, operands: int, device: torch.device) -> Plan | None:
    return plan(*of, itemsize, operands, limits(device))


def can(x: Tensor, groups: int, operands: int) -> bool:
    """Whether the kernels compute this call on this card."""
    if not cuda.code(x.device)[0] or not channels_innermost(x) or x.data_ptr() % ACCESS:
        return False
    return planned(sizes(x, groups), x.element_size(), operands, x.device) is not None


def serves_forward(x: Tensor, groups: int, *rest) -> bool:
    """Whether the table prefers these kernels to Triton's for a call, and they can compute it."""
    return cuda.chosen(CHOICE, "forward", x, "channels_last") and can(x, groups, 1)


def serves_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, *rest) -> bool:
    """As `serves_forward`."""
    return cuda.chosen(CHOICE, "backward", x, "channels_last") and can(x, groups, 2)


@functools.cache
def call(of: tuple[int, int, int, int], types: tuple[str, str, str], silu: bool, made: Plan, device: torch.device):
    """What is alike for all calls of these sizes: made once, since it costs more than a launch."""
    names = dict(zip(("samples", "channels", "groups", "pixels"), of)) | dict(zip(("type", "affine", "film"), types))
    return cuda.module().GroupNorm(device=index(device), silu=silu, **names, **vars(made))


def index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def stream(device: torch.device) -> int:
    """The current one, as CUDA knows it."""
    return torch.cuda.current_stream(device).cuda_stream


def alike(*values: Tensor | None) -> list[Tensor | None]:
    """All of one type and dense: fp32 where they are of several."""
    given = {a.dtype for a in values if a is not None}
    dtype = given.pop() if len(given) == 1 else torch.float32
    return [None if a is None else a.to(dtype).contiguous() for a in values]


def type_of(*values: Tensor | None) -> str:
    return next((NAMES[a.dtype] for a in values if a is not None), "float32")


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def prepared(x, groups, activation, affine, film, operands):
    """The call, and its workspace."""
    of = sizes(x, groups)
    made = planned(of, x.element_size(), operands, x.device)
    types = NAMES[x.dtype], type_of(*affine), type_of(*film)
    words = made.workspace(of[0], of[1], operands)
    workspace = x.new_empty(words, dtype=torch.float32) if words else None
    return call(of, types, activation == "silu", made, x.device), workspace


def forward(x, groups, weight, bias, scale, shift, activation, eps, addend=None):
    """y like `x`, mean and 1/std `[B, groups]` in fp32; `can(x, groups, 1)`."""
    y, mean, rstd = torch.empty_like(x), *(x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    affine, film = alike(weight, bias), alike(scale, shift, addend)
    kernel, workspace = prepared(x, groups, activation, affine, film, 1)
    inputs = map(address, (x, *affine, *film))
    kernel.forward(stream(x.device), *inputs, eps, *map(address, (y, mean, rstd, workspace)))
    return y, mean, rstd


def backward(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend=None):
    """Gradients of x, weight, bias, scale, shift and addend, absent ones empty; `can(x, groups, 2)`."""
    # whatever a consumer's memory looks like, as long as it is that of x
    if dy.stride() != x.stride() or dy.data_ptr() % ACCESS:
        dy = torch.empty_like(x).copy_(dy)
    dx, affine, film = torch.empty_like(x), alike(weight, bias), alike(scale, shift, addend)
    gradients = [None if a is None else torch.empty_like(a) for a in (*affine, *film)]
    partial = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
    kernel, workspace = prepared(x, groups, activation, affine, film, 2)
    inputs = map(address, (dy, x, mean, rstd, *affine, *film))
    kernel.backward(stream(x.device), *inputs, *map(address, (dx, *gradients, partial, workspace)))
    pairs = zip(gradients, (weight, bias, scale, shift, addend), strict=True)
    return dx, *(x.new_empty(0) if a is None else g.to(a.dtype) for g, a in pairs)
