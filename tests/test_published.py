"""Public models at full size with drawn weights: as large as published, every norm fused, numbers beside stock's."""

import gc

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

import semantica
from semantica.fused import published
from semantica.fused.parts import parts
from semantica.fused.published import ADAPTERS, MODELS, VAE_PARAMETERS, Adapter, inputs

SLOW = pytest.mark.slow
# the largest is 2.6 billion parameters: 10 GB, and once more while the other kinds of numbers are made of it
GUIDED = [
    ("sd-1.5", None),
    ("sd-2.1", None),
    ("sd-image-variations", None),
    ("sd-1.5", "ip-adapter"),
    ("sd-1.5", "ip-adapter-plus"),
    ("sdxl-base", None),
]


def on_meta(kind: type[nn.Module], config: dict) -> nn.Module:
    with torch.device("meta"):
        return kind(**config)


def norms_by_configuration(config: dict) -> int:
    """GroupNorms of a UNet: two in each residual block, one before each transformer, and the last."""
    down, up = ([("CrossAttn" in kind) for kind in config[f"{way}_block_types"]] for way in ("down", "up"))
    layers = config["layers_per_block"]
    blocks = layers * len(down) + 2 + (layers + 1) * len(up)
    return 2 * blocks + layers * sum(down) + 1 + (layers + 1) * sum(up) + 1


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_published_and_every_norm_is_accounted_for(name):
    unet, vae = on_meta(UNet2DConditionModel, MODELS[name].unet), on_meta(AutoencoderKL, MODELS[name].vae)
    assert sum(p.numel() for p in unet.parameters()) == MODELS[name].parameters
    assert sum(p.numel() for p in vae.parameters()) == VAE_PARAMETERS
    # the VAE: 10 residual blocks in the encoder and 14 in the decoder, an attention and a last norm in each
    for model, expected in ((unet, norms_by_configuration(dict(unet.config))), (vae, 2 * (10 + 14) + 2 * 2)):
        assert not any(part.fused for part in parts(model))
        semantica.accelerate(model)
        found = parts(model)
        assert not any(part.why for part in found) and all(part.fused for part in found)
        assert sum({"residual block": 2, "norm": 1}.get(part.kind, 0) for part in found) == expected
        assert expected == sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    crossings = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    assert sum(part.kind == "cross-attention" for part in parts(unet)) == len(crossings) > 0
    dims = {attention.inner_dim // attention.heads for attention in crossings}
    assert dims == ({40, 80, 160} if MODELS[name].unet["attention_head_dim"] == 8 else {64})


def test_adapters_are_as_large_as_published():
    # "only 22M parameters": arXiv 2308.06721, abstract
    unet = on_meta(UNet2DConditionModel, MODELS["sd-1.5"].unet)
    weights = published.adapter_weights(unet, ADAPTERS["ip-adapter"])
    total = sum(weight.numel() for part in weights.values() for weight in part.values())
    assert round(total / 1e6) == 22
    assert len(weights["ip_adapter"]) == 2 * 16


def evaluated(model: nn.Module, given: dict, dtype: torch.dtype = torch.float32, scale: float = 7.5) -> torch.Tensor:
    """One guided evaluation: both branches in one batch, joined in fp32."""
    cast = {"timestep": given["timestep"]}
    cast |= {name: to(value, dtype) for name, value in given.items() if name != "timestep"}
    with torch.no_grad():
        uncond, cond = model(**cast, return_dict=False)[0].float().chunk(2)
    return uncond + scale * (cond - uncond)


def to(value, dtype):
    if isinstance(value, dict):
        return {name: to(part, dtype) for name, part in value.items()}
    return [to(part, dtype) for part in value] if isinstance(value, list) else value.to(dtype)


def compare(model: nn.Module, evaluate) -> tuple[float, float]:
    """Relative error of fp32 to stock's; and how far bf16 is from stock's fp32, in stock's own bf16 error."""
    stock = evaluate(model, torch.float32)
    fused = evaluate(semantica.accelerate(model), torch.float32)
    assert torch.isfinite(stock).all() and stock.std() > 1e-2
    error = float((fused - stock).norm() / stock.norm())
    semantica.restore(model).bfloat16()
    half = evaluate(model, torch.bfloat16)
    fused_half = evaluate(semantica.accelerate(model), torch.bfloat16)
    ratio = float((fused_half - stock).norm() / (half - stock).norm())
    print(f"fp32 {error:.1e}, bf16 {ratio:.2f} of stock's {float((half - stock).norm() / stock.norm()):.1e}")
    gc.collect()
    return error, ratio


@SLOW
@pytest.mark.parametrize("name, adapter", GUIDED)
def test_a_guided_evaluation_at_full_size(name, adapter):
    model, given = published.unet(name, adapter), inputs(name, 2, 16, adapter)
    if adapter:
        for processor in model.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.6]
    error, ratio = compare(model, lambda m, dtype: evaluated(m, given, dtype))
    assert error <= 1e-5 and ratio <= 1.5


@SLOW
@pytest.mark.parametrize("name", ["sd-1.5", "sdxl-base"])
def test_the_autoencoder_at_full_size(name):
    given = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def there_and_back(model, dtype):
        return model(given.to(dtype), return_dict=False)[0].float()

    error, ratio = compare(published.vae(name), there_and_back)
    assert error <= 1e-5 and ratio <= 1.5


def test_resamplers_and_projections_load_as_diffusers_reads_them():
    small = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24, "layers_per_block": 1,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2,
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    for adapter in (Adapter(4, 20), Adapter(6, 20, 9, 1, 64)):
        model = UNet2DConditionModel(**small)
        model._load_ip_adapter_weights([published.adapter_weights(model, adapter)])
        shape = (20,) if adapter.seen == 1 else (adapter.seen, 20)
        (tokens,) = model.encoder_hid_proj([torch.randn(2, 1, *shape)])
        assert tokens.shape == (2, 1, adapter.tokens, 24)
