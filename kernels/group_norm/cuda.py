"""`group_norm` through the CUDA kernels of `semantica._cuda`: of tensors whose channels or pixels lie side by side.

What it computes and what it returns is what the Triton kernels do; a call that it does not serve goes to them.
"""

import dataclasses
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from semantica.kernels import cuda, launch
from semantica.kernels.group_norm.cuda_plan import ACCESS, LARGEST, Card, Plan, Problem, plan

CHOICE = Path(__file__).with_name("choice.json")
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@functools.cache
def layout_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> str | None:
    """ "contiguous" or "channels_last", spatial dimensions in any order; None where memory is neither, or has gaps."""
    spatial = sorted(range(2, len(shape)), key=strides.__getitem__, reverse=True)
    for name, order in (("contiguous", (0, 1, *spatial)), ("channels_last", (0, *spatial, 1))):
        step = 1
        for axis in reversed(order):
            if shape[axis] > 1 and strides[axis] != step:
                break
            step *= shape[axis]
        else:
            return name
    return None


@functools.cache
def problem_of(shape: tuple[int, ...], strides: tuple[int, ...], groups: int, itemsize: int, aligned: bool) -> Problem:
    samples, channels, *spatial = shape
    last = layout_of(shape, strides) == "channels_last"
    return Problem(samples, channels, groups, math.prod(spatial), itemsize, last, aligned)


def layout(x: Tensor) -> str | None:
    return layout_of(x.shape, x.stride())


def problem(x: Tensor, groups: int) -> Problem:
    return problem_of(x.shape, x.stride(), groups, x.element_size(), x.data_ptr() % ACCESS == 0)


@functools.cache
def card(device: torch.device) -> Card:
    """Limits of a card, with the capability of the code that it runs: clusters are in what was compiled for sm_90a."""
    limits, (version, _) = torch.cuda.get_device_properties(device), cuda.code(device)
    found = Card(
        divmod(version, 10),
        limits.multi_processor_count,
        limits.shared_memory_per_block_optin,
        limits.shared_memory_per_multiprocessor,
        limits.L2_cache_size,
    )
    return dataclasses.replace(found, clusters=clusters(found, device)) if found.has_clusters else found


def clusters(found: Card, device: torch.device) -> tuple[int, ...]:
    """How many of each size run at once: how multiprocessors are grouped differs from card to card of one model, and
    with what a card is partitioned into."""
    ask = functools.partial(cuda.module().clusters, device=index(device), threads=found.threads, shared=found.shared)
    sizes = (2**i for i in range(LARGEST.bit_length()))
    return tuple(found.multiprocessors if size == 1 else ask(blocks=size) for size in sizes)


@functools.cache
def planned(of: Problem, operands: int, device: torch.device) -> Plan | None:
    return plan(of, operands, card(device))


def can(x: Tensor, groups: int, operands: int) -> bool:
    """Whether the kernels compute this call on this card."""
    if not cuda.code(x.device)[0] or layout(x) is None:
        return False
    return planned(problem(x, groups), operands, x.device) is not None


def chosen(direction: str, x: Tensor) -> bool:
    return cuda.chosen(CHOICE, direction, launch.architecture(x.device), layout(x), x.nbytes)


def serves_forward(x: Tensor, groups: int, *rest) -> bool:
    """Whether the table prefers these kernels to Triton's for a call, and they can compute it."""
    return chosen("forward", x) and can(x, groups, 1)


def serves_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, *rest) -> bool:
    """As `serves_forward`."""
    return chosen("backward", x) and can(x, groups, 2)


@functools.cache
def call(
    of: Problem,
    operands: int,
    dtype: torch.dtype,
    silu: bool,
    f32: tuple[bool, ...],
    strides: tuple[int, ...],
    device: torch.device,
):
    """What is alike for all calls of these sizes, made once since it costs more than a launch; and its workspace."""
    made = planned(of, operands, device)
    sizes = {name: getattr(of, name) for name in ("samples", "channels", "groups", "pixels", "channels_last")}
    cut = {name: value for name, value in vars(made).items() if name != "items"}
    values = {"type": NAMES[dtype], "silu": silu, "f32": f32, "strides": strides}
    kernel = cuda.module().GroupNorm(device=index(device), **sizes, **values, **cut)
    return kernel, made.workspace(of, operands)


def index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def stream(device: torch.device) -> int:
    """The current one, as CUDA knows it."""
    return torch.cuda.current_stream(device).cuda_stream


def rows(a: Tensor | None) -> Tensor | None:
    """With channels side by side; samples may be further apart, as in views of one tensor."""
    return a if a is None or a.stride(-1) == 1 else a.contiguous()


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def prepared(x, groups, activation, values, operands):
    """The call, and its workspace."""
    f32 = tuple(a is not None and a.dtype == torch.float32 for a in values)
    strides = tuple(0 if a is None or a.ndim == 1 else a.stride(0) for a in values)
    kernel, words = call(problem(x, groups), operands, x.dtype, activation == "silu", f32, strides, x.device)
    return kernel, x.new_empty(words, dtype=torch.float32) if words else None


def forward(x, groups, weight, bias, scale, shift, activation, eps, addend=None):
    """y like `x`, mean and 1/std `[B, groups]` in fp32; `can(x, groups, 1)`."""
    y, mean, rstd = torch.empty_like(x), *(x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    values = list(map(rows, (weight, bias, scale, shift, addend)))
    kernel, workspace = prepared(x, groups, activation, values, 1)
    kernel.forward(stream(x.device), *map(address, (x, *values)), eps, *map(address, (y, mean, rstd, workspace)))
    return y, mean, rstd


def backward(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend=None):
    """Gradients of x, weight, bias, scale, shift and addend, absent ones empty; `can(x, groups, 2)`."""
    # whatever a consumer's memory looks like, as long as it is that of x
    if dy.stride() != x.stride() or dy.data_ptr() % ACCESS:
        dy = torch.empty_like(x).copy_(dy)
    dx, values = torch.empty_like(x), list(map(rows, (weight, bias, scale, shift, addend)))
    gradients = [x.new_empty(0) if a is None else a.new_empty(a.shape) for a in values]
    kernel, workspace = prepared(x, groups, activation, values, 2)
    # an empty one has no address
    outputs = map(address, (dx, *gradients, workspace))
    kernel.backward(stream(x.device), *map(address, (dy, x, mean, rstd, *values)), *outputs)
    return dx, *gradients
