"""`group_norm` on the CPU through `semantica._C`: vectors of the processor's own width, all of torch's threads."""

import torch
from torch import Tensor

from semantica import _C


def forward(x, groups, weight, bias, scale, shift, activation, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Result like `x`, mean and 1/std `[B, groups]` in fp32; `x` is fp32 or bf16 and not empty."""
    y, mean, rstd = torch.empty_like(x), *(x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    source, channels_last = dense(x)
    # memory that is neither contiguous nor channels-last is written on the way back
    target = y if y.stride() == source.stride() else torch.empty_like(source)
    parameters = [None if a is None else plain(a) for a in (weight, bias, scale, shift)]
    _C.group_norm_forward(
        shape(source, groups, channels_last, activation),
        *map(address, (source, target, mean, rstd, *parameters)),
        eps,
    )
    return (y if target is y else y.copy_(target)), mean, rstd


def backward(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation):
    """Gradients of x, weight, bias, scale, shift; absent ones are empty."""
    dx = torch.empty_like(x)
    source, channels_last = dense(x)
    dy = dy if dy.stride() == source.stride() else torch.empty_like(source).copy_(dy)
    target = dx if dx.stride() == source.stride() else torch.empty_like(source)
    parameters = [None if a is None else plain(a) for a in (weight, bias, scale, shift)]
    gradients = [None if a is None else torch.empty_like(a) for a in parameters]
    _C.group_norm_backward(
        shape(source, groups, channels_last, activation),
        *map(address, (dy, source, mean, rstd, *parameters, target, *gradients)),
    )
    dx = dx if target is dx else dx.copy_(target)
    pairs = zip(gradients, (weight, bias, scale, shift), strict=True)
    return dx, *(x.new_empty(0) if a is None else g.to(a.dtype) for g, a in pairs)


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


def shape(x: Tensor, groups: int, channels_last: bool, activation: str) -> "_C.GroupNormShape":
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
    )
