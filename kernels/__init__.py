"""Fused operators: `torch.library` ops, a plain-torch reference each. They know tensors, nothing of the model."""

from semantica.kernels.attention_columns import OPERATOR as ATTENTION_COLUMNS
from semantica.kernels.attention_columns.op import attention_columns, attention_columns_ref
from semantica.kernels.attention_moments import OPERATOR as ATTENTION_MOMENTS
from semantica.kernels.attention_moments.op import attention_moments, attention_moments_ref
from semantica.kernels.cross_attention import OPERATOR as CROSS_ATTENTION
from semantica.kernels.cross_attention.op import cross_attention, cross_attention_ref
from semantica.kernels.group_norm import OPERATOR as GROUP_NORM
from semantica.kernels.group_norm.op import group_norm, group_norm_ref
from semantica.kernels.registry import OPERATORS, Case, Operator, implementations, register_operator, specimens

__all__ = [
    "OPERATORS", "Case", "Operator", "attention_columns", "attention_columns_ref", "attention_moments",
    "attention_moments_ref", "cross_attention", "cross_attention_ref", "group_norm", "group_norm_ref",
    "implementations", "register_operator", "specimens",
]  # fmt: skip

for operator in (GROUP_NORM, CROSS_ATTENTION, ATTENTION_MOMENTS, ATTENTION_COLUMNS):
    register_operator(operator)
