"""What is trained of a run that begins with another's weights: LoRAs beside them, new streams, or everything.

Imagine yourself (arXiv 2409.13346) keeps the base frozen, puts LoRAs on self-attention and on cross-attention to texts,
and trains the new vision stream and its encoder as a whole.
"""

import copy
import importlib.util
from collections.abc import Iterable

from torch import nn

from semantica.errors import UserError
from semantica.inputs import is_text
from semantica.model.grow import PLACED
from semantica.model.uvit import UViT

# by stream, beside what `PLACED` finds in the blocks
NAMED = ("null_tokens", "norm_tokens", "pooled")


def targets(unet: UViT, new: Iterable[str]) -> list[str]:
    """Names of the projections that get a LoRA: of self-attention, and of cross-attention to texts that were there."""
    texts = [i for i, name in enumerate(unet.stream_names) if is_text(name) and name not in new]
    each = ["attn.to_qkv", "attn.to_out"]
    if texts and unet.use_tokens:
        each += ["cross.to_q", "cross.to_out", *(f"cross.to_kv.{i}" for i in texts)]
    return [f"transformer_blocks.{block}.{part}" for block in range(len(unet.transformer_blocks)) for part in each]


def adapt(unet: UViT, rank: int, new: Iterable[str]) -> None:
    """W + B A in the place of each W that `targets` names, B zero at first (arXiv 2106.09685, alpha = rank); all else
    is frozen but the new streams.

    Raises:
        UserError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora needs peft, not installed here: pip install peft")
    from peft import LoraConfig, inject_adapter_in_model

    new = tuple(new)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets(unet, new)), unet)
    for key, parameter in unet.named_parameters():
        if "lora_" not in key:
            placed, parts = PLACED.fullmatch(key), key.split(".")
            stream = unet.stream_names[int(placed[2])] if placed else parts[1] if parts[0] in NAMED else None
            parameter.requires_grad_(stream in new)


def merged(unet: UViT | None) -> UViT | None:
    """A network without LoRAs that computes the same: W + B A as one matrix. As it is where there are none, or where
    another process has it."""
    if unet is None or importlib.util.find_spec("peft") is None:
        return unet
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(module, BaseTunerLayer) for module in unet.modules()):
        return unet
    made = copy.deepcopy(unet)
    for name, module in [*made.named_modules()]:
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            replaced: nn.Module = module.get_base_layer()
            setattr(made.get_submodule(parent), last, replaced)
    del made.peft_config
    return made
