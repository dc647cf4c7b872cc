"""How a backbone's library prepares pictures, read from its configuration: nothing of the library is needed for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from semantica.errors import UserError, first_line
from semantica.files import read_json
from semantica.sight import FILTERS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Pillow's numbers, as transformers writes them
NUMBERS = {int(value): name for name, value in FILTERS.items()}


@dataclass(frozen=True)
class Preprocessing:
    """A square of a picture, as numbers.

    size: side of the square in pixels, None where the configuration does not say. resize: of the picture's shorter
    side before. interpolation: see `semantica.sight.Sight`.
    mean, std: of each channel, for values in [0, 1]. bgr: whether channels come in the other order.
    """

    size: int | None = None
    resize: int | None = None
    interpolation: str | None = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    bgr: bool = False

    def at(self, size: int) -> "Preprocessing":
        """For squares of another side: the same share of the picture is seen."""
        if size != self.size:
            resize = size if self.size is None else math.floor(size * (self.resize or self.size) / self.size)
            return replace(self, size=size, resize=resize)
        return replace(self, resize=self.resize or size)

    def check(self, source: str) -> "Preprocessing":
        """Raises `UserError` for numbers that make no picture."""
        numbers = (*self.mean, *self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise UserError(
                f"encoder {source!r} has mean {list(self.mean)} and std {list(self.std)}: three each, above 0"
            )
        if self.size is not None and (self.size < 1 or (self.resize or self.size) < self.size):
            raise UserError(
                f"encoder {source!r} cuts {self.size} pixels out of {self.resize}: its preprocessing cannot be read"
            )
        return self


def of_timm(settings: dict[str, Any], source: str) -> Preprocessing:
    """From timm's `pretrained_cfg`, by the rules of `timm.data.create_transform` for evaluation.

    Of its ways to crop all are the same on a square: "squash" and "border" otherwise show what lies beside it.
    """
    try:
        channels, size, width = (int(number) for number in settings.get("input_size") or (3, 224, 224))
        if (channels, size) != (3, width):
            raise ValueError
        name = settings.get("interpolation") or "bicubic"
        made = Preprocessing(
            size,
            math.floor(size / float(settings.get("crop_pct") or 0.875)),
            name if name in FILTERS else "bilinear",
            tuple(map(float, settings.get("mean") or IMAGENET_MEAN)),
            tuple(map(float, settings.get("std") or IMAGENET_STD)),
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"encoder {source!r} has a pretrained_cfg for no square pictures of three channels") from error
    return made.check(source)


def of_transformers(settings: dict[str, Any], source: str, otherwise: Preprocessing) -> Preprocessing:
    """From the settings in preprocessor_config.json, by the rules of the image processors of transformers.

    otherwise: what holds where they say nothing.
    """
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    kind = kind.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    try:
        resize, size = sides(settings, kind)
        mean, std = normalisation(settings, kind, otherwise)
        made = Preprocessing(
            size,
            resize,
            NUMBERS[int(settings["resample"])] if settings.get("resample") is not None else otherwise.interpolation,
            mean,
            std,
            bool(settings.get("do_flip_channel_order")),
        )
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise UserError(f"encoder {source!r} has a preprocessor_config.json that cannot be read: {error!r}") from error
    return made.check(source)


def sides(settings: dict[str, Any], kind: str) -> tuple[int | None, int | None]:
    """What the shorter side becomes, and the side of the square; None where nothing is said."""
    size, crop = edge(settings.get("size")), edge(settings.get("crop_size"))
    if size is None or settings.get("do_resize") is False:
        return crop, crop
    if rule := RESIZED.get(kind):
        size, crop = rule(size, crop, settings)
    return (size, crop) if settings.get("do_center_crop", crop is not None) and crop else (size, size)


def edge(size: Any) -> int | None:
    """The side of a square, or the shorter side, in any of the ways to write it."""
    if isinstance(size, dict):
        if size.get("height") != size.get("width"):
            raise ValueError(f"{size} is no square")
        size = size.get("shortest_edge") or size.get("height")
    elif isinstance(size, list | tuple):
        size, *other = size
        if other not in ([], [size]):
            raise ValueError(f"{size} x {other} is no square")
    return None if size is None else int(size)


def convnext(size: int, crop: int | None, settings: dict[str, Any]) -> tuple[int, int]:
    """Below 384 pixels a share is cropped away; from there on the whole picture is squashed."""
    settings["do_center_crop"] = True
    return (int(size / float(settings.get("crop_pct") or 224 / 256)), size) if size < 384 else (size, size)


def poolformer(size: int, crop: int | None, settings: dict[str, Any]) -> tuple[int, int | None]:
    return int(size / float(settings.get("crop_pct") or 0.9)), crop


def levit(size: int, crop: int | None, settings: dict[str, Any]) -> tuple[int, int | None]:
    return (int(256 / 224 * size) if "shortest_edge" in settings["size"] else size), crop


# image processors that resize to something else than `size` says
RESIZED: dict[str, Callable[[int, int | None, dict[str, Any]], tuple[int, int | None]]] = {
    "ConvNext": convnext,
    "PoolFormer": poolformer,
    "Levit": levit,
}


def normalisation(
    settings: dict[str, Any], kind: str, otherwise: Preprocessing
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for values in [0, 1], with what else is done to them folded in."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean = settings.get("image_mean") or otherwise.mean
        std = settings.get("image_std") or otherwise.std
    mean, std = ([float(v) for v in value] if isinstance(value, list | tuple) else [float(value)] * 3
                 for value in (mean, std))  # fmt: skip
    if kind == "EfficientNet" and settings.get("include_top", True):
        # it divides by the standard deviation once more
        mean, std = mean, [s * s for s in std]
    scale = 255 * float(settings.get("rescale_factor") or 1 / 255)
    scale = 1.0 if settings.get("do_rescale") is False or abs(scale - 1) < 1e-6 else scale
    offset = 1.0 if settings.get("rescale_offset") else 0.0
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)


def settings_of(source: str | Path, revision: str | None) -> dict[str, Any]:
    """What preprocessor_config.json holds; nothing where there is none.

    Raises:
        UserError: it cannot be read or fetched. Features of pictures that were prepared in another way are others.
    """
    from transformers import image_processing_utils as processing

    try:
        said, _ = processing.ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    except OSError as error:
        own, whole = (found_in(str(source), revision, f"{name}_config.json") for name in ("preprocessor", "processor"))
        # that of a whole processor need not say anything of pictures
        if own or (whole and "image_processor" in read_json(whole)):
            raise UserError(f"{own or whole} cannot be read: {first_line(error)}") from error
        return {}
    if not isinstance(said, dict):
        raise UserError(f"preprocessor_config.json of encoder {source!r} cannot be read: it is a {type(said).__name__}")
    return dict(said)


def found_in(source: str, revision: str | None, name: str) -> Path | None:
    """A file of a folder, or of a hub's repository; None where there is none.

    Raises:
        UserError: the hub cannot be asked, and what is kept of it does not say.
    """
    if Path(source).is_dir():
        return path if (path := Path(source) / name).is_file() else None
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except (OSError, ValueError, EntryNotFoundError) as error:
        gone = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if gone or try_to_load_from_cache(source, name, revision=revision) is _CACHED_NO_EXIST:
            return None
        raise UserError(
            f"whether encoder {source!r} has a {name} is not known ({first_line(error)}): load it once with the hub "
            "in reach, or give a folder"
        ) from error
