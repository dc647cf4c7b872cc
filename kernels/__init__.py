"""Fused operators: `torch.library` ops, a plain-torch reference each. They know tensors, nothing of the model."""

from collections.abc import Iterator

from semantica.kernels.cross_attention import cross_attention, cross_attention_ref
from semantica.kernels.group_norm import group_norm, group_norm_ref
from semantica.kernels.launch import Launch

__all__ = ["cross_attention", "cross_attention_ref", "group_norm", "group_norm_ref", "implementations", "specimens"]


def implementations() -> dict[str, tuple[str, str]]:
    """Which implementation each operator uses, and why: `{operator: (implementation, reason)}`."""
    reason = "plain torch on every device; no fused kernel is registered"
    return {"group_norm": ("reference", reason), "cross_attention": ("reference", reason)}


def specimens() -> Iterator[tuple[str, list[Launch]]]:
    """`(name, launches)` of every shipped Triton kernel in every configuration, on meta tensors: to be compiled.

    Raises:
        ImportError: Triton is not installed.
    """
    from semantica.kernels import cross_attention_triton, group_norm_triton

    for op, module in (("group_norm", group_norm_triton), ("cross_attention", cross_attention_triton)):
        for name, launches in module.specimens():
            yield f"{op} {name}", launches
