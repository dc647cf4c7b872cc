"""`group_norm` on the CPU through `semantica._C`: vectors of the processor's own width, all of torch's threads."""

import torch
from torch import Tensor

from semantica import _C
from semantica.kernels.group_norm.op import over_pixels, plus

TARGET = _C.group_norm_targets()[0]


def forward(
    x, groups, weight, bias, scale, shift, activation, eps, addend=None, target: str = TARGET
) -> tuple[Tensor, Tensor, Tensor]:
    """Result like `x`, mean and 1/std `[B, groups]` in fp32; `x` is fp32 or bf16 and not empty."""
    y, mean, rstd = torch.empty_like(x), *(x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    source, channels_last = dense(plus(x, addend))
    # memory that is neither contiguous nor channels-last is written on the way back
    result = y if y.stride() == source.stride() else torch.empty_like(source)
    parameters = [None if a is None else plain(a) for a in (weight, bias, scale, shift)]
    _C.group_norm_forward(
        shape(source, groups, channels_last, activation, target),
        *map(address, (source, result, mean, rstd, *parameters)),
        eps,
    )
    return (y if result is y else y.copy_(result)), mean, rstd


def backward(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend=None, target: str = TARGET):
    """Gradients of x, weight, bias, scale, shift, addend; absent ones are empty."""
    dx = torch.empty_like(x)
    source, channels_last = dense(plus(x, addend))
    dy = dy if dy.stride() == source.stride() else torch.empty_like(source).copy_(dy)
    result = dx if dx.stride() == source.stride() else torch.empty_like(source)
    parameters = [None if a is None else plain(a) for a in (weight, bias, scale, shift)]
    gradients = [None if a is None else torch.empty_like(a) for a in parameters]
    _C.group_norm_backward(
        shape(source, groups, channels_last, activation, target),
        *map(address, (dy, source, mean, rstd, *parameters, result, *gradients)),
    )
    dx = dx if result is dx else dx.copy_(result)
    pairs = zip(gradients, (weight, bias, scale, shift), strict=True)
    return dx, *(x.new_empty(0) if a is None else g.to(a.dtype) for g, a in pairs), over_pixels(dx, addend)


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """`x` with its values in one of the two layouts, copied if need be, and whether that is channels-last."""
    if x.is_contiguous():
        return x, False
    if x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


def plain(a: Tensor) -> Tensor:
    return a.to(torch.float32).contiguous()


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def shape(x: Tensor, groups: int, channels_last: bool, activation: str, target: str) -> _C.GroupNormShape:
    batch, channels = x.shape[:2]
    return _C.GroupNormShape(
        batch=batch,
        channels=channels,
        spatial=x.numel() // (batch * channels),
        groups=groups,
        channels_last=channels_last,
        silu=activation == "silu",
        bfloat16=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        target=target,
    )
