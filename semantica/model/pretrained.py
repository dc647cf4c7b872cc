"""Frozen vision backbones of transformers and timm: those whose features form a grid."""

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from semantica.condition import Stream
from semantica.errors import UserError, first_line
from semantica.model import backbones, timm_backbones
from semantica.model.backbones import Loaded, square
from semantica.model.image_encoder import ImageEncoder
from semantica.model.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from semantica.sight import Sight

# what configurations call the networks of timm
TIMM = ("timm", "timm_wrapper")
# class and register tokens that a transformer may have before its patches
MOST_FIRST = 16


class PretrainedEncoder(ImageEncoder):
    """A frozen vision backbone of transformers or timm, such as DINOv2, CLIP, SigLIP, Swin, ConvNeXt or EfficientNet.

    Build one from a hub name or a local folder with `PretrainedEncoder.from_source`; `from_pretrained` reads it back
    from a run folder, without the source. Tokens are its last features, a square grid in rows from the top left:
    patches of a transformer, or the places of a convolutional network's last map.

    Args:
        source, revision: where the weights came from; kept for the record.
        vision: the backbone's transformers configuration with its `model_type`, or `{"model_type": "timm",
            "architecture": ..., "model_args": ...}`.
        image_size: side that images are resized to before the backbone.
        mean, std: per-channel normalisation of images in [0, 1].
        tokens: "patches" (the grid only) or "all" (class and register tokens too, before it).
        resize, interpolation: of pictures, see `semantica.sight.Sight`.
        grid, width: tokens along a side of the grid, and their width; None: what the configuration of a plain
            transformer says.
        pooler: see `semantica.model.backbones.build`.
        bgr: whether the backbone takes blue first.
    """

    trainable = False

    @register_to_config
    def __init__(
        self,
        source: str,
        revision: str | None,
        vision: dict,
        image_size: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        tokens: str = "patches",
        resize: int | None = None,
        interpolation: str | None = None,
        grid: int | None = None,
        width: int | None = None,
        pooler: bool = True,
        bgr: bool = False,
    ):
        super().__init__()
        if tokens not in ("patches", "all"):
            raise UserError(f"tokens={tokens!r}: expected 'patches' or 'all'")
        self.tower = library(vision).build(vision, pooler, source).requires_grad_(False).eval()
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.patches = (grid or image_size // self.tower.config.patch_size) ** 2

    @classmethod
    def from_source(
        cls, source: str, *, revision: str | None = None, image_size: int | None = None, tokens: str = "patches"
    ) -> "PretrainedEncoder":
        """Load the weights of a hub model or a local folder (safetensors only, no remote code).

        Mean, standard deviation, size, interpolation and the share that is cut out of a picture are those of its
        preprocessor_config.json, or of timm's pretrained_cfg.

        Args:
            source: hub name, such as "facebook/dinov2-small" or "timm/vit_small_patch16_dinov3.lvd1689m", or a folder
                made by `save_pretrained`, or by `timm.models.save_for_hf`.
            revision: hub revision; the resolved commit is recorded.
            image_size: resize images to this side; a table of positions is interpolated once, here. Default: that of
                its preprocessing, 224 for DINOv2; the network's own size where that is fixed.
            tokens: "patches" or "all".

        Raises:
            UserError: nothing can be loaded from there, the model is of another type, the size does not fit, or its
                features form no square grid.
        """
        found = described(source, revision)
        loaded = library(found).load(source, revision, found, image_size)
        prepared = loaded.preprocessing
        tower = loaded.tower.requires_grad_(False).eval()
        encoder = cls(
            source, loaded.commit, loaded.vision, prepared.size, prepared.mean, prepared.std, tokens,
            prepared.resize, prepared.interpolation, *grid_of(tower, loaded, source), loaded.pooler, prepared.bgr,
        )  # fmt: skip
        encoder.tower.load_state_dict(tower.state_dict())
        encoder.default_size = loaded.default_size
        return encoder

    @property
    def sight(self) -> Sight:
        nearest = library(self.config.vision) is timm_backbones
        return Sight(self.image_size, self.config.resize, self.config.interpolation, nearest)

    @property
    def layers(self) -> nn.ModuleList | nn.Sequential | tuple[()]:
        """A transformer's repeated layers; none of a backbone whose layers differ from each other."""
        lists = [module for module in self.tower.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        # without embeddings and heads, which in small towers hold more than the layers
        whole = sum(p.numel() for p in {p for part in lists for p in part.parameters()})
        most = (part for part in lists if alike(part) and 2 * sum(map(torch.numel, part.parameters())) > whole)
        return next(most, ())

    @property
    def token_dim(self) -> int:
        return self.config.width or self.tower.config.hidden_size

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """Stays in evaluation mode, also where the tower is trained along: without dropout."""
        return super().train(False)

    def forward(self, images: Tensor) -> Stream:
        """Images `[B, 3, S, S]` in [-1, 1], any size, to tokens `[B, M, C]` and a pooled vector `[B, C]`.

        The vector is the one that the backbone pools to; where there is none, or of another width than the tokens, the
        class token, and without one the mean of the tokens.
        """
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self.encode(images)

    def encode(self, images: Tensor) -> Stream:
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
        values = (images.clamp(-1, 1) + 1) / 2
        pixels = ((values.flip(1) if self.config.bgr else values) - self.pixel_mean) / self.pixel_std
        made, pooled = library(self.config.vision).features(self.tower, pixels.to(next(self.tower.parameters()).dtype))
        tokens = made.flatten(2).transpose(1, 2).contiguous() if made.ndim == 4 else made
        first = tokens.shape[1] - self.patches
        if pooled is None or pooled.shape[-1] != tokens.shape[-1]:
            pooled = tokens[:, 0] if first else tokens.mean(1)
        return Stream(tokens[:, first:] if self.config.tokens == "patches" else tokens, pooled)


def library(config: dict[str, Any]) -> ModuleType:
    """The module that knows the backbones of a configuration."""
    return timm_backbones if config.get("model_type") in TIMM or "architecture" in config else backbones


def described(source: str, revision: str | None) -> dict[str, Any]:
    """config.json of a folder or of a hub's repository. Raises `UserError` where there is none, or one with code."""
    from transformers import PreTrainedConfig

    try:
        found, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"encoder {source!r} cannot be loaded: {first_line(error)}") from error
    if "auto_map" in found:
        raise UserError(f"encoder {source!r} cannot be loaded: it names code to run (auto_map), which is never done")
    return found


def grid_of(tower: nn.Module, loaded: Loaded, source: str) -> tuple[int, int]:
    """Tokens along a side of the grid of a backbone's features, and their width.

    Raises:
        UserError: it takes no pictures of that size, or its features form no square grid.
    """
    size = loaded.preprocessing.size
    try:
        with torch.no_grad():
            made, _ = library(loaded.vision).features(tower, torch.zeros(1, 3, size, size))
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"image size {size} does not fit encoder {source!r}: {first_line(error)}") from error
    if made.ndim == 4 and made.shape[2] == made.shape[3]:
        return made.shape[2], made.shape[1]
    if made.ndim == 3:
        count = made.shape[1]
        side = math.isqrt(count)
        if patch := square(loaded.vision.get("patch_size")):
            # without it five tokens before four patches would pass for nine of these
            side = min(side, size // patch)
        first = getattr(tower, "num_prefix_tokens", count - side**2)
        if first <= MOST_FIRST and side**2 == count - first:
            return side, made.shape[2]
    raise UserError(
        f"encoder {source!r} gives features {list(made.shape[1:])}, which form no square grid: try another size"
    )


def alike(layers: nn.ModuleList | nn.Sequential) -> bool:
    """Whether one graph serves all of several layers."""
    shapes = {(type(layer), tuple(p.shape for p in layer.parameters())) for layer in layers}
    return len(layers) > 1 and len(shapes) == 1 and any(True for _ in layers.parameters())
