"""Public models by their published configurations, at full size with drawn weights: for tests and benchmarks.

Where the figures come from. UNets and autoencoders: the authors' own configurations, translated as diffusers'
`loaders/single_file_utils.py:create_unet_diffusers_config_from_ldm` and `create_vae_diffusers_config_from_ldm` do:
    Stable Diffusion 1.5: CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml
    Stable Diffusion 2.1: Stability-AI/stablediffusion, configs/stable-diffusion/v2-inference-v.yaml: `parameterization`
        "v", heads of 64 channels, a context of 1024 (OpenCLIP ViT-H, its last layer but one), linear projections; 768
        pixels by its README, which also has attention in fp32 without fused kernels: diffusers' `upcast_attention`,
        which its processors for PyTorch 2 do not read, since these add up logits in fp32
    SDXL base: Stability-AI/generative-models, configs/inference/sd_xl_base.yaml
    image variations: lambdalabs/sd-image-variations-diffusers, trained by sd-image-condition-finetune.yaml of its
        authors' copy of CompVis/stable-diffusion: the UNet of v1-inference.yaml, 8 heads and a context of 768, with
        `FrozenCLIPImageEmbedder`; as LambdaLabsML/lambda-diffusers, scripts/convert_sd_image_to_diffusers.py, has it.
        The one token is the projected image embedding of CLIP ViT-L/14 (model card; diffusers' own pipeline)
IP-Adapters: tencent-ailab/IP-Adapter, `ip_adapter/ip_adapter.py` and `resampler.py`: 4 tokens of the projected
embedding of OpenCLIP ViT-H/14, or 16 of a resampler (depth 4, 12 heads of 64) of the 257 tokens before its last layer.
Whatever a table leaves out is a default of diffusers' class. Sizes agree with table 1 of the SDXL paper, arXiv
2307.01952: 860M, 865M, 2.6B.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

SD1 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    # the number of heads, whatever diffusers calls it: head dims are 40, 80 and 160
    "attention_head_dim": 8,
}
SD2 = SD1 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Published:
    """A public UNet.

    Attributes:
        unet: arguments of `UNet2DConditionModel`.
        tokens: of its cross-attention, of one sample.
        vae: arguments of `AutoencoderKL`.
        parameters: of the UNet.
        prediction: what it predicts.
    """

    unet: Mapping[str, Any]
    tokens: int
    vae: Mapping[str, Any]
    parameters: int
    prediction: str = "epsilon"


MODELS = {
    "sd-1.5": Published(SD1, 77, KL | {"sample_size": 512}, 859_520_964),
    "sd-2.1": Published(SD2, 77, KL | {"sample_size": 768}, 865_910_724, "v_prediction"),
    "sdxl-base": Published(
        SDXL, 77, KL | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, 2_567_463_684
    ),
    "sd-image-variations": Published(SD1, 1, KL | {"sample_size": 512}, 859_520_964),
}
VAE_PARAMETERS = 83_653_863


@dataclass(frozen=True)
class Adapter:
    """An IP-Adapter: how many tokens it makes of a picture, and the width and number of those it reads.

    Attributes:
        tokens: made of one picture.
        width: of the image encoder's output.
        seen: tokens of the encoder that a resampler reads; 1 is its projected embedding.
        heads, inner: of the resampler; diffusers has no other depth than 4.
    """

    tokens: int
    width: int
    seen: int = 1
    heads: int = 12
    inner: int = 768


ADAPTERS = {"ip-adapter": Adapter(4, 1024), "ip-adapter-plus": Adapter(16, 1280, 257)}


def draw(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Fill a model on the meta device with weights that keep the size of activations, cheaply; in eval mode.

    Matrices and kernels are uniform with variance 1 / fan-in (LeCun et al. 1998), norms near 1 and 0, so that a norm
    whose weights are forgotten shows.
    """
    # the module's own `to`: diffusers' warns of parts kept in fp32 where there are none
    model = nn.Module.to(model, dtype).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                bound = (3 / weight[0].numel()) ** 0.5
                weight.uniform_(-bound, bound, generator=generator)
            else:
                weight.uniform_(-0.2, 0.2, generator=generator).add_(float(name.endswith("weight")))
    return model


def unet(name: str, adapter: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The UNet of `MODELS[name]`, with an IP-Adapter of `ADAPTERS` where one is named."""
    with torch.device("meta"):
        made = UNet2DConditionModel(**MODELS[name].unet)
    made = draw(made, dtype, seed)
    if adapter:
        made._load_ip_adapter_weights([adapter_weights(made, ADAPTERS[adapter])], low_cpu_mem_usage=True)
        nn.Module.to(made, dtype).eval()
    return made


def vae(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The autoencoder of `MODELS[name]`."""
    with torch.device("meta"):
        made = AutoencoderKL(**MODELS[name].vae)
    return draw(made, dtype, seed)


def inputs(name: str, batch: int, size: int, adapter: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a UNet's forward for latents `[batch, 4, size, size]`, fp32."""
    published, generator = MODELS[name], torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width = published.unet["cross_attention_dim"]
    given = {
        "sample": normal(batch, 4, size, size),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": normal(batch, published.tokens, width),
    }
    added: dict[str, Any] = {}
    if published.unet.get("addition_embed_type") == "text_time":
        # of SDXL's pooled text embedding; six numbers of 256 values each make the rest of 2816
        side = 8.0 * published.unet["sample_size"]
        added = {"text_embeds": normal(batch, 1280), "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * batch)}
    if adapter:
        kind = ADAPTERS[adapter]
        shape = (kind.width,) if kind.seen == 1 else (kind.seen, kind.width)
        added["image_embeds"] = [normal(batch, 1, *shape)]
    return given | ({"added_cond_kwargs": added} if added else {})


def adapter_weights(model: nn.Module, adapter: Adapter, seed: int = 1) -> dict[str, dict[str, Tensor]]:
    """Drawn weights under the names of the published files: `image_proj` and `ip_adapter`."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.cross_attention_dim

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(name: str, dim: int) -> dict[str, Tensor]:
        near = torch.randn(dim, generator=generator) / 5
        return {f"{name}.weight": 1 + near, f"{name}.bias": near.flip(0)}

    if adapter.seen == 1:
        made = adapter.tokens * width
        projection = {"proj.weight": matrix(made, adapter.width), "proj.bias": torch.zeros(made), **norm("norm", width)}
    else:
        inner, heads = adapter.inner, 64 * adapter.heads
        projection = {"latents": torch.randn(1, adapter.tokens, inner, generator=generator)}
        for name, rows, columns in (("proj_in", inner, adapter.width), ("proj_out", width, inner)):
            projection |= {f"{name}.weight": matrix(rows, columns), f"{name}.bias": torch.zeros(rows)}
        projection |= norm("norm_out", width)
        for i in range(4):
            projection |= norm(f"layers.{i}.0.norm1", inner) | norm(f"layers.{i}.0.norm2", inner)
            projection[f"layers.{i}.0.to_q.weight"] = matrix(heads, inner)
            projection[f"layers.{i}.0.to_kv.weight"] = matrix(2 * heads, inner)
            projection[f"layers.{i}.0.to_out.weight"] = matrix(inner, heads)
            projection |= norm(f"layers.{i}.1.0", inner)
            projection[f"layers.{i}.1.1.weight"] = matrix(4 * inner, inner)
            projection[f"layers.{i}.1.3.weight"] = matrix(inner, 4 * inner)
    layers = {}
    for i, name in enumerate(model.attn_processors):
        if "attn2" in name:
            hidden = model.get_submodule(name.removesuffix(".processor")).inner_dim
            layers |= {f"{i}.to_{part}_ip.weight": matrix(hidden, width) for part in "kv"}
    return {"image_proj": projection, "ip_adapter": layers}
