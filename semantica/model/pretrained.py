"""Frozen DINOv2, CLIP or SigLIP vision towers through transformers."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from semantica.condition import Stream
from semantica.errors import UserError, first_line
from semantica.model.image_encoder import ImageEncoder

# model type -> (configuration class, model class) of transformers; nothing outside this table is ever built
PRETRAINED = {
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel"),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel"),
}
# a checkpoint of both towers -> its vision half
VISION_HALF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PretrainedEncoder(ImageEncoder):
    """A frozen DINOv2, CLIP or SigLIP vision tower.

    Build one from a hub name or a local folder with `PretrainedEncoder.from_source`; `from_pretrained` reads it back
    from a run folder, without the source.

    Args:
        source, revision: where the weights came from; kept for the record.
        vision: the tower's transformers configuration, with its `model_type`.
        image_size: side that images are resized to before the tower.
        mean, std: per-channel normalisation of images in [0, 1].
        tokens: "patches" (patch tokens only) or "all" (class and register tokens too).
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
    ):
        super().__init__()
        if tokens not in ("patches", "all"):
            raise UserError(f"tokens={tokens!r}: expected 'patches' or 'all'")
        config_class, model_class = pretrained_classes(vision.get("model_type"), source)
        config = config_class.from_dict(dict(vision))
        # the pinned attention is torch's own: nothing is fetched to run it
        config._attn_implementation = "sdpa"
        self.tower = model_class(config).requires_grad_(False).eval()
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        side = image_size // config.patch_size
        self.patches = side * side

    @classmethod
    def from_source(
        cls, source: str, *, revision: str | None = None, image_size: int | None = None, tokens: str = "patches"
    ) -> "PretrainedEncoder":
        """Load the weights of a hub model or a local folder (safetensors only, no remote code).

        Args:
            source: hub name, such as "facebook/dinov2-small", or a folder made by `save_pretrained`.
            revision: hub revision; the resolved commit is recorded.
            image_size: resize images to this side; DINOv2's position embedding is interpolated once, here. Default:
                224 for DINOv2, the tower's own size otherwise.
            tokens: "patches" or "all".

        Raises:
            UserError: nothing can be loaded from there, the model is of another type, or the size does not fit.
        """
        from transformers import AutoConfig

        try:
            whole = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"encoder {source!r} cannot be loaded: {first_line(error)}") from error
        kind = VISION_HALF.get(whole.model_type, whole.model_type)
        config_class, model_class = pretrained_classes(kind, source)
        try:
            tower = model_class.from_pretrained(
                source, revision=revision, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise UserError(f"encoder {source!r} has no loadable safetensors weights: {first_line(error)}") from error
        dinov2 = kind.startswith("dinov2")
        size = image_size or (224 if dinov2 else tower.config.image_size)
        if size % tower.config.patch_size or (not dinov2 and size != tower.config.image_size):
            allowed = f"a multiple of {tower.config.patch_size}" if dinov2 else str(tower.config.image_size)
            raise UserError(f"image size {size} does not fit encoder {source!r}: use {allowed}")
        if dinov2 and size != tower.config.image_size:
            bake_positions(tower, size)
        vision = {**tower.config.to_dict(), "model_type": kind}
        mean, std = normalisation(source, revision, clip=not dinov2)
        commit = getattr(whole, "_commit_hash", None) or revision
        encoder = cls(source, commit, vision, size, mean, std, tokens)
        encoder.tower.load_state_dict(tower.state_dict())
        return encoder

    @property
    def layers(self) -> nn.ModuleList:
        """The tower's repeated layers."""
        return next(module for module in self.tower.encoder.children() if isinstance(module, nn.ModuleList))

    @property
    def token_dim(self) -> int:
        return self.tower.config.hidden_size

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """Stays in evaluation mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Stream:
        """Images `[B, 3, S, S]` in [-1, 1], any size, to tokens `[B, M, C]` and the tower's pooled vector `[B, C]`."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
        pixels = ((images.clamp(-1, 1) + 1) / 2 - self.pixel_mean) / self.pixel_std
        out = self.tower(pixel_values=pixels.to(next(self.tower.parameters()).dtype))
        tokens = out.last_hidden_state
        first = tokens.shape[1] - self.patches
        pooled = out.pooler_output if out.pooler_output is not None else tokens[:, 0]
        return Stream(tokens[:, first:] if self.config.tokens == "patches" else tokens, pooled)


def pretrained_classes(kind: str | None, source: str):
    """The transformers classes of a supported model type.

    Raises:
        UserError: the type is not one of `PRETRAINED`.
    """
    import transformers

    if kind not in PRETRAINED:
        raise UserError(f"encoder {source!r} is of type {kind!r}: expected one of {', '.join(PRETRAINED)}")
    return tuple(getattr(transformers, name) for name in PRETRAINED[kind])


def bake_positions(tower: nn.Module, size: int) -> None:
    """Replace DINOv2's position embedding by its interpolation to another image size, once and for all."""
    embeddings, patch = tower.embeddings, tower.config.patch_size
    count = (size // patch) ** 2 + 1
    with torch.no_grad():
        blank = embeddings.position_embeddings.new_zeros(1, count, tower.config.hidden_size)
        baked = embeddings.interpolate_pos_encoding(blank, size, size)
    embeddings.position_embeddings = nn.Parameter(baked.detach().clone())
    tower.config.image_size = size


def normalisation(source: str, revision: str | None, clip: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation from the source's preprocessor file; the family's own where it has none."""
    from transformers import image_processing_utils as processing

    try:
        settings, _ = processing.ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        return tuple(settings["image_mean"]), tuple(settings["image_std"])
    except (OSError, KeyError):
        if clip:
            return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return IMAGENET_MEAN, IMAGENET_STD
