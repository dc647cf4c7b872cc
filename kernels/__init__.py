"""Fused operators: `torch.library` ops, a plain-torch reference each. They know tensors, nothing of the model."""

from semantica.kernels.cross_attention import OPERATOR as CROSS_ATTENTION
from semantica.kernels.cross_attention.op import cross_attention, cross_attention_ref
from semantica.kernels.group_norm import OPERATOR as GROUP_NORM
from semantica.kernels.group_norm.op import group_norm, group_norm_ref
from semantica.kernels.registry import OPERATORS, Case, Operator, implementations, register_operator, specimens

__all__ = [
    "OPERATORS", "Case", "Operator", "cross_attention", "cross_attention_ref", "group_norm", "group_norm_ref",
    "implementations", "register_operator", "specimens",
]  # fmt: skip

for operator in (GROUP_NORM, CROSS_ATTENTION):
    register_operator(operator)
