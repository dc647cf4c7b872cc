"""The transformer's matrix products in float8, through torchao: training with scales per tensor, made anew each time.

Micikevicius et al., arXiv 2209.05433: E4M3 for weights and activations, E5M2 for gradients. Weights stay what they are,
and so does everything that is saved. Not yet run on a GPU.
"""

import importlib.util

import torch
from torch import nn

from semantica.errors import UserError
from semantica.model.uvit import UViT

# cards from Ada and Hopper on multiply float8; its tiles have sides of 16
CAPABILITY, SIDE = (8, 9), 16


def check_float8(device: torch.device) -> None:
    """Raises `UserError` where torchao is missing, or the device multiplies no float8."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(f"--float8 needs a GPU of compute capability 8.9 or newer, not {device}: leave it out")
    if importlib.util.find_spec("torchao") is None:
        raise UserError('--float8 needs torchao: pip install "semantica-diffusion[float8]"')


def to_float8(model: UViT, emulate: bool = False) -> list[str]:
    """Make the transformer's linear layers multiply in float8, in place; returns their names.

    Modulations stay, which have one row for each sample, and so do the projections of conditions, whose number of
    tokens (257 of some encoders) float8 cannot sum over.

    Args:
        emulate: multiply in fp32 what was rounded to float8, where the device has no float8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def served(layer: nn.Module, name: str) -> bool:
        stays = name.endswith("modulation") or ".to_kv." in name
        return not stays and layer.in_features % SIDE == layer.out_features % SIDE == 0

    linears = [name for name, layer in model.transformer_blocks.named_modules() if isinstance(layer, nn.Linear)]
    chosen = [name for name in linears if served(model.transformer_blocks.get_submodule(name), name)]
    convert_to_float8_training(
        model.transformer_blocks, config=Float8LinearConfig(emulate=emulate), module_filter_fn=served
    )
    return [f"transformer_blocks.{name}" for name in chosen]
