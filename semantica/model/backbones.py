"""Vision backbones of transformers: which there are, how one is read, and what its features are.

A library of backbones is a module with three functions, which `semantica.model.pretrained` calls; the other one is
`semantica.model.timm_backbones`:

    load(source, revision, found, size) -> Loaded      from files: `found` is the parsed config.json
    build(vision, pooler, source) -> Module            the same without weights, from what `Loaded` says
    features(tower, pixels) -> (tokens, pooled)        `[B, C, h, w]` or `[B, N, C]`, and `[B, C]` or None
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from semantica.errors import UserError, first_line
from semantica.model.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, of_transformers, settings_of
from semantica.model.whole import complete

# any: no table of positions, or one that is computed. baked: interpolated once, when another size is asked for.
# fixed: of the size that the checkpoint has
Sizes = Literal["any", "baked", "fixed"]


@dataclass(frozen=True)
class Family:
    """Models of one type.

    name: what their classes of configuration and model begin with, as in `NAMEConfig` and `NAMEModel`.
    sizes: of pictures. normalised: mean and standard deviation where the source has no preprocessor file.
    """

    name: str
    sizes: Sizes = "any"
    normalised: Preprocessing = Preprocessing()


CLIP = Preprocessing(mean=CLIP_MEAN, std=CLIP_STD)
# model type of transformers -> its family; nothing outside this table is ever built. All give a square grid of
# features, in rows from the top left, after class and register tokens or none
FAMILIES = {
    "aimv2_vision_model": Family("Aimv2Vision", "fixed"),
    "beit": Family("Beit", "fixed"),
    "bit": Family("Bit"),
    "clip_vision_model": Family("CLIPVision", "fixed", CLIP),
    "convnext": Family("ConvNext"),
    "convnextv2": Family("ConvNextV2"),
    "data2vec-vision": Family("Data2VecVision", "fixed"),
    "deit": Family("DeiT", "baked"),
    "dinov2": Family("Dinov2", "baked", Preprocessing(224)),
    "dinov2_with_registers": Family("Dinov2WithRegisters", "baked", Preprocessing(224)),
    "dinov3_convnext": Family("DINOv3ConvNext"),
    "dinov3_vit": Family("DINOv3ViT"),
    "efficientnet": Family("EfficientNet"),
    "focalnet": Family("FocalNet"),
    "hiera": Family("Hiera", "fixed"),
    "ijepa": Family("IJepa", "baked"),
    "levit": Family("Levit", "fixed"),
    "mlcd_vision_model": Family("MLCDVision", "fixed", CLIP),
    "mobilenet_v1": Family("MobileNetV1"),
    "mobilenet_v2": Family("MobileNetV2"),
    "mobilevit": Family("MobileViT"),
    "mobilevitv2": Family("MobileViTV2"),
    "pixio": Family("Pixio", "fixed"),
    "poolformer": Family("PoolFormer"),
    "pvt": Family("Pvt", "fixed"),
    "pvt_v2": Family("PvtV2"),
    "regnet": Family("RegNet"),
    "resnet": Family("ResNet"),
    "segformer": Family("Segformer"),
    "siglip_vision_model": Family("SiglipVision", "fixed", CLIP),
    "swiftformer": Family("SwiftFormer"),
    "swin": Family("Swin"),
    "swinv2": Family("Swinv2"),
    "vit": Family("ViT", "baked"),
    "vit_msn": Family("ViTMSN", "baked"),
}
# a checkpoint of several towers -> the part that reads pictures
VISION_HALF = {
    "aimv2": "aimv2_vision_model",
    "clip": "clip_vision_model",
    "mlcd": "mlcd_vision_model",
    "siglip": "siglip_vision_model",
}


@dataclass(frozen=True)
class Loaded:
    """A backbone with its weights.

    vision: what `build` makes the same of, with its `model_type`. commit: of the hub, None for a folder.
    preprocessing: with the size that is used. default_size: that without any wish. pooler: see `build`.
    """

    tower: nn.Module
    vision: dict[str, Any]
    commit: str | None
    preprocessing: Preprocessing
    default_size: int
    pooler: bool = True


def classes(kind: str | None, source: str) -> tuple[Any, type[nn.Module]]:
    """The classes of configuration and model of a supported type. Raises `UserError` for any other."""
    import transformers

    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"encoder {source!r} is of type {kind!r}: expected a model of timm, or one of {known}")
    name = FAMILIES[kind].name
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")


def load(source: str, revision: str | None, found: dict[str, Any], size: int | None) -> Loaded:
    """Raises `UserError`: another type, no whole safetensors weights, or a size that does not fit."""
    kind = VISION_HALF.get(found.get("model_type"), found.get("model_type"))
    _, model_class = classes(kind, source)
    family, pooler = FAMILIES[kind], True
    try:
        try:
            tower = complete(model_class, source, revision=revision)
        except UserError as error:
            # classifiers are published without the layer that pools
            if "pooler." not in str(error) or not pools(model_class):
                raise
            tower, pooler = complete(model_class, source, revision=revision, add_pooling_layer=False), False
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"encoder {source!r} has no loadable safetensors weights: {first_line(error)}") from error
    settings = settings_of(source, found.get("_commit_hash") or revision)
    prepared = of_transformers(settings, source, family.normalised)
    if not settings:
        # its library's resizing is not known: that of this package
        prepared = replace(prepared, interpolation=None)
    own = square(getattr(tower.config, "image_size", None))
    # a network with a table of positions for one size, and pictures of another: DINOv2 has always been used so
    default = family.normalised.size or (own if family.sizes != "any" and own else prepared.size or own or 224)
    size = size or default
    if family.sizes == "fixed" and own and size != own:
        raise UserError(f"image size {size} does not fit encoder {source!r}: use {own}")
    patch = square(getattr(tower.config, "patch_size", None)) or 1
    if family.sizes != "fixed" and size % patch:
        raise UserError(f"image size {size} does not fit encoder {source!r}: use a multiple of {patch}")
    if family.sizes == "baked" and size != own:
        bake_positions(tower, size)
    vision, weights = {**tower.config.to_dict(), "model_type": kind}, tower.state_dict()
    # made anew: parts of it know the size that they were made for
    tower = build(vision, pooler, source)
    tower.load_state_dict(weights)
    return Loaded(tower.eval(), vision, found.get("_commit_hash") or revision, prepared.at(size), default, pooler)


def build(vision: dict[str, Any], pooler: bool, source: str) -> nn.Module:
    """The network of a configuration, without weights.

    pooler: whether it has its family's layer that pools, which published classifiers lack.

    Raises:
        UserError: the type is not one of `FAMILIES`.
    """
    config_class, model_class = classes(vision.get("model_type"), source)
    config = config_class.from_dict(dict(vision))
    # the pinned attention is torch's own: nothing is fetched to run it
    config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    return model_class(config) if pooler else model_class(config, add_pooling_layer=False)


def features(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    out = tower(pixel_values=pixels)
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state, None if pooled is None else pooled.flatten(1)


def pools(kind: type[nn.Module]) -> bool:
    import inspect

    return "add_pooling_layer" in inspect.signature(kind.__init__).parameters


def square(size: Any) -> int | None:
    """A side that a configuration gives once or twice; None where there is none, or one for each stage."""
    if isinstance(size, list | tuple):
        return size[0] if len(size) == 2 and size[0] == size[1] else None
    return size if isinstance(size, int) else None


def bake_positions(tower: nn.Module, size: int) -> None:
    """Replace a table of positions by its interpolation to another image size, once and for all."""
    embeddings = tower.embeddings
    table, patch = embeddings.position_embeddings, tower.config.patch_size
    first = table.shape[1] - (square(tower.config.image_size) // patch) ** 2
    with torch.no_grad():
        blank = table.new_zeros(1, first + (size // patch) ** 2, tower.config.hidden_size)
        baked = embeddings.interpolate_pos_encoding(blank, size, size)
    embeddings.position_embeddings = nn.Parameter(baked.detach().clone())
    tower.config.image_size = size
