"""GroupNorm + FiLM + activation: y = act((x_hat * w + b) * (1 + scale) + shift), x_hat = x + addend, normalised per
(sample, group).

GroupNorm: Wu & He, arXiv 1803.08494, eq. 1. FiLM: Perez et al., arXiv 1709.07871, eq. 2.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from semantica.kernels import dispatch, launch
from semantica.kernels.checks import check_dtype, check_tensors

ACTIVATIONS = ("silu", "none")


def group_norm_ref(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    eps: float = 1e-5,
    addend: Tensor | None = None,
) -> Tensor:
    """Plain torch; what the operator means, and what an exporter decomposes it into."""
    # stock channels-last GroupNorm on CPU loses digits when |mean| >> std, the contiguous one does not
    y = torch.group_norm(plus(x, addend).contiguous(), groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None:
        y = y * (1 + per_channel(scale, x))
    if shift is not None:
        y = y + per_channel(shift, x)
    return F.silu(y) if activation == "silu" else y


def plus(x: Tensor, addend: Tensor | None) -> Tensor:
    return x if addend is None else x + per_channel(addend, x)


def over_pixels(dx: Tensor, addend: Tensor | None) -> Tensor:
    """Gradient of the addend; empty without one."""
    return dx.new_empty(0) if addend is None else dx.flatten(2).sum(-1, dtype=addend.dtype)


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """View `[B, C]` (or `[C]`) so that it broadcasts over the spatial dimensions of `x [B, C, *spatial]`."""
    return value.to(x.dtype).reshape(*value.shape, *[1] * (x.ndim - 2))


def like(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the dtype and strides that `torch.empty_like(x)` has, as a tensor that aliases no input."""
    return torch.empty_like(x).copy_(y)


def forward_plain(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    eps: float,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, and mean and 1/std `[B, groups]` for the backward, in fp32 (fp64 for fp64 input)."""
    mean, rstd = statistics_like(x, groups), statistics_like(x, groups)
    if x.numel() == 0:
        return torch.empty_like(x), mean.zero_(), rstd.zero_()
    # the dtype of the result is x's, whatever an enclosing autocast would prefer
    with torch.autocast(x.device.type, enabled=False):
        grouped = plus(x, addend).contiguous().reshape(x.shape[0], groups, -1).to(mean.dtype)
        variance, average = torch.var_mean(grouped, -1, correction=0)
        y = like(group_norm_ref(x, groups, weight, bias, scale, shift, activation, eps, addend), x)
        return y, mean.copy_(average), rstd.copy_(torch.rsqrt(variance + eps))


def statistics_like(x: Tensor, groups: int) -> Tensor:
    return x.new_empty((x.shape[0], groups), dtype=torch.promote_types(x.dtype, torch.float32))


op = torch.library.custom_op("semantica::group_norm", forward_plain, mutates_args=())


@op.register_fake
def _(x, groups, weight, bias, scale, shift, activation, eps, addend=None):
    return torch.empty_like(x), statistics_like(x, groups), statistics_like(x, groups)


def backward_plain(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and what is given of scale, shift, addend, summed in fp32 (fp64 for fp64 input)."""
    with torch.autocast(x.device.type, enabled=False):
        return backward_ref(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend)


def backward_ref(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend):
    if x.numel() == 0:
        film = [x.new_empty(0) if a is None else torch.zeros_like(a) for a in (scale, shift, addend)]
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias), *film
    batch, channels = x.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    dy, xs = (a.to(wide).reshape(batch, channels, -1).contiguous() for a in (dy, plus(x, addend)))
    w, b = weight.to(wide), bias.to(wide)
    sizes = batch, channels, xs.shape[-1], groups
    grouped = xs.reshape(batch, groups, -1)
    normal = ((grouped - mean[:, :, None]) * rstd[:, :, None]).reshape(xs.shape)
    affine = normal * w[:, None] + b[:, None]
    film = None if scale is None else 1 + scale.to(wide)[:, :, None]
    if activation == "silu":
        pre = affine if film is None else affine * film
        pre = pre if shift is None else pre + shift.to(wide)[:, :, None]
        dy = torch.ops.aten.silu_backward(dy, pre)
    dshift = x.new_empty(0) if shift is None else dy.sum(-1).to(shift.dtype)
    dscale = x.new_empty(0) if scale is None else (dy * affine).sum(-1).to(scale.dtype)
    dy = dy if film is None else dy * film
    masks = [True, True, True]
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(dy, xs, mean, rstd, w, *sizes, masks)
    daddend = over_pixels(dx.reshape(x.shape), addend)
    return like(dx.reshape(x.shape), x), dweight.to(weight.dtype), dbias.to(bias.dtype), dscale, dshift, daddend


op_backward = torch.library.custom_op("semantica::group_norm_backward", backward_plain, mutates_args=())


@op_backward.register_fake
def _(dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend=None):
    film = [x.new_empty(0) if a is None else a.new_empty(a.shape) for a in (scale, shift, addend)]
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), *film


def save(ctx, inputs, output):
    x, groups, weight, bias, scale, shift, activation, _, addend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # zeros for the statistics would be filled in for nothing
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, addend)
    ctx.settings = groups, activation


def backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    x, mean, rstd, weight, bias, scale, shift, addend = ctx.saved_tensors
    groups, activation = ctx.settings
    inputs = dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend
    dx, dweight, dbias, *rest = dispatch.call(op_backward, *inputs)
    dscale, dshift, daddend = (None if a is None else d for a, d in zip((scale, shift, addend), rest, strict=True))
    return dx, None, dweight, dbias, dscale, dshift, None, None, daddend


run = dispatch.with_gradient(op, save, backward)


def supports(*dtypes: torch.dtype):
    """Whether a first argument is of one of these types, and not empty."""
    return lambda first: first.dtype in dtypes and first.numel() > 0


def kernels(forward_module: str, backward_module: str) -> dict[str, tuple]:
    package = "semantica.kernels.group_norm"
    return {
        f"{package}.{forward_module}:forward": (op, forward_plain),
        f"{package}.{backward_module}:backward": (op_backward, backward_plain),
    }


def rivals() -> dict[str, tuple[str, str]]:
    """The CUDA kernels, and who says whether a call is theirs, beside each of Triton's."""
    package = "semantica.kernels.group_norm"
    return {
        f"{package}.{name}:{name}": (f"{package}.cuda:{name}", f"{package}.cuda:serves_{name}")
        for name in ("forward", "backward")
    }


dispatch.register_triton(
    "group_norm",
    supports(torch.float32, torch.float16, torch.bfloat16),
    kernels("forward", "backward"),
    Path(__file__).with_name("choice.json"),
    rivals(),
)
if launch.DEVICE != "cpu" and (instructions := dispatch.cpp_instructions("group_norm")):
    status = ("C++", f"semantica._C with {instructions[0]}; fp16 and fp64 in plain torch")
    dispatch.register_kernels(
        "group_norm", "cpu", supports(torch.float32, torch.bfloat16), kernels("cpu", "cpu"), status
    )


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-5,
    addend: Tensor | None = None,
) -> Tensor:
    """GroupNorm with fused FiLM and activation: `act((GN(x + addend) * weight + bias) * (1 + scale) + shift)`.

    Args:
        x: `[B, C, *spatial]` with one to three spatial dimensions, contiguous or channels-last, fp16/bf16/fp32/fp64.
        groups: number of groups; divides C.
        weight, bias: `[C]`, fp32 or x's dtype.
        scale, shift: `[B, C]` or None.
        activation: "silu" or "none".
        eps: added to the variance.
        addend: `[B, C]` or None; what a residual block adds of its time embedding. Statistics are of the sum.

    Returns:
        A tensor with the shape, dtype and strides of `x`. Statistics are taken in fp32 or better. Under transforms of
        `torch.func` and in forward mode plain torch computes it, contiguous.

    Raises:
        ValueError: an argument has the wrong rank, shape, dtype or device.
    """
    check(x, groups, weight, bias, scale, shift, activation, addend)
    arguments = x, groups, weight, bias, scale, shift, activation, eps, addend
    if dispatch.transformed():
        with torch.autocast(x.device.type, enabled=False):
            return group_norm_ref(*arguments)
    return run(*arguments)[0]


def check(x, groups, weight, bias, scale, shift, activation, addend):
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected [B, C, *spatial] with 1 to 3 spatial dimensions")
    check_dtype("x", x)
    if not isinstance(groups, int):
        raise ValueError(f"groups={groups!r}: expected a whole number")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups={groups} does not divide the {x.shape[1]} channels of x {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    channels, film, dtypes = (x.shape[1],), (x.shape[0], x.shape[1]), (x.dtype, torch.float32)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            raise ValueError(f"{name} is None: expected {list(channels)} for x {tuple(x.shape)}")
    affine = {"weight": (weight, channels, dtypes), "bias": (bias, channels, dtypes)}
    added = {"scale": scale, "shift": shift, "addend": addend}
    check_tensors("x", x, affine | {name: (value, film, dtypes) for name, value in added.items()})
