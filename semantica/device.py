"""Which device and which precision to use."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from semantica.errors import UserError, first_line


def pick_device(name: str) -> torch.device:
    """ "auto" is the current CUDA device, else the CPU. A CUDA device comes with its number.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return numbered(torch.device("cuda")) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({first_line(error)}): use 'cpu', 'cuda' or 'auto'") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: use 'cpu', 'cuda' or 'auto'")
    return numbered(device)


def numbered(device: torch.device) -> torch.device:
    """A CUDA device with its number: "cuda" alone is whichever is current at the time."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def current(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the current one: graphs, TensorRT and kernels from elsewhere look at nothing else."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast: bf16 where the processor has instructions for it, unless told otherwise."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    if device.type == "cuda":
        with current(device):
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
