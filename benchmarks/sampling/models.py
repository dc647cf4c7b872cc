"""The models that sampling is measured on: presets with drawn weights, or run folders of trained ones."""

from pathlib import Path

import numpy as np

from semantica.errors import UserError
from semantica.model.presets import PRESETS, encoder_preset, preset
from semantica.pipelines.runfolder import check_run
from semantica.solvers import noise

# between tiny and small, for small machines: 64 pixels, 17 M parameters
MEDIUM = dict(
    image_size=64, patch_size=1, channels=(64, 128), depths=(2, 2), width=384, depth=4, heads=6, emb_dim=384
)  # fmt: skip
NAMES = (*PRESETS, "64px-16M")


def settings(name: str) -> tuple[dict, dict]:
    """Settings of the denoiser and of the encoder that belong to a name."""
    if name == "64px-16M":
        return MEDIUM, encoder_preset("small", MEDIUM["image_size"])
    return preset(name), encoder_preset(name, PRESETS[name]["image_size"])


def build(name: str):
    """A pipeline whose weights are drawn from a seed. What training starts at zero is drawn too, cross-attention large
    enough for the condition to show: else an implementation that ignores it would pass."""
    import torch

    from semantica.model.encoders import ViTEncoder
    from semantica.model.uvit import UViT
    from semantica.pipelines.variations import SemanticaPipeline
    from semantica.sampling.scheduler import SemanticaScheduler

    unet_settings, encoder_settings = settings(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ViTEncoder(**encoder_settings).eval()
        unet = UViT(**unet_settings, streams={"image": encoder.token_dim}).eval()
        with torch.no_grad():
            for parameter_name, parameter in unet.named_parameters():
                if not parameter.any() and parameter_name.endswith("weight"):
                    large = 8.0 if ".cross." in parameter_name else 0.5
                    parameter.normal_(0, large * parameter[0].numel() ** -0.5)
    return SemanticaPipeline(unet, encoder, SemanticaScheduler(image_size=unet.config.image_size))


def check(name: str) -> None:
    """Raises `UserError` for what is neither a name nor a run folder."""
    if name not in NAMES:
        if not Path(name).is_dir():
            raise UserError(f"--models {name}: neither one of {', '.join(NAMES)} nor a run folder")
        check_run(Path(name))


def folder_of(name: str, place: Path) -> Path:
    """The run folder of a model: the user's own, or one written into `place` where it is not there yet.

    Raises:
        UserError: as `check`.
    """
    check(name)
    if name not in NAMES:
        return Path(name)
    target = place / name
    if not target.exists():
        build(name).save_pretrained(target, safe_serialization=True)
    return target


def contents(seed: int, batch: int, image_size: int, condition_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Condition images, coloured squares `[B, 3, C, C]` in [-1, 1], and starting noise `[B, 3, S, S]`."""
    # a colour of its own tells a picture from the others even to an encoder with drawn weights
    drawn = noise(2 * seed, (batch, 3, 17, 1))
    squares = np.tanh(2 * drawn[:, :, :1] + drawn[:, :, 1:].reshape(batch, 3, 4, 4))
    images = np.kron(squares, np.ones((1, 1, condition_size // 4, condition_size // 4), np.float32))
    return np.ascontiguousarray(images, np.float32), noise(2 * seed + 1, (batch, 3, image_size, image_size))
