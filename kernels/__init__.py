"""Fused operators: `torch.library` ops, a plain-torch reference each. They know tensors, nothing of the model."""

from semantica.kernels.cross_attention.op import cross_attention, cross_attention_ref
from semantica.kernels.group_norm.op import group_norm, group_norm_ref
from semantica.kernels.registry import implementations, specimens

__all__ = ["cross_attention", "cross_attention_ref", "group_norm", "group_norm_ref", "implementations", "specimens"]
