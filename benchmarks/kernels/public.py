"""The shapes that public UNets and autoencoders ask of the operators, found by running them on the meta device."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from semantica.errors import UserError
from semantica.files import read_json
from semantica.fused import published
from semantica.fused.accelerate import accelerate
from semantica.fused.norms import FusedGroupNorm
from semantica.kernels import Case
from semantica.kernels.cross_attention.cases import CrossAttentionCase
from semantica.kernels.group_norm.cases import GroupNormCase

# operator and case -> how often one evaluation calls it
Counts = Counter[tuple[str, Case]]


def split(name: str) -> tuple[str, str]:
    """A model's name, or a folder, and the IP-Adapter after a "+" behind it, if any."""
    base, _, adapter = name.rpartition("+")
    return (base, adapter) if adapter in published.ADAPTERS and base else (name, "")


def is_public(name: str) -> bool:
    """Whether a name is that of a published model, or the folder of a pipeline with a `UNet2DConditionModel`."""
    base, _ = split(name)
    path = Path(base) / "unet" / "config.json"
    return base in published.MODELS or path.is_file() and read_json(path).get("_class_name") == "UNet2DConditionModel"


def check(name: str) -> None:
    """Raises `UserError` for what is neither a published model nor such a folder."""
    if not is_public(name):
        known = ", ".join(published.MODELS)
        raise UserError(f"--models {name}: neither one of {known} nor the folder of a diffusers pipeline with a UNet")


def configuration(base: str, part: str) -> dict[str, Any]:
    """Arguments of the "unet" or the "vae" of a published model or a folder."""
    if base in published.MODELS:
        return dict(getattr(published.MODELS[base], part))
    return read_json(Path(base) / part / "config.json")


def on_meta(name: str, part: str) -> nn.Module:
    """The "unet" or the "vae" without its weights."""
    kind, config = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part], configuration(split(name)[0], part)
    with torch.device("meta"):
        return kind.from_config(config).eval()


def given(unet: nn.Module, batch: int, tokens: int) -> dict[str, Any]:
    """Keyword arguments of a UNet on the meta device, as `semantica.fused.published.inputs` has them."""
    config, added = unet.config, {}
    side, sizes = config.sample_size, 6
    with torch.device("meta"):
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
            added = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, sizes)}
        return {
            "sample": torch.empty(batch, config.in_channels, side, side),
            "timestep": torch.empty((), dtype=torch.int64),
            "encoder_hidden_states": torch.empty(batch, tokens, config.cross_attention_dim),
            "added_cond_kwargs": added or None,
        }


def tokens_of(name: str) -> int:
    """Tokens of the condition: of CLIP's text tower where a folder says nothing else."""
    base, _ = split(name)
    if base in published.MODELS:
        return published.MODELS[base].tokens
    text = Path(base) / "text_encoder" / "config.json"
    return read_json(text)["max_position_embeddings"] if text.is_file() else 1


def watched(model: nn.Module, call: Callable[[nn.Module], Any], extra: tuple[int, ...] = ()) -> Counts:
    """What a model on the meta device calls; extra: tokens of further streams of each cross-attention.

    The model is accelerated, so that the norms are told what they take over: SiLU, addend, FiLM.
    """
    found: Counts = Counter()

    def norm(module: FusedGroupNorm, arguments: tuple, options: dict) -> None:
        named = dict(zip(("scale", "shift", "addend"), arguments[1:])) | options
        shape = tuple(arguments[0].shape)
        found["group_norm", GroupNormCase(
            shape, module.num_groups, film=named.get("scale") is not None, activation=module.activation,
            # pixels in a row, as an autoencoder's attention has them, have no such layout
            channels_last=len(shape) == 4, addend=named.get("addend") is not None,
        )] += 1  # fmt: skip

    def attention(module: Attention, arguments: tuple, options: dict) -> None:
        hidden, tokens = arguments[0], options["encoder_hidden_states"]
        sizes = (tokens.shape[1], *extra)
        batch, queries, _ = hidden.shape
        dim = module.inner_dim // module.heads
        case = CrossAttentionCase(batch, queries, module.heads, dim, sizes, gates=len(sizes) > 1, q_norm=False)
        found["cross_attention", case] += 1

    for module in accelerate(model).modules():
        if isinstance(module, FusedGroupNorm):
            module.register_forward_pre_hook(norm, with_kwargs=True)
        elif isinstance(module, Attention) and module.is_cross_attention:
            module.register_forward_pre_hook(attention, with_kwargs=True)
    with torch.no_grad():
        call(model)
    return found


@functools.cache
def counts(name: str, batch: int = 1) -> dict[str, Counts]:
    """What one guided evaluation of the UNet (both branches in one batch) and one decoding ask of the operators.

    Args:
        name: see `check`; "+" and an IP-Adapter behind it adds its stream. batch: pictures.

    Returns:
        By "UNet" and "decoder", with the side of the pictures: `{"sd-1.5 UNet, 512 px": {(operator, case): calls}}`.

    Raises:
        UserError: as `check`.
    """
    check(name)
    unet, vae, (base, adapter) = on_meta(name, "unet"), on_meta(name, "vae"), split(name)
    called, side = Path(base).name + (f"+{adapter}" if adapter else ""), unet.config.sample_size
    extra = (published.ADAPTERS[adapter].tokens,) if adapter else ()
    # each level but the last doubles the side
    pixels = side << (len(vae.config.block_out_channels) - 1)
    latents = torch.empty(batch, vae.config.latent_channels, side, side, device="meta")
    return {
        f"{called} UNet, {pixels} px": watched(unet, lambda m: m(**given(m, 2 * batch, tokens_of(name))), extra),
        f"{called} decoder, {pixels} px": watched(vae, lambda m: m.decode(latents)),
    }
