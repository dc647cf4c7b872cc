"""Attention of diffusers' models on the fused operators, through diffusers' own processor interface."""

from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor

from semantica.errors import warn_once
from semantica.fused import blockwise
from semantica.kernels import cross_attention, dispatch
from semantica.kernels.cross_attention.op import HEAD_DIMS, cpp, fused


def fast(query: Tensor, *others: Tensor) -> bool:
    """Whether a fused kernel computes cross-attention from queries or activations like these, to others.

    On a CPU not where a gradient is wanted, which PyTorch's kernel is faster at, nor in an exported program, which runs
    elsewhere.
    """
    if fused(query):
        return True
    here = cpp(query) and not torch.compiler.is_exporting() and not dispatch.transformed()
    return here and not dispatch.differentiable((query, *others))


def plain(attn: Attention) -> bool:
    return attn.spatial_norm is None and attn.norm_q is None and attn.norm_k is None


def serves(attn: Attention, hidden: Tensor, tokens: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused operator computes this attention here; what it does not stays as diffusers has it.

    Masks: those of keys, which UNets and ControlNets make of `encoder_attention_mask`.
    """
    keys = mask is None or mask.shape == (len(tokens), 1, tokens.shape[1])
    simple = plain(attn) and attn.group_norm is None and hidden.ndim == 3
    return simple and keys and head_dim(attn) in HEAD_DIMS and fast(hidden, tokens, *attn.parameters())


def head_dim(attn: Attention) -> int:
    return attn.inner_dim // attn.heads


def attend(
    attn: Attention,
    hidden: Tensor,
    streams: Sequence[tuple[Tensor, Tensor]],
    gates: Sequence[float] = (),
    length: Tensor | None = None,
) -> Tensor:
    """One pass over all streams.

    Args:
        hidden: `[B, N, C]`.
        streams: keys and values `[B, M, C]` of each.
        gates: factor of each stream; none for 1.
        length: `[B]`, the valid tokens of the first stream; all of them without.

    Returns:
        `[B, N, C]`.
    """
    sizes = [key.shape[1] for key, _ in streams]
    keys, values = (torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*streams))
    keys, values = (a.unflatten(-1, (attn.heads, -1)) for a in (keys, values))
    lengths, factors = None, None
    if length is not None:
        lengths = torch.stack([length, *(length.new_full((len(hidden),), size) for size in sizes[1:])], 1)
    if any(gate != 1 for gate in gates):
        shape = len(hidden), attn.heads
        factors = torch.stack([hidden.new_full(shape, gate, dtype=torch.float32) for gate in gates], 1)
    return around(attn, hidden, lambda query, _: cross_attention(query, keys, values, sizes, lengths, factors))


def for_itself(attn: Attention, hidden: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What computes self-attention of `hidden`, as for `around`, faster than PyTorch's kernel; None where nothing does.

    In bf16 on a CPU alone: the C++ loops, or products by blocks for the heads of autoencoders, which are wider.
    """
    if hidden.dtype == torch.bfloat16 and cpp(hidden) and head_dim(attn) in HEAD_DIMS:
        return one_stream if fast(hidden, *attn.parameters()) else None
    count = hidden.shape[1] if hidden.ndim == 3 else hidden[0, 0].numel()
    return blockwise.attention_in_blocks if blockwise.serves(attn, hidden, count) else None


def one_stream(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return cross_attention(query, key, value, [key.shape[1]])


def attend_itself(attn: Attention, hidden: Tensor, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Self-attention by `kernel`; `hidden` as for `around`."""

    def inner(query: Tensor, tokens: Tensor) -> Tensor:
        return kernel(query, *(project(tokens).unflatten(-1, (attn.heads, -1)) for project in (attn.to_k, attn.to_v)))

    return around(attn, hidden, inner)


def around(attn: Attention, hidden: Tensor, inner: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What diffusers has around every attention: norm and projections, the shape of a picture, the residual.

    Args:
        hidden: `[B, N, C]`, or `[B, C, *spatial]` as in autoencoders.
        inner: from queries `[B, N, H, D]`, and the tokens `[B, N, C]` that they were made of, to `[B, N, H, D]`.

    Returns:
        As `hidden`.
    """
    tokens, shape = hidden, hidden.shape
    if hidden.ndim == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    out = inner(attn.to_q(tokens).unflatten(-1, (attn.heads, -1)), tokens).flatten(2)
    out = attn.to_out[1](attn.to_out[0](out))
    if len(shape) == 4:
        out = out.transpose(1, 2).reshape(shape)
    return (out + hidden if attn.residual_connection else out) / attn.rescale_output_factor


def text_stream(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    if attn.norm_cross:
        tokens = attn.norm_encoder_hidden_states(tokens)
    return attn.to_k(tokens), attn.to_v(tokens)


def first_those_there(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens `[B, M, C]` in an order in which a mask is a length `[B]`: a softmax does not ask for the order of keys.

    `mask [B, 1, M]`: 0 for tokens that are there, else far below, as diffusers adds it to the logits. Where it leaves
    none, it has lowered all logits alike, and all tokens count.
    """
    if mask is None:
        return tokens, None
    there = mask[:, 0] == 0
    order = there.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    count = there.sum(1)
    tokens = tokens.gather(1, order[:, :, None].expand_as(tokens))
    return tokens, torch.where(count > 0, count, tokens.shape[1])


class FusedAttnProcessor(AttnProcessor2_0):
    """Cross-attention to one stream of tokens; self-attention by PyTorch's kernel, or one that is faster here."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        tokens, mask = encoder_hidden_states, attention_mask
        if tokens is None and mask is None and plain(attn):
            kernel = for_itself(attn, hidden_states)
            if kernel is not None:
                return attend_itself(attn, hidden_states, kernel)
        if tokens is None or not serves(attn, hidden_states, tokens, mask):
            return super().__call__(attn, hidden_states, tokens, mask, temb, **kwargs)
        tokens, length = first_those_there(tokens, mask)
        return attend(attn, hidden_states, [text_stream(attn, tokens)], length=length)


class FusedIPAdapterAttnProcessor(IPAdapterAttnProcessor2_0):
    """Text and the pictures of any number of IP-Adapters in one pass: each is a stream with a softmax of its own.

    Ye et al., arXiv 2308.06721, eq. 5; the adapter's scale is the stream's gate. Masks of the picture, and a scale for
    each picture of one adapter, stay as diffusers has them.
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
        given, mask = encoder_hidden_states, attention_mask
        ours = isinstance(given, tuple) and serves(attn, hidden_states, given[0], mask)
        if not (ours and self.simple(ip_adapter_masks)):
            return super().__call__(attn, hidden_states, given, mask, temb, scale, ip_adapter_masks)
        tokens, length = first_those_there(given[0], mask)
        streams, gates = [text_stream(attn, tokens)], [1.0]
        for picture, factor, to_k, to_v in zip(given[1], self.scale, self.to_k_ip, self.to_v_ip, strict=True):
            if factor:
                # several pictures of one adapter are one stream
                flat = picture.flatten(1, 2) if picture.ndim == 4 else picture
                streams.append((to_k(flat), to_v(flat)))
                gates.append(factor)
        return attend(attn, hidden_states, streams, gates, length)

    def simple(self, masks: Tensor | None) -> bool:
        """Whether each adapter is one stream with one factor; else it is said why not, once."""
        if masks is None and all(isinstance(factor, int | float) for factor in self.scale):
            return True
        if not torch.compiler.is_compiling():
            what = "masks of IP-Adapters" if masks is not None else "a scale for each picture of an IP-Adapter"
            warn_once(f"{what}: cross-attention to its pictures stays with diffusers' own processor")
        return False
