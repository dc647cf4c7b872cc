"""`group_norm` on the CPU through `semantica._C`: vectors of the processor's own width, all of torch's threads."""

import functools
import math

import torch
from torch import Tensor

from semantica import _C
from semantica.kernels.group_norm.op import over_pixels

TARGET = _C.group_norm_targets()[0]
# torch's names of the layout with channels innermost
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def forward(
    x, groups, weight, bias, scale, shift, activation, eps, addend=None, target: str = TARGET
) -> tuple[Tensor, Tensor, Tensor]:
    """Result like `x`, mean and 1/std `[B, groups]` in fp32; `x` is fp32 or bf16 and not empty."""
    y, mean, rstd = torch.empty_like(x), *(x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    source, channels_last = dense(x)
    # memory that is neither contiguous nor channels-last is written on the way back
    result = y if y.stride() == source.stride() else torch.empty_like(source)
    parameters = [None if a is None else plain(a) for a in (weight, bias, scale, shift, addend)]
    _C.group_norm_forward(
        shape(source, groups, channels_last, activation, target),
        *map(address, (source, result, mean, rstd, *parameters)),
        eps,
    )
    return (y if result is y else y.copy_(result)), mean, rstd


def backward(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend=None, target: str = TARGET):
    """Gradients of x, weight, bias, scale, shift, addend; absent ones are empty."""
    dx = torch.empty_like(x)
    source, channels_last = dense(x)
    dy = dy if dy.stride() == source.stride() else torch.empty_like(source).copy_(dy)
    result = dx if dx.stride() == source.stride() else torch.empty_like(source)
    parameters = [None if a is None else plain(a) for a in (weight, bias, scale, shift, addend)]
    gradients = [None if a is None else torch.empty_like(a) for a in parameters[:4]]
    _C.group_norm_backward(
        shape(source, groups, channels_last, activation, target),
        *map(address, (dy, source, mean, rstd, *parameters, result, *gradients)),
    )
    dx = dx if result is dx else dx.copy_(result)
    given = weight, bias, scale, shift
    others = (x.new_empty(0) if a is None else as_type(g, a.dtype) for g, a in zip(gradients, given, strict=True))
    return dx, *others, over_pixels(dx, addend)


# what follows looks before it asks torch, whose every answer costs as much as thousands of values


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """`x` with its values in one of the two layouts, copied if need be, and whether that is channels-last."""
    if x.is_contiguous():
        return x, False
    if x.is_contiguous(memory_format=LAST[x.ndim]) if x.ndim in LAST else x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


def plain(a: Tensor) -> Tensor:
    return a if a.dtype == torch.float32 and a.is_contiguous() else a.to(torch.float32).contiguous()


def as_type(a: Tensor, dtype: torch.dtype) -> Tensor:
    return a if a.dtype == dtype else a.to(dtype)


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def shape(x: Tensor, groups: int, channels_last: bool, activation: str, target: str) -> _C.GroupNormShape:
    threads = torch.get_num_threads()
    return described(x.shape, groups, channels_last, activation == "silu", x.dtype == torch.bfloat16, threads, target)


@functools.lru_cache(maxsize=1024)
def described(
    size: torch.Size, groups: int, channels_last: bool, silu: bool, bfloat16: bool, threads: int, target: str
) -> _C.GroupNormShape:
    return _C.GroupNormShape(
        batch=size[0],
        channels=size[1],
        spatial=math.prod(size[2:]),
        groups=groups,
        channels_last=channels_last,
        silu=silu,
        bfloat16=bfloat16,
        threads=threads,
        target=target,
    )
