"""Other libraries that change the same modules: LoRAs of peft, `kernelize` of kernels."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

import semantica
from semantica.fused import hub
from semantica.fused.norms import FusedResnetBlock2D
from semantica.fused.parts import parts

# of peft's layers: attention, and the convolutions and time embedding inside residual blocks
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2),
    ).eval()  # fmt: skip


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator)
    return model(sample, 7, text, return_dict=False)[0]


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


def adapter(unet: nn.Module, folder) -> str:
    """A LoRA file as training writes it."""
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), "drawn")
    for name, weight in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    weights = peft.get_peft_model_state_dict(unet, adapter_name="drawn")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights)
    unet.delete_adapters("drawn")
    return str(folder)


def test_a_lora_before_and_after_gives_the_same_output(unet, tmp_path):
    plain, file = output(unet), adapter(unet, tmp_path)
    unet.load_lora_adapter(file, prefix="unet", use_safetensors=True)
    stock = output(unet)
    assert (stock - plain).abs().max() > 0.1 * plain.abs().max()
    before = output(semantica.accelerate(unet))
    assert near(before, stock) and all(part.fused for part in parts(unet))
    unet.unload_lora()
    assert near(output(unet), plain) and all(part.fused for part in parts(unet))
    # on the accelerated network: loaded, fused into the weights and taken out again
    unet.load_lora_adapter(file, prefix="unet", use_safetensors=True)
    assert torch.equal(output(unet), before)
    unet.fuse_lora()
    assert near(output(unet), stock)
    # peft takes it out by subtraction, which rounds
    unet.unfuse_lora()
    assert near(output(unet), stock) and near(output(semantica.restore(unet)), stock)


def test_a_lora_that_does_not_fit_changes_nothing(unet, tmp_path):
    file = adapter(unet, tmp_path)
    other = UNet2DConditionModel(**dict(unet.config) | {"block_out_channels": (16, 32)}).eval()
    plain = output(semantica.accelerate(other))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_lora_adapter(file, prefix="unet", use_safetensors=True)
    assert all(part.fused for part in parts(other)) and torch.equal(output(other), plain)


def test_kernelize_takes_the_norm(unet, monkeypatch):
    kernels = pytest.importorskip("kernels.layer", exc_type=ImportError)
    # what its replace_kernel_forward_from_hub sets, and nothing takes back
    monkeypatch.setattr(nn.GroupNorm, "kernel_layer_name", "", raising=False)
    monkeypatch.setattr(nn.GroupNorm, "kernel_condition", None, raising=False)
    stock = output(unet)
    kernels.replace_kernel_forward_from_hub(nn.GroupNorm, "GroupNorm")
    with kernels.use_kernel_mapping(hub.MAPPING):
        kernels.kernelize(unet, mode=kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE, use_fallback=False)
    norms = [module for module in unet.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and all(norm.forward.__func__ is hub.GroupNorm.forward for norm in norms)
    assert near(output(unet), stock) and not torch.equal(output(unet), stock)
    # and the two do not meet: what kernelize has changed is left to it
    with pytest.raises(semantica.UserError, match="could be fused"):
        semantica.accelerate(unet.conv_norm_out)
    assert not any(isinstance(module, FusedResnetBlock2D) for module in unet.modules())


def test_the_layer_is_that_of_torch():
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    for affine in (True, False):
        norm = nn.GroupNorm(2, 8, affine=affine)
        assert near(hub.MAPPING["GroupNorm"]["cpu"].load().forward(norm, x), norm(x))
