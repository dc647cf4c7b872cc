"""Modules of a run from its configuration."""

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from semantica.errors import UserError
from semantica.inputs import SINGLE, is_text
from semantica.model.conditioner import Conditioner, encoders_of
from semantica.model.encoders import ViTEncoder, frozen_encoder, text_encoders, weights_sha256
from semantica.model.grow import grow, new_streams
from semantica.model.hub import located
from semantica.model.presets import encoder_preset, preset
from semantica.model.uvit import UViT
from semantica.pipelines.networks import NetworkPipeline
from semantica.pipelines.runfolder import PATTERNS, check_run
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.train.adapters import adapt
from semantica.train.config import TrainConfig
from semantica.train.data.tokens import stored_encoder
from semantica.train.heads import RepaHead, aligned_depth

# settings of a preset that options of the same names replace
SIZES = ("patch_size", "channels", "depths", "width", "depth", "heads")


def build(
    config: TrainConfig,
    device: torch.device,
    building: Callable[[], AbstractContextManager] = nullcontext,
    texts: Iterable[str] = (),
) -> tuple[UViT, nn.Module, SemanticaScheduler]:
    """Denoiser, encoder and scheduler; initial weights are a function of the seed alone, or those of `--init`.

    Where texts condition, the encoder is a `Conditioner`. The encoder of stored tokens stays on the CPU, unread until a
    picture without stored tokens is to be encoded.

    Args:
        building: under which context what is to be trained is made; where it leaves weights without values, they come
            from elsewhere.
        texts: of the training data, where they condition.

    Raises:
        UserError: sizes that do not fit, or an encoder that cannot be loaded.
    """
    if config.tokens and config.mode == "reconstruct" and config.crop != "centre":
        raise UserError("--tokens show the centre of a picture: with --mode reconstruct give --crop centre too")
    settings = preset(config.preset, config.image_size)
    settings |= {name: getattr(config, name) for name in SIZES if getattr(config, name)}
    size = settings["image_size"]
    torch.manual_seed(config.seed)
    parts = {SINGLE: picture_encoder(config, size, building)} if config.pictures else {}
    if config.texts:
        # how it is loaded must not decide how the denoiser begins
        with torch.random.fork_rng(devices=[]):
            parts |= text_encoders(config.text_encoder, texts)
    with building():
        streams = {name: part.token_dim for name, part in parts.items()}
        unet = UViT(**settings, streams=streams, conditioning=config.conditioning, fusion=config.fusion)
    bad = [scale for scale in config.scales if scale < 1 or size % scale]
    if bad:
        raise UserError(f"--scales {bad[0]} does not divide the image size {size}")
    unet = placed(unet, device)
    for name, part in parts.items():
        if is_text(name) or not config.tokens:
            placed(part, device)
    encoder = Conditioner(parts) if config.texts else parts[SINGLE]
    return unet, encoder, SemanticaScheduler(image_size=size, reference=config.reference)


def picture_encoder(config: TrainConfig, size: int, building: Callable[[], AbstractContextManager]) -> nn.Module:
    """What `--encoder` asks for, where the denoiser makes pictures of a size."""
    if config.encoder == "vit":
        if config.encoder_size is not None:
            raise UserError("--encoder-size is for frozen encoders: the trainable one sees --image-size")
        with building():
            return ViTEncoder(**encoder_preset(config.preset, size))
    # how an encoder is loaded must not decide how the denoiser begins
    with torch.random.fork_rng(devices=[]):
        wanted = config.encoder, config.encoder_size, config.encoder_tokens
        made = stored_encoder(config.tokens, *wanted) if config.tokens else frozen_encoder(*wanted)
    if config.encoder_lr is not None:
        made.trainable = True
        made.requires_grad_(True)
    return made


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """On a device, where it has values; convolutions are fastest with channels last, on every device."""
    if any(p.is_meta for p in module.parameters()):
        return module
    return module.to(device).to(memory_format=torch.channels_last)


def begin_with(source: str, unet: UViT, encoder: nn.Module) -> tuple[str, ...]:
    """Fill what is to be trained with the weights of a published run; a frozen encoder stays as it is.

    Returns:
        Streams that the run lacks: what they add begins at zero.

    Raises:
        UserError: there is no such run, its networks are others, or another encoder reads its texts.
    """
    found = NetworkPipeline.load(source)
    try:
        new = new_streams(unet, found.unet)
    except UserError as error:
        raise UserError(f"--init {source}: {error}") from error
    require_alike(source, "denoiser", unet, found.unet)
    grow(unet, found.unet)
    theirs = encoders_of(found.encoder)
    for name, part in encoders_of(encoder).items():
        if name in new:
            continue
        other = theirs.get(name, None if is_text(name) else found.encoder)
        if part.trainable:
            require_alike(source, "encoder", part, other)
            part.load_state_dict(other.state_dict())
        # frozen, but a word of one is none of another's
        elif is_text(name) and (type(part) is not type(other) or weights_sha256(part) != weights_sha256(other)):
            reads = f"reads texts by another {type(other or part).__name__} than this run"
            raise UserError(f"--init {source} {reads}: give --text-encoder {source}")
    return new


def require_alike(source: str, what: str, own: nn.Module, other: nn.Module) -> None:
    """Raises `UserError` where two modules differ in their configurations, but for streams that only one has."""
    if type(own) is not type(other):
        raise UserError(f"--init {source} has a {type(other).__name__} as {what}, this run a {type(own).__name__}")
    for name, value in own.config.items():
        given = other.config.get(name)
        if name == "streams":
            value = {stream: width for stream, width in value.items() if stream in given}
        if not name.startswith("_") and as_json(given) != as_json(value):
            raise UserError(
                f"--init {source} has a {what} of {name} {given}, this run of {value}: give what it was made with"
            )


def adapted(config: TrainConfig, unet: UViT) -> None:
    """The LoRAs that `--lora` asks for, beside weights that are there already or will be.

    Raises:
        UserError: there is no such run as `--init`, or it has other streams.
    """
    folder = located(config.init, PATTERNS)
    check_run(folder)
    base = UViT.from_config(UViT.load_config(folder / "unet"))
    adapt(unet, config.lora, new_streams(unet, base))


def as_json(value: Any) -> str:
    """A value as a file of configuration keeps it: tuples are lists there."""
    return json.dumps(value, sort_keys=True)


def alignment(
    config: TrainConfig, unet: UViT, encoder: nn.Module, device: torch.device
) -> tuple[RepaHead | None, nn.Module | None]:
    """What `--repa` trains, and the frozen encoder that it aligns to; nothing without it.

    Raises:
        UserError: the encoder cannot be loaded, or there is no such block.
    """
    if not config.repa:
        return None, None
    teacher = encoders_of(encoder).get(SINGLE)
    if config.repa_encoder not in (None, config.encoder):
        teacher = frozen_encoder(config.repa_encoder).to(device)
    depth = aligned_depth(len(unet.transformer_blocks), config.repa_depth)
    # random numbers of its own: all else stays as it is without alignment
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return RepaHead(unet.config.width, teacher.token_dim, depth).to(device), teacher
