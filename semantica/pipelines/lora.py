"""LoRAs in the formats that diffusers reads, added to the weights that they are of."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import recurse_remove_peft_layers
from safetensors import SafetensorError, safe_open
from torch import nn

from semantica.errors import UserError, first_line
from semantica.pipelines.weights import quiet

NAME = "added"
# of a layer's two matrices the first, whoever wrote the file
FIRST = ("lora_A.weight", ".down.weight")
# of adapters that are more than two matrices; diffusers leaves some of it out with a warning
OTHER = ("dora_scale", "lokr_", "hada_", "lora_mid")


def add_lora(models: Mapping[str, nn.Module], path: Path, scale: float = 1.0) -> None:
    """W + scale alpha / r B A (Hu et al., arXiv 2106.09685, section 4.1) in the place of each W that the file names.

    Args:
        models: a UNet and its text encoders by diffusers' names: "unet", "text_encoder", "text_encoder_2".
        path: safetensors, as diffusers' training scripts write them, or kohya's.

    Raises:
        UserError: no such file, one of another kind or for other models, or peft is not installed. A part of it may
            be in the models then.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"{path} is no safetensors file: give the weights of a LoRA")
    if importlib.util.find_spec("peft") is None:
        raise UserError("a LoRA needs peft, not installed here: pip install peft")
    loader = StableDiffusionXLLoraLoaderMixin if "text_encoder_2" in models else StableDiffusionLoraLoaderMixin
    with fitting(path):
        with safe_open(path, "pt") as file:
            other = [key for key in file.keys() if any(word in key for word in OTHER)]  # noqa: SIM118
        if other:
            raise UserError(f"{path} holds {other[0]!r}: that is no LoRA of two matrices for each layer")
        state, alphas, metadata = loader.lora_state_dict(
            str(path.parent), weight_name=path.name, use_safetensors=True, local_files_only=True,
            unet_config=models["unet"].config, return_lora_metadata=True,
        )  # fmt: skip
    if len(state) != 2 * sum(key.endswith(FIRST) for key in state):
        raise UserError(f"{path} has {len(state)} tensors: a LoRA has two matrices for each layer")
    ours = {name: [key for key in state if key.startswith(f"{name}.")] for name in models}
    others = sorted(set(state) - {key for keys in ours.values() for key in keys})
    if others or not state:
        what = f"holds {others[0]!r}" if others else "holds nothing"
        raise UserError(f"{path} {what}: expected a LoRA of {', '.join(models)}")
    for name, model in models.items():
        if ours[name]:
            given = {"network_alphas": alphas, "metadata": metadata, "adapter_name": NAME}
            with fitting(path):
                if name == "unet":
                    loader.load_lora_into_unet(state, unet=model, **given)
                else:
                    loader.load_lora_into_text_encoder(state, text_encoder=model, prefix=name, **given)
                merge(model, name, [key for key in ours[name] if key.endswith(FIRST)], scale)


def merge(model: nn.Module, name: str, wanted: Sequence[str], scale: float) -> None:
    """Put what peft placed beside a model's layers into their weights. Raises `ValueError` where there are fewer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if len(layers) != len(wanted):
        raise ValueError(f"{len(wanted) - len(layers)} of its {len(wanted)} layers are none of {name}'s")
    for layer in layers:
        layer.scale_layer(scale)
        layer.merge()
    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """What loaders raise becomes one line."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except (AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit this model ({first_line(error)}): a LoRA of another one?") from error
