"""Fused operators: `torch.library` ops, a plain-torch reference each. They know tensors, nothing of the model."""

from semantica.kernels.cross_attention import cross_attention, cross_attention_ref
from semantica.kernels.group_norm import group_norm, group_norm_ref

__all__ = ["cross_attention", "cross_attention_ref", "group_norm", "group_norm_ref", "implementations"]


def implementations() -> dict[str, tuple[str, str]]:
    """Which implementation each operator uses, and why: `{operator: (implementation, reason)}`."""
    reason = "plain torch on every device; no fused kernel is registered"
    return {"group_norm": ("reference", reason), "cross_attention": ("reference", reason)}
