"""Where the features of a picture's layout are read: self-attention of a decoder, after its output projection."""

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from semantica.errors import UserError
from semantica.model.layers import SelfAttention


def decoder_attention(denoiser: Any) -> dict[str, nn.Module]:
    """Modules whose outputs `[B, N, C]` they are, by name.

    Of a diffusers UNet the self-attentions of all "up" blocks, as in arXiv 2311.18608. Those of a U-ViT are all in the
    transformer between its way down and its way up: the later half of them, which lies on the way out.

    Raises:
        UserError: another network, or one without such attention.
    """
    network = getattr(denoiser, "module", denoiser)
    if not isinstance(network, nn.Module):
        raise UserError(f"{type(denoiser).__name__} is no torch module: its attention cannot be read")
    own = {name: part for name, part in network.named_modules() if isinstance(part, SelfAttention)}
    found = dict(list(own.items())[len(own) // 2 :]) or {
        name: part
        for name, part in network.named_modules()
        if isinstance(part, Attention) and name.startswith("up_blocks.") and not part.is_cross_attention
    }
    if not found:
        raise UserError(f"{type(network).__name__} has no self-attention in its decoder: take the method dds")
    return found
