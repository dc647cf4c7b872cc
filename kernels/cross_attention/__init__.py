"""`cross_attention`: the operator, its plain-torch reference and its fast implementations."""

from semantica.kernels.cross_attention.cases import CASES, FLOP_FORMULAS, timed
from semantica.kernels.cross_attention.op import cross_attention, cross_attention_ref
from semantica.kernels.registry import Operator

OPERATOR = Operator(
    name="cross_attention",
    function=cross_attention,
    reference=cross_attention_ref,
    cases=CASES,
    timed=timed,
    flop_formulas=FLOP_FORMULAS,
    specimens="semantica.kernels.cross_attention.specimens:specimens",
    planners="semantica.kernels.cross_attention.specimens:planners",
)
