"""What a model costs, counted on the meta device: parameters, operations and activation memory."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from semantica.condition import Stream
from semantica.encoder import ViTEncoder
from semantica.presets import PRESETS, encoder_preset, preset
from semantica.uvit import UViT

TOKENS, TOKEN_DIM = 256, 768


@register_flop_formula(torch.ops.semantica.cross_attention)
def cross_attention_flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Two matrix products of 2 * N * M * D each, per sample and head."""
    batch, queries, heads, dim = q_shape
    return 4 * batch * heads * queries * k_shape[1] * dim


@register_flop_formula(torch.ops.semantica.cross_attention_backward)
def cross_attention_backward_flops(do_shape, q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Five matrix products: the scores again, dP, dQ, dK, dV."""
    return 5 * cross_attention_flops(q_shape, k_shape) // 2


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Adds up what autograd keeps for the backward pass, each storage once and parameters not at all."""

    def __init__(self, module: nn.Module):
        self.seen = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self.total = 0
        self.kept: list[Tensor] = []
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.total += storage.nbytes()
            # keeps the address from being used again while counting
            self.kept.append(tensor.detach())
        return tensor


def cost(model: UViT, tokens: int = TOKENS, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Cost of one training step of a denoiser at a given batch, with the condition encoded already.

    Args:
        model: on the meta device (nothing is computed).
        tokens: tokens of each condition stream.
        dtype: of the activations.

    Returns:
        `parameters`, `flops_forward` and `flops_step` (forward and backward; a multiply-add counts as 2),
        `activation_bytes` (what the backward pass keeps).
    """
    model = model.to(dtype)
    size = model.config.image_size
    device = "meta"
    streams = {
        name: Stream(*(torch.empty(batch, *s, dim, device=device, dtype=dtype) for s in ((tokens,), ())))
        for name, dim in (model.config.streams or {}).items()
        if name in model.stream_names
    }
    z, logsnr = torch.empty(batch, 3, size, size, device=device, dtype=dtype), torch.empty(batch, device=device)
    saved = SavedBytes(model)
    with FlopCounterMode(display=False) as forward, saved:
        v = model(z, logsnr, model.condition(streams))
    with FlopCounterMode(display=False) as backward:
        v.sum().backward()
    return {
        "parameters": count_parameters(model),
        "flops_forward": forward.get_total_flops(),
        "flops_step": forward.get_total_flops() + backward.get_total_flops(),
        "activation_bytes": saved.total,
    }


def preset_table() -> list[dict]:
    """One row per preset: its sizes, and what one sample costs in a bf16 training step."""
    rows = []
    for name in PRESETS:
        with torch.device("meta"):
            encoder = ViTEncoder(**encoder_preset(name, PRESETS[name]["image_size"]))
            model = UViT(**preset(name), streams={"image": encoder.token_dim})
        tokens = (encoder.config.image_size // encoder.config.patch_size) ** 2
        rows.append({"preset": name, "image_size": model.config.image_size, **cost(model, tokens)})
    return rows
