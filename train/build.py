"""Modules of a run from its configuration."""

import torch
from torch import nn

from semantica.encoder import PretrainedEncoder, ViTEncoder
from semantica.errors import UserError
from semantica.presets import encoder_preset, preset
from semantica.scheduler import SemanticaScheduler
from semantica.train.config import TrainConfig
from semantica.uvit import UViT


def pick_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): use 'cpu', 'cuda' or 'auto'") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: use 'cpu', 'cuda' or 'auto'")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast: bf16 where the processor has instructions for it, unless told otherwise."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32


def build(config: TrainConfig, device: torch.device) -> tuple[UViT, nn.Module, SemanticaScheduler]:
    """Denoiser, encoder and scheduler; initial weights are a function of the seed alone.

    Raises:
        UserError: sizes that do not fit, or an encoder that cannot be loaded.
    """
    settings = preset(config.preset, config.image_size)
    size = settings["image_size"]
    torch.manual_seed(config.seed)
    if config.encoder == "vit":
        if config.encoder_size is not None:
            raise UserError("--encoder-size is for frozen encoders: the trainable one sees --image-size")
        encoder = ViTEncoder(**encoder_preset(config.preset, size))
    else:
        encoder = PretrainedEncoder.from_source(
            config.encoder, image_size=config.encoder_size, tokens=config.encoder_tokens
        )
    unet = UViT(**settings, streams={"image": encoder.token_dim}, conditioning=config.conditioning)
    bad = [scale for scale in config.scales if scale < 1 or size % scale]
    if bad:
        raise UserError(f"--scales {bad[0]} does not divide the image size {size}")
    # convolutions are fastest with channels last, on every device
    modules = [m.to(device).to(memory_format=torch.channels_last) for m in (unet, encoder)]
    return *modules, SemanticaScheduler(image_size=size)
