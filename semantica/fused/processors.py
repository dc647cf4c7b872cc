"""Cross-attention of diffusers' models on the fused operator, through diffusers' own processor interface."""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor

from semantica.kernels import cross_attention
from semantica.kernels.cross_attention.op import HEAD_DIMS, fused


def serves(attn: Attention, hidden: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused operator computes this attention here; what it does not stays as diffusers has it."""
    plain = attn.spatial_norm is None and attn.group_norm is None and attn.norm_q is None and attn.norm_k is None
    return plain and mask is None and hidden.ndim == 3 and head_dim(attn) in HEAD_DIMS and fused(hidden)


def head_dim(attn: Attention) -> int:
    return attn.inner_dim // attn.heads


def attend(attn: Attention, hidden: Tensor, streams: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One pass over all streams; `streams`: keys and values `[B, M, C]` of each. Returns `[B, N, C]`."""
    query = attn.to_q(hidden).unflatten(-1, (attn.heads, -1))
    keys, values = (torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*streams))
    keys, values = (a.unflatten(-1, (attn.heads, -1)) for a in (keys, values))
    out = cross_attention(query, keys, values, [key.shape[1] for key, _ in streams]).flatten(2)
    out = attn.to_out[1](attn.to_out[0](out))
    return (out + hidden if attn.residual_connection else out) / attn.rescale_output_factor


def text_stream(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    if attn.norm_cross:
        tokens = attn.norm_encoder_hidden_states(tokens)
    return attn.to_k(tokens), attn.to_v(tokens)


class FusedAttnProcessor(AttnProcessor2_0):
    """Cross-attention to one stream of tokens; self-attention stays with PyTorch's."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if encoder_hidden_states is None or not serves(attn, hidden_states, attention_mask):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        return attend(attn, hidden_states, [text_stream(attn, encoder_hidden_states)])


class FusedIPAdapterAttnProcessor(IPAdapterAttnProcessor2_0):
    """Text and the pictures of any number of IP-Adapters in one pass: each is a stream with a softmax of its own.

    Ye et al., arXiv 2308.06721, eq. 5. Masks and a scale for each picture of one adapter stay as diffusers has them.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Tensor | None = None,
    ) -> Tensor:
        simple = isinstance(encoder_hidden_states, tuple) and ip_adapter_masks is None
        numbers = all(isinstance(factor, int | float) for factor in self.scale)
        if not (simple and numbers and serves(attn, hidden_states, attention_mask)):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks
            )
        tokens, pictures = encoder_hidden_states
        streams = [text_stream(attn, tokens)]
        for picture, factor, to_k, to_v in zip(pictures, self.scale, self.to_k_ip, self.to_v_ip, strict=True):
            if factor:
                # several pictures of one adapter are one stream; a factor of the values is one of the result
                flat = picture.flatten(1, 2) if picture.ndim == 4 else picture
                streams.append((to_k(flat), to_v(flat) * factor))
        return attend(attn, hidden_states, streams)
