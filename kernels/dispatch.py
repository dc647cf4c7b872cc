"""Which implementation runs an operator on a device: what is registered with torch's dispatcher, and why."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from semantica.kernels import cuda, launch

PLAIN = ("plain torch", "no fused kernel is registered for this device")
# operator -> device -> (implementation, reason)
REGISTERED: dict[str, dict[str, tuple[str, str]]] = {}
# (torch.library op, device) -> its fast kernel
KERNELS: dict[tuple[Any, str], Callable] = {}
# (operator, device) -> whether its fast kernels compute with this first argument
SUPPORTED: dict[tuple[str, str], Callable[[Tensor], bool]] = {}
# tensors that are nothing but their values
ORDINARY = (Tensor, torch.nn.Parameter)


def cpp_instructions(name: str) -> list[str]:
    """Instruction sets for which `semantica._C` has loops of an operator that run here, best first."""
    try:
        from semantica import _C
    except ImportError:
        return []
    targets = getattr(_C, f"{name}_targets", None)
    return targets() if targets else []


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
        KERNELS[op, device] = kernel = lazy_kernel(target, supports, plain, (rivals or {}).get(target))
        op.register_kernel(device, kernel)
    SUPPORTED[name, device] = supports
    REGISTERED.setdefault(name, {})[device] = status


def serves(name: str, device: str, dtype: torch.dtype) -> bool:
    """Whether an operator's fast kernels compute in a type on a kind of device."""
    supports = SUPPORTED.get((name, device))
    return supports is not None and supports(torch.empty(1, dtype=dtype, device="meta"))


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


def call(op: Any, *arguments: Any) -> Any:
    """What an op computes, without gradients: by its fast kernel at once, or through torch's dispatcher."""
    return (direct(op, arguments) or op)(*arguments)


def direct(op: Any, arguments: tuple) -> Callable | None:
    """The fast kernel of an op where nothing but the kernel would see the call, else None.

    torch's dispatcher costs the host more than the kernel's launch. Compilers, modes, transforms, subclasses of
    tensors, profilers and forward-mode derivatives need it.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd._profiler_enabled():
        return None
    if forward_ad._current_level >= 0:
        return None
    for a in arguments:
        if isinstance(a, Tensor) and (type(a) not in ORDINARY or a.is_neg() or a._is_zerotensor()):
            return None
    return KERNELS.get((op, arguments[0].device.type))


def transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is under way.

    A `torch.library.custom_op` has no rule for either: torch would refuse reverse mode, and give derivatives of zero in
    forward mode without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def differentiable(arguments: tuple) -> bool:
    """Whether a result of these must know where it came from."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def with_gradient(op: Any, save: Callable, backward: Callable) -> Callable:
    """Give an op its gradient; returns what calls it, past torch's dispatcher where it may: see `direct`.

    Args:
        op: of `torch.library.custom_op`.
        save: `(ctx, inputs, outputs)`; keeps what the backward needs.
        backward: `(ctx, *gradients)` to the gradients of the inputs, once differentiable. `ctx.needs_input_grad` is to
            be counted from its end: past the dispatcher the kernel comes before the inputs.
    """

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, kernel, *inputs):
            outputs = kernel(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            return None, *backward(ctx, *gradients)

    def run(*arguments: Any) -> Any:
        kernel = direct(op, arguments)
        if kernel is None:
            return op(*arguments)
        return Fused.apply(kernel, *arguments) if differentiable(arguments) else kernel(*arguments)

    op.register_autograd(backward, setup_context=save)
    return run


def lazy_kernel(
    target: str, supports: Callable[[Tensor], bool], plain: Callable, rival: tuple[str, str] | None = None
) -> Callable:
    # even an import of what is there takes time
    loaded = functools.cache(lambda name: load(name))

    def kernel(first: Tensor, *rest):
        if not supports(first) or not launch.modern(first.device):
            return plain(first, *rest)
        if rival is not None and loaded(rival[1])(first, *rest):
            return loaded(rival[0])(first, *rest)
        return loaded(target)(first, *rest)

    return kernel


def load(target: str) -> Callable:
    """ "module:function" as the function."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)
