"""Modules of a run from its configuration."""

import torch
from torch import nn

from semantica.encoder import PretrainedEncoder, ViTEncoder
from semantica.errors import UserError
from semantica.presets import encoder_preset, preset
from semantica.scheduler import SemanticaScheduler
from semantica.train.config import TrainConfig
from semantica.uvit import UViT


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
    return *modules, SemanticaScheduler(image_size=size, reference=config.reference)
