"""Image encoders: frozen DINOv2, CLIP or SigLIP through transformers, and a small trainable ViT."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from semantica.condition import Stream
from semantica.errors import UserError
from semantica.model.layers import MLP, RMSNorm, SelfAttention, block_runner, rotary_grid
from semantica.runfolder import UNSAFE, read_json

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


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn, self.mlp = SelfAttention(width, heads), MLP(width, 4 * width, 0.0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, N, C], [N, D/2]
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class ViTEncoder(ModelMixin, ConfigMixin):
    """A small trainable vision transformer with a convolutional stem, for use without any download.

    Early convolutions make short trainings work (Xiao et al., arXiv 2106.14881).

    Args:
        image_size: side of the input image; divisible by `patch_size`.
        patch_size: a power of two: one stride-2 convolution for each factor of two.
        width, depth, heads: of the transformer.
    """

    trainable = True
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, image_size: int = 32, patch_size: int = 4, width: int = 192, depth: int = 3, heads: int = 6):
        super().__init__()
        self.gradient_checkpointing = False
        if patch_size < 2 or patch_size & (patch_size - 1) or image_size % patch_size:
            raise UserError(f"patch_size={patch_size} must be a power of two that divides image_size={image_size}")
        stem, channels, steps = [], 3, patch_size.bit_length() - 1
        for step in range(steps):
            out = width >> (steps - 1 - step)
            stem += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.SiLU()]
            channels = out
        self.stem = nn.Sequential(*stem, nn.Conv2d(channels, width, 1))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = RMSNorm(width)
        angles = rotary_grid(image_size // patch_size, image_size // patch_size, width // heads)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)

    @property
    def token_dim(self) -> int:
        return self.config.width

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def patches(self) -> int:
        """Patch tokens of an image, a square grid row by row; they come last."""
        return (self.config.image_size // self.config.patch_size) ** 2

    def forward(self, images: Tensor) -> Stream:
        """Images `[B, 3, S, S]` in [-1, 1] to tokens `[B, (S / patch)^2, C]` and their mean as the pooled vector."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        run = block_runner(self)
        for block in self.blocks:
            x = run(block, x, self.rope_cos, self.rope_sin)
        x = self.norm(x)
        return Stream(x, x.mean(1))


class PretrainedEncoder(ModelMixin, ConfigMixin):
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
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"encoder {source!r} cannot be loaded: {reason}") from error
        kind = VISION_HALF.get(whole.model_type, whole.model_type)
        config_class, model_class = pretrained_classes(kind, source)
        try:
            tower = model_class.from_pretrained(
                source, revision=revision, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"encoder {source!r} has no loadable safetensors weights: {reason}") from error
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

    @property
    def image_size(self) -> int:
        return self.config.image_size

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


# what `save_pretrained` of this package names in an encoder's config.json
OWN = {"ViTEncoder": ViTEncoder, "PretrainedEncoder": PretrainedEncoder}


def frozen_encoder(source: str, image_size: int | None = None, tokens: str = "patches") -> nn.Module:
    """An encoder that is not trained (any more).

    Args:
        source: a hub name or folder as `PretrainedEncoder.from_source` takes it, or a run folder of this package, or
            the encoder folder in one, whose size and tokens are fixed.
        image_size, tokens: see `PretrainedEncoder.from_source`.

    Raises:
        UserError: nothing safe can be loaded from there, or the size or tokens do not fit.
    """
    folder = own_folder(source)
    if folder is None:
        return PretrainedEncoder.from_source(source, image_size=image_size, tokens=tokens)
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in UNSAFE:
            raise UserError(f"{path} is refused: only safetensors and JSON are read from there; remove it")
    kind = OWN[read_json(folder / "config.json")["_class_name"]]
    try:
        encoder = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"encoder {source!r} cannot be loaded: {reason}") from error
    fixed = getattr(encoder.config, "tokens", "patches")
    if image_size not in (None, encoder.image_size) or tokens != fixed:
        raise UserError(
            f"encoder {source!r} of a run has image size {encoder.image_size} and tokens {fixed!r}: leave the size out "
            "and ask for these tokens"
        )
    encoder.trainable = False
    return encoder.requires_grad_(False).eval()


def own_folder(source: str) -> Path | None:
    """The folder of an encoder that this package saved, where `source` is one or a run folder that has one."""
    for folder in (Path(source) / "encoder", Path(source)):
        if (folder / "config.json").is_file() and read_json(folder / "config.json").get("_class_name") in OWN:
            return folder
    return None


def weights_sha256(module: nn.Module) -> str:
    """64 hex digits over the names and bytes of a module's weights."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def encode_images(encoder: nn.Module, images: Tensor) -> Stream:
    """Images `[B, 3, S, S]`, or K of them for each sample `[B, K, 3, S, S]`, to one stream.

    K pictures are one stream of K times as many tokens, with the mean of their pooled vectors. A picture that is there
    twice weighs twice, and one that is there K times alone is the same as once.
    """
    if images.ndim == 4:
        return encoder(images)
    batch, count = images.shape[:2]
    stream = encoder(images.flatten(0, 1))
    tokens = stream.tokens.unflatten(0, (batch, count)).flatten(1, 2)
    return Stream(tokens, stream.pooled.unflatten(0, (batch, count)).mean(1))


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
