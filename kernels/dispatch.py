"""Which implementation runs an operator on a device: what is registered with torch's dispatcher, and why."""

import importlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from semantica.kernels import cuda, launch

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
    name: str,
    device: str,
    supports: Callable[[Tensor], bool],
    kernels: dict[str, tuple],
    status: tuple[str, str],
    rivals: dict[str, tuple[str, str]] | None = None,
) -> None:
    """Register the fast kernels of an operator for a device; what they do not support stays with plain torch.

    Args:
        name: of the operator.
        device: "cpu" or "cuda".
        supports: whether the kernels can compute with this first argument.
        kernels: "module:function", imported at the first call so that importing the operators stays light, to the
            `torch.library` op that it implements and the plain-torch function.
        status: implementation and reason, for the user.
        rivals: of some kernels others, and who says of each call whether they serve it instead, as "module:function".
    """
    for target, (op, plain) in kernels.items():
        op.register_kernel(device, lazy_kernel(target, supports, plain, (rivals or {}).get(target)))
    REGISTERED.setdefault(name, {})[device] = status


def register_triton(
    name: str,
    supports: Callable[[Tensor], bool],
    kernels: dict[str, tuple],
    choice: Path | None = None,
    rivals: dict[str, tuple[str, str]] | None = None,
) -> None:
    """Register Triton kernels where Triton runs: on CUDA, or on the CPU under its interpreter.

    Args:
        choice, rivals: the table of `semantica.kernels.cuda`, and kernels of `semantica._cuda` beside Triton's, as for
            `register_kernels`: asked only where they are built and the table has rows.
    """
    if launch.INTERPRETED:
        status = ("Triton, interpreted", "TRITON_INTERPRET=1; what does not fit is computed in plain torch")
    else:
        elsewhere = "fp64, and cards below 8.0, in plain torch"
        status = ("Triton", f"compiled at first use; {elsewhere}; these kernels have not yet run on a GPU")
        if choice is not None:
            status = (status[0], f"{status[1]}; {cuda.status(choice)}")
    if launch.DEVICE is not None:
        asked = rivals if choice is not None and launch.DEVICE == "cuda" and cuda.has_rows(choice) else None
        register_kernels(name, launch.DEVICE, supports, kernels, status, asked)


def lazy_kernel(
    target: str, supports: Callable[[Tensor], bool], plain: Callable, rival: tuple[str, str] | None = None
) -> Callable:
    def kernel(first: Tensor, *rest):
        if not supports(first) or not launch.modern(first.device):
            return plain(first, *rest)
        if rival is not None and load(rival[1])(first, *rest):
            return load(rival[0])(first, *rest)
        return load(target)(first, *rest)

    return kernel


def load(target: str) -> Callable:
    """ "module:function" as the function."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)
