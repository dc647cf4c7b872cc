"""`attention_columns`: the operator, its plain-torch reference and its fast implementations."""

from semantica.kernels.attention_columns.cases import CASES, FLOP_FORMULAS, timed
from semantica.kernels.attention_columns.op import attention_columns, attention_columns_ref
from semantica.kernels.registry import Operator

OPERATOR = Operator(
    name="attention_columns",
    function=attention_columns,
    reference=attention_columns_ref,
    cases=CASES,
    timed=timed,
    flop_formulas=FLOP_FORMULAS,
    specimens="semantica.kernels.attention_columns.specimens:specimens",
    planners="semantica.kernels.attention_columns.specimens:planners",
    borrows=(
        "cross_attention/op.py",
        "cross_attention/tiles.py",
        "attention_moments/op.py",
        "attention_moments/tiles.py",
    ),
)
