"""Which implementation serves an operator on a device: what is registered with torch's dispatcher, and why."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from semantica.kernels import launch

PLAIN = ("plain torch", "no fused kernel is registered for this device")
# operator -> device -> (implementation, reason)
SERVED: dict[str, dict[str, tuple[str, str]]] = {}


def cpu_loops() -> str | None:
    """The instruction set that the loops of `semantica._C` use here, or None where it is not built, or without them."""
    try:
        from semantica import _C
    except ImportError:
        return None
    return _C.group_norm_targets()[0] if hasattr(_C, "group_norm_targets") else None


def serve(
    name: str, device: str, module: str, dtypes: tuple[torch.dtype, ...], plain: dict[str, tuple], status: tuple
) -> None:
    """Let a module's functions serve an operator on a device.

    Args:
        name: of the operator.
        device: "cpu" or "cuda".
        module: imported at the first call, so that importing the operators stays light.
        dtypes: of the first input, for which it serves; other dtypes and empty input stay with plain torch.
        plain: by function of the module, the op that it serves and the plain-torch function.
        status: implementation and reason, for the user.
    """
    for function, (op, fallback) in plain.items():
        op.register_kernel(device, chooser(module, function, dtypes, fallback))
    SERVED.setdefault(name, {})[device] = status


def chooser(module: str, function: str, dtypes: tuple[torch.dtype, ...], plain: Callable) -> Callable:
    def choose(first: Tensor, *rest):
        if first.dtype in dtypes and first.numel():
            return getattr(importlib.import_module(module), function)(first, *rest)
        return plain(first, *rest)

    return choose


def serve_triton(name: str, plain: dict[str, tuple], module: str) -> None:
    """Register a module of Triton kernels where Triton runs: on CUDA, or on the CPU under its interpreter."""
    if launch.DEVICE is None:
        return
    if launch.INTERPRETED:
        status = ("Triton, interpreted", "TRITON_INTERPRET=1; fp64 in plain torch")
    else:
        status = ("Triton", "compiled at first use; fp64 in plain torch; these kernels have not yet run on a GPU")
    serve(name, launch.DEVICE, module, (torch.float32, torch.float16, torch.bfloat16), plain, status)


def implementations() -> dict[str, dict[str, tuple[str, str]]]:
    """Which implementation each operator uses, and why: `{operator: {device: (implementation, reason)}}`."""
    names = ("group_norm", "cross_attention")
    return {name: {"cpu": PLAIN, "cuda": PLAIN, **SERVED.get(name, {})} for name in names}
