"""The network in stock PyTorch, and each optimisation of sampling behind a switch of its own.

The switches belong to the benchmark: they show what each step of the ladder is worth. The product has none of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semantica.benchmarks.harness.ladder import cumulative
from semantica.condition import Condition
from semantica.kernels.group_norm.op import per_channel
from semantica.model.attention import attend_by_products
from semantica.model.conditioner import encode
from semantica.model.layers import CrossAttention, CrossAttentionProcessor, GroupNormAct
from semantica.model.uvit import UViT
from semantica.pipelines.networks import NetworkPipeline
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling


@dataclass(frozen=True)
class Switches:
    """In the order of the ladder: each rung has all switches up to its own."""

    condition_once: bool = False
    joined_branches: bool = False
    channels_last: bool = False
    bf16: bool = False
    compile: bool = False
    fused_group_norm: bool = False
    attention_as_products: bool = False
    autotune: bool = False
    """The compiler's search for the fastest kernels, with the weights as constants on a CPU: minutes."""


def rungs(device: str) -> dict[str, Switches]:
    """Name -> switches, cumulative. PyTorch's attention is as good as any on a GPU."""
    return cumulative(Switches, ("autotune", *(("attention_as_products",) if device == "cuda" else ())))


STRONG = Switches(True, True, True, True, True)


class StockNorm(nn.Module):
    """GroupNorm, FiLM and SiLU as separate operators of PyTorch."""

    def __init__(self, norm: GroupNormAct):
        super().__init__()
        self.groups, self.weight, self.bias = norm.groups, norm.weight, norm.bias

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        y = F.group_norm(x, self.groups, self.weight, self.bias, 1e-5)
        if scale is not None:
            y = y * (1 + per_channel(scale, y)) + per_channel(shift, y)
        return F.silu(y)


class StockCross(CrossAttentionProcessor):
    """Cross-attention to one stream by PyTorch's attention."""

    def __call__(self, attn: CrossAttention, q: Tensor, keys: Tensor, values: Tensor, sizes, lengths) -> Tensor:
        q, keys, values = (a.transpose(1, 2) for a in (attn.norm_q(q), keys, values))
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)


def rebuild(unet: UViT, norm: bool = True, cross: bool = True, as_products: bool = False) -> UViT:
    """A copy that computes with PyTorch's operators.

    norm, cross: whether group norms and cross-attention do. as_products: whether attention is two products, not SDPA.
    """
    unet = copy.deepcopy(unet)
    for owner in list(unet.modules()):
        if isinstance(owner, CrossAttention) and cross:
            owner.processor = StockCross()
        for name, module in list(owner.named_children()):
            if isinstance(module, GroupNormAct) and norm:
                setattr(owner, name, StockNorm(module))
    if as_products:
        attend_by_products(unet)
    return unet


def compiled(unet: UViT, switches: Switches) -> Callable:
    if not switches.compile:
        return unet
    cuda = unet.device.type == "cuda"
    mode = ("max-autotune" if cuda else "max-autotune-no-cudagraphs") if switches.autotune else "default"
    function = torch.compile(unet, fullgraph=True, dynamic=False, mode=mode)
    if cuda:
        if not switches.autotune:
            return function

        def marked(*inputs):
            torch.compiler.cudagraph_mark_step_begin()
            return function(*inputs).clone()

        return marked

    def constant_weights(*inputs):
        # what PyTorch's guide to CPUs asks for: templates of matrix products need it
        with torch._inductor.config.patch(freezing=switches.autotune):
            return function(*inputs)

    return constant_weights


class StockDenoiser:
    """The rebuilt network in the sampling loop; a condition may be a function, which each step calls again."""

    array, max_batch, refuses = "torch", None, {}

    def __init__(self, unet: UViT, switches: Switches):
        self.unet, self.switches, self.device, self.dtype = unet, switches, unet.device, unet.dtype
        self.joins, self.network = switches.joined_branches, compiled(unet, switches)

    def bind(self, condition: Condition | Callable[[], Condition]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, logsnr: self.network(z, logsnr, condition() if callable(condition) else condition)


def stock_sampler(pipeline: NetworkPipeline, switches: Switches) -> Callable:
    """`(images, noise, steps, guidance) -> images`, numpy in and out."""
    encoder, schedule, config = pipeline.encoder, pipeline.scheduler.schedule, pipeline.scheduler.config
    unet = rebuild(pipeline.unet, not switches.fused_group_norm, True, switches.attention_as_products)
    if switches.channels_last:
        unet.to(memory_format=torch.channels_last)
    if switches.bf16:
        encoder, unet = (torch.nn.Module.to(module, torch.bfloat16) for module in (encoder, unet))
    denoiser = StockDenoiser(unet, switches)

    @torch.no_grad()
    def run(images: np.ndarray, noise: np.ndarray, steps: int, guidance: float) -> np.ndarray:
        images, z = (torch.from_numpy(array).to(denoiser.device) for array in (images, noise))
        streams = encode(encoder, unet.stream_names, images.to(denoiser.dtype))
        branches = (lambda: unet.condition(streams)), (lambda: unet.null(len(images)))
        if switches.condition_once:
            branches = [branch() for branch in branches]
        settings = Sampling.of(config, steps=steps, guidance=guidance)
        return sample(denoiser, z, *branches, schedule, settings).cpu().numpy()

    return run
