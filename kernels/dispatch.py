"""Which implementation runs an operator on a device: what is registered with torch's dispatcher, and why."""

import importlib
from collections.abc import Callable

from torch import Tensor

from semantica.kernels import launch

PLAIN = ("plain torch", "no fused kernel is registered for this device")
# operator -> device -> (implementation, reason)
REGISTERED: dict[str, dict[str, tuple[str, str]]] = {}


def cpp_instructions() -> str | None:
    """The instruction set that the loops of `semantica._C` use here; None where it is not built, or without them."""
    try:
        from semantica import _C
    except ImportError:
        return None
    return _C.group_norm_targets()[0] if hasattr(_C, "group_norm_targets") else None


def register_kernels(
    name: str, device: str, supports: Callable[[Tensor], bool], kernels: dict[str, tuple], status: tuple[str, str]
) -> None:
    """Register the fast kernels of an operator for a device; what they do not support stays with plain torch.

    Args:
        name: of the operator.
        device: "cpu" or "cuda".
        supports: whether the kernels can compute with this first argument.
        kernels: "module:function", imported at the first call so that importing the operators stays light, to the
            `torch.library` op that it implements and the plain-torch function.
        status: implementation and reason, for the user.
    """
    for target, (op, plain) in kernels.items():
        op.register_kernel(device, lazy_kernel(target, supports, plain))
    REGISTERED.setdefault(name, {})[device] = status


def register_triton(name: str, supports: Callable[[Tensor], bool], kernels: dict[str, tuple]) -> None:
    """Register Triton kernels where Triton runs: on CUDA, or on the CPU under its interpreter."""
    if launch.INTERPRETED:
        status = ("Triton, interpreted", "TRITON_INTERPRET=1; what does not fit is computed in plain torch")
    else:
        elsewhere = "fp64, and cards below 8.0, in plain torch"
        status = ("Triton", f"compiled at first use; {elsewhere}; these kernels have not yet run on a GPU")
    if launch.DEVICE is not None:
        register_kernels(name, launch.DEVICE, supports, kernels, status)


def lazy_kernel(target: str, supports: Callable[[Tensor], bool], plain: Callable) -> Callable:
    def kernel(first: Tensor, *rest):
        function = load(target) if supports(first) and launch.modern(first.device) else plain
        return function(first, *rest)

    return kernel


def load(target: str) -> Callable:
    """ "module:function" as the function."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)
