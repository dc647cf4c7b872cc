"""Modules of a run from its configuration."""

import torch
from torch import nn

from semantica.errors import UserError
from semantica.model.encoders import ViTEncoder, frozen_encoder
from semantica.model.presets import encoder_preset, preset
from semantica.model.uvit import UViT
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.train.config import TrainConfig
from semantica.train.data.tokens import stored_encoder
from semantica.train.heads import RepaHead, aligned_depth


def build(config: TrainConfig, device: torch.device) -> tuple[UViT, nn.Module, SemanticaScheduler]:
    """Denoiser, encoder and scheduler; initial weights are a function of the seed alone.

    The encoder of stored tokens stays on the CPU, unread until a picture without stored tokens is to be encoded.

    Raises:
        UserError: sizes that do not fit, or an encoder that cannot be loaded.
    """
    if config.tokens and config.mode == "reconstruct" and config.crop != "centre":
        raise UserError("--tokens show the centre of a picture: with --mode reconstruct give --crop centre too")
    settings = preset(config.preset, config.image_size)
    size = settings["image_size"]
    torch.manual_seed(config.seed)
    if config.encoder == "vit":
        if config.encoder_size is not None:
            raise UserError("--encoder-size is for frozen encoders: the trainable one sees --image-size")
        encoder = ViTEncoder(**encoder_preset(config.preset, size))
    else:
        # how an encoder is loaded must not decide how the denoiser begins
        with torch.random.fork_rng(devices=[]):
            wanted = config.encoder, config.encoder_size, config.encoder_tokens
            encoder = stored_encoder(config.tokens, *wanted) if config.tokens else frozen_encoder(*wanted)
    unet = UViT(**settings, streams={"image": encoder.token_dim}, conditioning=config.conditioning)
    bad = [scale for scale in config.scales if scale < 1 or size % scale]
    if bad:
        raise UserError(f"--scales {bad[0]} does not divide the image size {size}")
    # convolutions are fastest with channels last, on every device
    unet = unet.to(device).to(memory_format=torch.channels_last)
    if not config.tokens:
        encoder = encoder.to(device).to(memory_format=torch.channels_last)
    return unet, encoder, SemanticaScheduler(image_size=size, reference=config.reference)


def alignment(
    config: TrainConfig, unet: UViT, encoder: nn.Module, device: torch.device
) -> tuple[RepaHead | None, nn.Module | None]:
    """What `--repa` trains, and the frozen encoder that it aligns to; nothing without it.

    Raises:
        UserError: the encoder cannot be loaded, or there is no such block.
    """
    if not config.repa:
        return None, None
    teacher = encoder
    if config.repa_encoder not in (None, config.encoder):
        teacher = frozen_encoder(config.repa_encoder).to(device)
    depth = aligned_depth(len(unet.transformer_blocks), config.repa_depth)
    # random numbers of its own: all else stays as it is without alignment
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return RepaHead(unet.config.width, teacher.token_dim, depth).to(device), teacher
