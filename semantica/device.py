"""Which device and which precision to use."""

import torch
from torch import Tensor

from semantica.errors import UserError, first_line


def pick_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({first_line(error)}): use 'cpu', 'cuda' or 'auto'") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: use 'cpu', 'cuda' or 'auto'")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast: bf16 where the processor has instructions for it, unless told otherwise."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one of the host gets there without waiting for what the device still has to do.

    From pageable memory the copy would wait; pinned memory is kept from reuse until the copy is done.
    """
    host = tensor.device.type == "cpu"
    if host and device.type == "cuda":
        tensor = tensor.pin_memory()
    # what comes from a device must have arrived
    return tensor.to(device, non_blocking=host)
