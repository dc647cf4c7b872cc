"""Fused operators: `torch.library` ops, a plain-torch reference each. They know tensors, nothing of the model."""

from semantica.kernels.backends import implementations, specimens
from semantica.kernels.cross_attention import cross_attention, cross_attention_ref
from semantica.kernels.group_norm import group_norm, group_norm_ref

__all__ = ["cross_attention", "cross_attention_ref", "group_norm", "group_norm_ref", "implementations", "specimens"]
