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

from semantica.benchmarks.harness.suite import cumulative
from semantica.condition import Condition
from semantica.kernels.group_norm.op import per_channel
from semantica.model.attention import attend_by_products
from semantica.model.layers import CrossAttention, CrossAttentionProcessor, GroupNormAct
from semantica.model.uvit import UViT
from semantica.pipelines.variations import SemanticaPipeline
from semantica.solvers import guide


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


def stock_sampler(pipeline: SemanticaPipeline, switches: Switches) -> Callable:
    """`(images, noise, steps, guidance) -> images`, numpy in and out, with guidance in every step."""
    encoder, scheduler, device = pipeline.encoder, pipeline.scheduler, pipeline.device
    unet = rebuild(pipeline.unet, not switches.fused_group_norm, True, switches.attention_as_products)
    if switches.channels_last:
        unet.to(memory_format=torch.channels_last)
    if switches.bf16:
        encoder, unet = (torch.nn.Module.to(module, torch.bfloat16) for module in (encoder, unet))
    network = compiled(unet, switches)

    def conditions(tokens) -> tuple[Condition, Condition]:
        streams = dict.fromkeys(unet.stream_names, tokens)
        return unet.condition(streams), unet.null(tokens.tokens.shape[0])

    @torch.no_grad()
    def run(images: np.ndarray, noise: np.ndarray, steps: int, guidance: float) -> np.ndarray:
        tokens = encoder(torch.from_numpy(images).to(device, encoder.dtype))
        z, batch = torch.from_numpy(noise).to(device), len(noise)
        scheduler.set_timesteps(steps, device=device)
        if switches.condition_once:
            own, null = conditions(tokens)
        if switches.joined_branches:
            both = own.join(null)
        for i, timestep in enumerate(scheduler.timesteps):
            if not switches.condition_once:
                own, null = conditions(tokens)
            level = scheduler.logsnrs[i]
            if switches.joined_branches:
                v = network(torch.cat((z, z)), level.expand(2 * batch), both)
                v = guide(v[:batch], v[batch:], guidance)
            else:
                v = guide(network(z, level.expand(batch), own), network(z, level.expand(batch), null), guidance)
            z = scheduler.step(v, timestep, z).prev_sample
        return z.cpu().numpy()

    return run
