"""What a model costs, counted on the meta device: parameters, operations and activation memory."""

import copy
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from semantica.condition import Stream
from semantica.kernels import OPERATORS
from semantica.model.conditioner import encoders_of
from semantica.model.encoders import ViTEncoder
from semantica.model.peaks import card_peak
from semantica.model.presets import PRESETS, encoder_preset, preset
from semantica.model.uvit import UViT

for operator in OPERATORS.values():
    for name, formula in operator.flop_formulas.items():
        register_flop_formula(getattr(torch.ops.semantica, name))(formula)


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


def on_meta(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy that has shapes but no values."""
    with torch.no_grad():
        twin = copy.deepcopy(module)
        for owner in twin.modules():
            for table in (owner._parameters, owner._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        new = torch.empty_like(tensor, device="meta", dtype=dtype or tensor.dtype)
                        table[name] = nn.Parameter(new, tensor.requires_grad) if table is owner._parameters else new
    return twin


def cost(
    model: UViT, tokens: int | Mapping[str, int] = 256, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> dict[str, int]:
    """Cost of one training step of a denoiser, with the condition encoded already. Nothing is computed.

    Args:
        model: on any device, the meta device included.
        tokens: tokens of each condition stream, or of all alike.
        dtype: of weights and activations.

    Returns:
        `parameters`, `flops_forward` and `flops_step` (forward and backward; a multiply-add counts as 2),
        `activation_bytes` (what the backward pass keeps; self-attention counted with its score matrix).
    """
    model = on_meta(model, dtype)
    size = model.config.image_size
    counts = tokens if isinstance(tokens, Mapping) else dict.fromkeys(model.stream_names, tokens)
    streams = {}
    for name in model.stream_names:
        shapes = ((counts[name],), ())
        both = (torch.empty(batch, *s, model.config.streams[name], device="meta", dtype=dtype) for s in shapes)
        streams[name] = Stream(*both)
    z = torch.empty(batch, model.config.in_channels, size, size, device="meta", dtype=dtype)
    saved = SavedBytes(model)
    with FlopCounterMode(display=False) as forward, saved:
        v = model(z, torch.empty(batch, device="meta"), model.condition(streams))
    with FlopCounterMode(display=False) as backward:
        v.sum().backward()
    return {
        "parameters": count_parameters(model),
        "flops_forward": forward.get_total_flops(),
        "flops_step": forward.get_total_flops() + backward.get_total_flops(),
        "activation_bytes": saved.total,
    }


def step_flops(unet: UViT, encoder: nn.Module, encodings: int = 1, conditions: int = 1) -> int:
    """Operations of one sample in a training step with so many encodings of pictures (forward only where frozen), of
    which `conditions` are attended to; texts are encoded once."""
    flops, tokens = 0, {}
    for name, part in encoders_of(encoder).items():
        each, count = encoding_cost(part)
        pictures = hasattr(part, "image_size")
        flops += each * (encodings if pictures else 1)
        tokens[name] = count * (conditions if pictures else 1)
    if len(tokens) == 1:
        # one encoder fills every stream
        tokens = dict.fromkeys(unet.stream_names, *tokens.values())
    return flops + cost(unet, tokens)["flops_step"]


def encoding_cost(encoder: nn.Module) -> tuple[int, int]:
    """Operations that an encoder takes for one value, backward included where it is trained, and its tokens."""
    twin = on_meta(encoder)
    value = torch.empty(1, *encoder.input_shape, dtype=encoder.input_dtype, device="meta")
    with FlopCounterMode(display=False) as counter:
        stream = twin(value)
        if encoder.trainable:
            stream.tokens.sum().backward()
    return counter.get_total_flops(), stream.tokens.shape[1]


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """The device's matrix rate, and where the figure is from; None, and why, for a card whose data sheet is not known.

    A GPU's comes from `semantica.model.peaks` alone: a product that is timed in passing is bound by its launch.
    """
    if device.type == "cuda":
        card, named = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
        rate = card_peak(card, dtype)
        if rate is None:
            return None, f"no data sheet's rate is known here for {named} on {card!r}"
        return rate, f"{card} data sheet, dense {named}"
    if dtype == torch.float16:
        # PyTorch's product in it takes seconds, and nobody trains so
        return None, "fp16 is for GPUs"
    a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times), "best of 8 timed 1024 x 1024 matrix products"


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
