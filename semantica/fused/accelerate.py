"""`accelerate` and `restore`: diffusers' models with their modules in the fused form, in place, and back."""

import logging
from collections import Counter
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.resnet import SpatioTemporalResBlock, TemporalConvLayer, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from semantica.errors import UserError
from semantica.fused.parts import ORIGINAL, Part, become, hooked, models_of, parts
from semantica.kernels import dispatch

__all__ = ["Part", "accelerate", "parts", "restore"]

T = TypeVar("T", bound=nn.Module | DiffusionPipeline)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OVER_TIME = (
    nn.Conv3d,
    AnimateDiffTransformer3D,
    SpatioTemporalResBlock,
    TemporalConvLayer,
    TemporalResnetBlock,
    TransformerSpatioTemporalModel,
    TransformerTemporalModel,
)  # fmt: skip


def accelerate(target: T) -> T:
    """Run a diffusers pipeline, or one of its models, on the fused operators from now on; returns the same object.

    GroupNorms take the SiLU after them, and in residual blocks the time embedding; cross-attention to text and to the
    pictures of IP-Adapters is one pass where the fused operator serves device, dtype and head dim, self-attention goes
    by blocks of queries where PyTorch's kernel is slow (elsewhere both stay PyTorch's). Modules change their class for
    a subclass, as `torch.distributed.fsdp.fully_shard` does: parameters, names, hooks and `isinstance` stay, so saving,
    LoRAs, offloading, slicing and tiling work before and after. Calling it again takes what came later, such as an
    IP-Adapter. `parts` tells what stays as it is, and why; so does the log, in one line for each reason. A pipeline of
    this package is accelerated by its own method.

    Raises:
        UserError: nothing in it can be fused, no fused operator serves its dtype on any device that it may be on, or
            it has layers over time; the object is left as it was.
    """
    if own := getattr(target, "accelerate", None):
        return own()
    name, found = type(target).__name__, parts(target)
    able = [part for part in found if not part.why]
    if not able:
        raise UserError(f"{name} has no GroupNorm and no attention that could be fused")
    for model in models_of(target).values():
        check(model)
    if all(part.fused for part in able):
        tell(f"{name} is accelerated already: nothing in it is left to be fused")
    for part in able:
        # what is fused may have been given hooks since
        if not part.fused:
            part.change()
    for (kind, why), count in Counter((part.kind, part.why) for part in found if part.why).items():
        tell(f"{name}: {count} x {kind} as it was: {why}")
    return target


def restore(target: T) -> T:
    """Undo `accelerate`; returns the same object. Nothing happens to what is not accelerated.

    Raises:
        UserError: hooks were put on fused modules, as sequential offloading does, and would go on calling them.
    """
    if own := getattr(target, "restore", None):
        return own()
    changed = []
    for model in models_of(target).values():
        for name, module in model.named_modules():
            changed += [(name, part) for part in (module, vars(module).get("processor")) if type(part) in ORIGINAL]
    for name, part in changed:
        if hooked(part):
            raise UserError(f"{name} has a hook that calls its fused form: remove the hooks first (remove_all_hooks)")
    for _, part in changed:
        become(part, ORIGINAL[type(part)])
    return target


def check(model: nn.Module) -> None:
    """Raises `UserError` for a model with norms that is not of pictures, or computes where nothing is fused."""
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm) and module.affine]
    if not norms:
        return
    for name, module in model.named_modules():
        if isinstance(module, OVER_TIME):
            raise UserError(f"{type(model).__name__} has layers over time ({name}): only models of pictures are fused")
    weight = norms[0].weight
    # what waits in the host's memory may be moved to a GPU later
    devices = {weight.device.type} | ({"cuda"} if torch.cuda.is_available() else set())
    if "meta" not in devices and not any(dispatch.serves("group_norm", device, weight.dtype) for device in devices):
        dtype = str(weight.dtype).removeprefix("torch.")
        served = [str(d).removeprefix("torch.") for d in DTYPES if dispatch.serves("group_norm", weight.device.type, d)]
        instead = f"use {' or '.join(served)}" if served else "semantica doctor says what is"
        raise UserError(f"{type(model).__name__} is in {dtype} on {weight.device.type}: no kernel is there; {instead}")


def tell(line: str) -> None:
    logging.getLogger("semantica").warning(line)
