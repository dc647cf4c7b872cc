"""A UNet of diffusers whose cross-attention reads keys and values that were made before."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn

from semantica.condition import Condition
from semantica.errors import UserError
from semantica.fused.processors import HEAD_DIMS, around, fast, text_stream
from semantica.kernels import cross_attention

PLAIN = (AttnProcessor, AttnProcessor2_0)
ADAPTED = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0)


def attend(query: Tensor, keys: Tensor, values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """`[B, N, H, D]`: all streams in one pass where the fused operator serves, else one after the other."""
    # exporters have a form of their own for it
    if (torch.compiler.is_exporting() or fast(query, keys, values)) and query.shape[-1] in HEAD_DIMS:
        return cross_attention(query, keys, values, sizes)
    query, keys, values = (a.transpose(1, 2) for a in (query, keys, values))
    parts = [(keys, values)] if len(sizes) == 1 else zip(keys.split(sizes, 2), values.split(sizes, 2))
    return sum(F.scaled_dot_product_attention(query, k, v) for k, v in parts).transpose(1, 2)


class PreparedAttnProcessor(nn.Module):
    """Cross-attention to the keys and values of a `Condition`, which stands where diffusers passes encoder states.

    Args:
        index: which of the condition's keys and values are this attention's.
        adapters: the processor of an IP-Adapter that stood here, whose projections and scales make part of them.

    inner: what computes the attention itself, `(query, keys, values, sizes) -> [B, N, H, D]`; another one is another
        implementation of the same.
    """

    def __init__(self, index: int, adapters: nn.Module | None = None):
        super().__init__()
        self.index = index
        # under the names that they had, so that a state dict keeps its keys
        self.to_k_ip, self.to_v_ip = (getattr(adapters, name, nn.ModuleList()) for name in ("to_k_ip", "to_v_ip"))
        self.scale = list(getattr(adapters, "scale", ()))
        self.inner = attend

    def keys_values(self, attn: Attention, tokens: Tensor, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, M, H, D]` of text tokens `[B, M0, C]` and of each adapter's `[B, M1, C]`, in a row.

        The adapter's scale is a factor of its values (Ye et al., arXiv 2308.06721, eq. 5).
        """
        pairs = [text_stream(attn, tokens)]
        for picture, factor, to_k, to_v in zip(pictures, self.scale, self.to_k_ip, self.to_v_ip, strict=True):
            pairs.append((to_k(picture), to_v(picture) * factor))
        keys, values = (torch.cat(part, 1).unflatten(-1, (attn.heads, -1)) for part in zip(*pairs))
        return keys, values

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Condition,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        made = encoder_hidden_states

        def inner(query: Tensor, _: Tensor) -> Tensor:
            keys, values = (arrays[self.index].to(query.dtype) for arrays in (made.keys, made.values))
            return self.inner(query, keys, values, made.sizes)

        return around(attn, hidden_states, inner)


class ConditionedUNet(UNet2DConditionModel):
    """A `UNet2DConditionModel` that takes a `Condition` as `encoder_hidden_states`; made by `conditioned`."""

    def get_aug_embed(self, emb: Tensor, encoder_hidden_states: Condition, added_cond_kwargs: dict | None) -> Tensor:
        """What is added to the embedding of the timestep was made with the condition."""
        return encoder_hidden_states.emb.to(emb.dtype)

    def process_encoder_hidden_states(
        self, encoder_hidden_states: Condition, added_cond_kwargs: dict | None
    ) -> Condition:
        return encoder_hidden_states

    @property
    def crossings(self) -> list[Attention]:
        """The cross-attentions, in the order of a condition's keys."""
        return [m for m in self.modules() if isinstance(getattr(m, "processor", None), PreparedAttnProcessor)]

    def project(self, tokens: Tensor, pictures: Sequence[Tensor], added: Tensor) -> Condition:
        """Keys and values of every cross-attention.

        tokens: `[B, M, C]`; pictures: of each IP-Adapter, as its image encoder gives them, `[B, M, C]`.
        added: `[B, E]`, see `added`.
        """
        if self.config.encoder_hid_dim_type == "text_proj":
            tokens = self.encoder_hid_proj(tokens)
        elif self.adapters:
            text = getattr(self, "text_encoder_hid_proj", None)
            tokens = tokens if text is None else text(tokens)
            # pooled pictures are a token each; of others there is one, of many tokens
            each = [p if isinstance(net, ImageProjection) else p[:, None] for net, p in zip(self.adapters, pictures)]
            pictures = [made.flatten(1, 2) for made in self.encoder_hid_proj(each)]
        pairs = [attn.processor.keys_values(attn, tokens, pictures) for attn in self.crossings]
        keys, values = zip(*pairs)
        return Condition(keys, values, added, None, (tokens.shape[1], *(p.shape[1] for p in pictures)))

    def added(self, pooled: Tensor | None, time_ids: Tensor | None, batch: int) -> Tensor:
        """SDXL's micro-conditioning `[batch, E]` (Podell et al., arXiv 2307.01952, section 2.2); zeros for others.

        pooled: `[B, P]` of the text. time_ids: `[B, 6]`, original height and width, crop top and left, target size.
        """
        like = self.time_embedding.linear_2.weight
        if self.config.addition_embed_type is None:
            return like.new_zeros(batch, len(like))
        times = self.add_time_proj(time_ids.flatten()).unflatten(0, (batch, -1)).flatten(1)
        return self.add_embedding(torch.cat((pooled, times.to(pooled.dtype)), -1))

    @property
    def adapters(self) -> list[nn.Module]:
        """Of each IP-Adapter, what projects its pictures."""
        return list(getattr(self.encoder_hid_proj, "image_projection_layers", ()))


def conditioned(unet: UNet2DConditionModel) -> ConditionedUNet:
    """A UNet that reads conditions, of modules of its own and the parameters of the one given, which stays as it is.

    Raises:
        UserError: a part of it that a condition knows nothing of.
    """
    refuse(unet)
    shared = {id(t): t for t in (*unet.parameters(), *unet.buffers())}
    made = copy.deepcopy(unet, shared)
    made.__class__ = ConditionedUNet
    crossing = [m for m in made.modules() if isinstance(m, Attention) and m.is_cross_attention]
    for index, attn in enumerate(crossing):
        adapters = attn.processor if isinstance(attn.processor, ADAPTED) else None
        attn.set_processor(PreparedAttnProcessor(index, adapters))
    return made


def refuse(unet: UNet2DConditionModel) -> None:
    """Raise `UserError` for a UNet whose condition is more than tokens, pictures and SDXL's sizes."""
    if type(unet) is not UNet2DConditionModel:
        raise UserError(f"{type(unet).__name__} is no UNet2DConditionModel of diffusers")
    config, said = unet.config, ""
    if config.addition_embed_type not in (None, "text_time"):
        said = f"addition_embed_type {config.addition_embed_type!r}"
    elif config.encoder_hid_dim_type not in (None, "text_proj", "ip_image_proj"):
        said = f"encoder_hid_dim_type {config.encoder_hid_dim_type!r}"
    elif config.time_cond_proj_dim is not None:
        said = "an embedding of the guidance scale"
    elif unet.class_embedding is not None:
        said = "class labels"
    elif config.in_channels != config.out_channels:
        raise UserError(
            f"this UNet has {config.in_channels} channels in and {config.out_channels} out, as those that inpaint: "
            "run it in diffusers' own pipeline, which semantica.accelerate(pipeline) makes faster"
        )
    else:
        for name, module in unet.named_modules():
            if isinstance(module, Attention) and module.is_cross_attention:
                scales = getattr(module.processor, "scale", [])
                if not isinstance(module.processor, (*PLAIN, *ADAPTED)) or module.added_kv_proj_dim is not None:
                    said = f"{name} with {type(module.processor).__name__}"
                elif not all(isinstance(scale, int | float) for scale in scales):
                    said = f"{name} with a scale for each picture"
                elif module.norm_q is not None or module.norm_k is not None or module.spatial_norm is not None:
                    said = f"{name} with norms of its own"
        if not any(isinstance(module, Attention) and module.is_cross_attention for module in unet.modules()):
            said = "no cross-attention"
    if said:
        raise UserError(f"this UNet has {said}: a condition knows tokens, IP-Adapters' pictures and SDXL's sizes only")
