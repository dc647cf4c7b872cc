"""Which implementation serves an operator on a device: what is registered with torch's dispatcher, and why."""

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from semantica.kernels import launch

# what the operators compute in
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES_NAMED = "one of float32, bfloat16, float16, float64"
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
    name: str, device: str, fits: Callable[[Tensor], bool], functions: dict[str, tuple], status: tuple[str, str]
) -> None:
    """Let fast functions serve an operator on a device; what they do not fit stays with plain torch.

    Args:
        name: of the operator.
        device: "cpu" or "cuda".
        fits: whether the functions can compute with this first argument.
        functions: "module:function", imported at the first call so that importing the operators stays light, to the op
            that it serves and the plain-torch function.
        status: implementation and reason, for the user.
    """
    for fast, (op, plain) in functions.items():
        op.register_kernel(device, chooser(fast, fits, plain))
    SERVED.setdefault(name, {})[device] = status


def chooser(fast: str, fits: Callable[[Tensor], bool], plain: Callable) -> Callable:
    module, function = fast.split(":")

    def choose(first: Tensor, *rest):
        chosen = getattr(importlib.import_module(module), function) if fits(first) else plain
        return chosen(first, *rest)

    return choose


def serve_triton(name: str, fits: Callable[[Tensor], bool], functions: dict[str, tuple]) -> None:
    """Register Triton kernels where Triton runs: on CUDA, or on the CPU under its interpreter."""
    if launch.INTERPRETED:
        status = ("Triton, interpreted", "TRITON_INTERPRET=1; what does not fit is computed in plain torch")
    else:
        status = ("Triton", "compiled at first use; fp64 in plain torch; these kernels have not yet run on a GPU")
    if launch.DEVICE is not None:
        serve(name, launch.DEVICE, fits, functions, status)


def implementations() -> dict[str, dict[str, tuple[str, str]]]:
    """Which implementation each operator uses, and why: `{operator: {device: (implementation, reason)}}`."""
    names = ("group_norm", "cross_attention")
    return {name: {"cpu": PLAIN, "cuda": PLAIN, **SERVED.get(name, {})} for name in names}


def specimens() -> Iterator[tuple[str, list[launch.Launch]]]:
    """`(name, launches)` of every shipped Triton kernel in every configuration, on meta tensors: to be compiled.

    Raises:
        ImportError: Triton is not installed.
    """
    for name, module in (("group_norm", "group_norm.forward"), ("cross_attention", "cross_attention.backward")):
        for label, launches in importlib.import_module(f"semantica.kernels.{module}").specimens():
            yield f"{name} {label}", launches
