"""Vision backbones of timm (https://github.com/huggingface/pytorch-image-models): see `semantica.model.backbones`."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from semantica.errors import UserError, first_line
from semantica.model.backbones import Loaded
from semantica.model.preprocessing import of_timm

WEIGHTS = "model.safetensors"
# what timm's factory would do with arguments of these names: read other files, fetch, or make another kind of model
REFUSED = {
    "cache_dir", "checkpoint_path", "features_only", "hf_hub_id", "model_name", "out_indices", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict",
    "scriptable", "exportable", "no_jit",
}  # fmt: skip


def library() -> ModuleType:
    """timm. Raises `UserError` where it is not installed, or cannot be imported."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f'backbones of timm need it ({first_line(error)}): pip install "semantica-diffusion[timm]"'
        ) from error
    except RuntimeError as error:
        # torchvision's compiled part, where it was built for another torch
        raise UserError(
            f"timm cannot be imported ({first_line(error)}): install the torchvision that belongs to this torch"
        ) from error
    return timm


def load(source: str, revision: str | None, found: dict[str, Any], size: int | None) -> Loaded:
    """Raises `UserError`: an unknown architecture, no whole safetensors weights, or a size that does not fit."""
    # older files have everything in one
    nested = found.get("pretrained_cfg")
    settings = nested if isinstance(nested, dict) else found
    vision = {
        "model_type": "timm",
        "architecture": found.get("architecture"),
        "model_args": dict(found.get("model_args") or {}),
    }
    tower = build(vision, True, source)
    own = {key: value for key, value in tower.pretrained_cfg.items() if value is not None}
    prepared = of_timm(own | {key: value for key, value in settings.items() if value is not None}, source)
    default = vision["model_args"].get("img_size") or prepared.size
    default = default if isinstance(default, int) else default[0]
    fill(tower, weights(source, revision), source)
    size = size or default
    if size != default and hasattr(tower, "set_input_size"):
        try:
            tower.set_input_size(img_size=(size, size))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"image size {size} does not fit encoder {source!r}: {first_line(error)}") from error
        vision["model_args"]["img_size"] = size
    commit = None if Path(source).is_dir() else found.get("_commit_hash") or revision
    return Loaded(tower, vision, commit, prepared.at(size), default)


def build(vision: dict[str, Any], pooler: bool, source: str) -> nn.Module:
    """The network of an architecture without its classifier, without weights.

    Raises:
        UserError: timm is not there or does not know the architecture or its arguments, or one of these is refused.
    """
    timm, name, arguments = library(), vision.get("architecture"), vision.get("model_args") or {}
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"encoder {source!r} is a {name!r}, which timm {timm.__version__} does not know: update it")
    if refused := sorted(REFUSED.intersection(arguments)):
        raise UserError(f"encoder {source!r} has the argument {refused[0]}, which loads more than it: remove it")
    try:
        return timm.create_model(name, pretrained=False, **{**arguments, "num_classes": 0})
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"encoder {source!r} makes no {name}: {first_line(error)}") from error


def features(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    made = tower.forward_features(pixels)
    pooled = tower.forward_head(made, pre_logits=True).flatten(1)
    channels_last = str(getattr(tower, "output_fmt", "")).endswith("NHWC")
    return (made.permute(0, 3, 1, 2) if channels_last and made.ndim == 4 else made), pooled


def weights(source: str, revision: str | None) -> dict[str, Tensor]:
    """Tensors of a folder or of a hub's repository. Raises `UserError` where there are none in safetensors."""
    try:
        if Path(source).is_dir():
            path = Path(source) / WEIGHTS
            if not path.is_file():
                raise OSError(f"it holds no {WEIGHTS}")
        else:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(source, WEIGHTS, revision=revision)
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"encoder {source!r} has no loadable safetensors weights: {first_line(error)}") from error


def fill(tower: nn.Module, found: dict[str, Tensor], source: str) -> None:
    """Weights into a network; a classifier, and what else it lacks, is left.

    Raises:
        UserError: a weight is missing or of another shape.
    """
    own = tower.state_dict()
    # how many batches a norm has seen is not used once it is trained
    found = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")} | found
    if missing := sorted(own.keys() - found.keys()):
        raise UserError(f"{source} has no {missing[0]}, one of {len(missing)} missing weights: download it whole")
    for name, value in own.items():
        if found[name].shape != value.shape:
            shapes = f"{list(found[name].shape)}, its configuration says {list(value.shape)}"
            raise UserError(f"encoder {source!r} has no loadable safetensors weights: {name} is of shape {shapes}")
    with torch.no_grad():
        tower.load_state_dict({name: found[name] for name in own})
