"""`group_norm`: the operator, its plain-torch reference and its fast implementations."""

from semantica.kernels.group_norm.cases import CASES, timed
from semantica.kernels.group_norm.op import group_norm, group_norm_ref
from semantica.kernels.registry import Operator

OPERATOR = Operator(
    name="group_norm",
    function=group_norm,
    reference=group_norm_ref,
    cases=CASES,
    timed=timed,
    specimens="semantica.kernels.group_norm.specimens:specimens",
    planners="semantica.kernels.group_norm.specimens:planners",
)
