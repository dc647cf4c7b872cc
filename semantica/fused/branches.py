"""What both branches of guidance share in a UNet: computed once, for a batch whose halves hold the same latents."""

import copy

import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor, nn

from semantica.fused.conditioned import ConditionedUNet


class Once(nn.Module):
    """A layer whose inputs are twice the same rows `[2 B, ...]`: computed on the first of them, given for both."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *rest: Tensor | None, **named: None) -> Tensor:
        count = len(x) // 2
        made = self.inner(x[:count], *(None if a is None else a[:count] for a in rest), **named)
        return torch.cat((made, made))


def shallow(module: nn.Module) -> nn.Module:
    """A module of its own over the same parts."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def once(unet: ConditionedUNet) -> ConditionedUNet:
    """A UNet for a batch of both branches, over the same modules: until the first cross-attention they are one.

    That is the first residual block and the first self-attention with what leads into it. Norms in between are not
    dearer than the copies that sharing them would need. SDXL's branches differ from the start, by the pooled text in
    the embedding of the timestep: of such UNets nothing is shared.
    """
    if unet.config.addition_embed_type is not None:
        return unet
    made = shallow(unet)
    made.down_blocks = blocks = shallow(unet.down_blocks)
    for i, block in enumerate(blocks):
        if type(block) not in (CrossAttnDownBlock2D, DownBlock2D):
            break
        blocks[i] = own = shallow(block)
        parted = type(block) is CrossAttnDownBlock2D
        for name in ("resnets",) if parted else ("resnets", "downsamplers"):
            if getattr(block, name) is not None:
                layers = shallow(getattr(block, name))
                for j, layer in enumerate(layers):
                    if j == 0 or not parted:
                        layers[j] = Once(layer)
                setattr(own, name, layers)
        if parted:
            own.attentions = shallow(block.attentions)
            own.attentions[0] = entered_once(block.attentions[0])
            break
    return made


def entered_once(transformer: nn.Module) -> nn.Module:
    """A transformer with its projection in, and the first self-attention, for both branches at once."""
    made = shallow(transformer)
    made.proj_in = Once(transformer.proj_in)
    first = transformer.transformer_blocks[0]
    if not first.attn1.is_cross_attention:
        made.transformer_blocks = shallow(transformer.transformer_blocks)
        made.transformer_blocks[0] = block = shallow(first)
        block.attn1 = Once(first.attn1)
    return made
