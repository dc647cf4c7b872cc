"""`attention_moments`: the operator, its plain-torch reference and its fast implementations."""

from semantica.kernels.attention_moments.cases import CASES, FLOP_FORMULAS, timed
from semantica.kernels.attention_moments.op import attention_moments, attention_moments_ref
from semantica.kernels.registry import Operator

OPERATOR = Operator(
    name="attention_moments",
    function=attention_moments,
    reference=attention_moments_ref,
    cases=CASES,
    timed=timed,
    flop_formulas=FLOP_FORMULAS,
    specimens="semantica.kernels.attention_moments.specimens:specimens",
    planners="semantica.kernels.attention_moments.specimens:planners",
    borrows=("cross_attention/op.py", "cross_attention/tiles.py"),
)
