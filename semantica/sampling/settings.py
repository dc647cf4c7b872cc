"""How to sample, as one value that is made once and passed along; numpy only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semantica import solvers
from semantica.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings of a sampling run.

    steps: of the solver. solver: a name in `semantica.solvers.SOLVERS`.
    guidance: weak + guidance (own - weak), weak the unconditional branch (arXiv 2207.12598) or another guider's; 1 is
        the conditional branch alone.
    interval: (start, stop), fractions of the run between which guidance is on; outside, the conditional branch runs
        alone (Kynkaanniemi et al., arXiv 2404.07724, bound sigma instead).
    thresholding, clip_range, ratio: kind, clip_range, ratio of `semantica.solvers.threshold`.
    seed: of the noise; that of variation j of picture i at a step is a function of (seed, i, j, step) alone.

    Raises:
        UserError: an unknown name or an impossible number.
    """

    steps: int = 20
    solver: str = "dpmpp_2m"
    guidance: float = 1.5
    interval: tuple[float, float] = (0.0, 1.0)
    thresholding: str = "clip"
    clip_range: float = 1.0
    ratio: float = 0.995
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"number of sampling steps {self.steps} must be at least 1")
        solvers.check_solver(self.solver)
        solvers.check_thresholding(self.thresholding)
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance scale {self.guidance} must be a number")
        start, stop = self.interval
        if not 0 <= start <= stop <= 1:
            raise UserError(
                f"guidance interval {self.interval}: give two fractions of the run, 0 <= start <= stop <= 1"
            )
        if self.seed < 0:
            raise UserError(f"seed {self.seed} must be 0 or more")

    @classmethod
    def of(cls, config: Mapping[str, Any], **changes: Any) -> "Sampling":
        """The solver and thresholding of a `SemanticaScheduler`'s configuration, with other fields as given."""
        names = {
            "solver": "solver",
            "thresholding": "thresholding",
            "clip_range": "clip_range",
            "dynamic_thresholding_ratio": "ratio",
        }
        return cls(**{field: config[name] for name, field in names.items() if name in config} | changes)

    def plan(self, schedule: solvers.Schedule) -> solvers.Plan:
        """Every coefficient of the run."""
        return solvers.make_plan(self.solver, schedule.grid(self.steps)[1])

    def guided(self) -> list[bool]:
        """Which steps run both branches: step i where start <= i / steps < stop, as diffusers' guiders count."""
        start, stop = (int(part * self.steps) for part in self.interval)
        return [self.guidance != 1 and start <= i < stop for i in range(self.steps)]

    def threshold(self, x: solvers.Array) -> solvers.Array:
        """Predicted clean images, brought back into their range."""
        return solvers.threshold(x, self.thresholding, self.clip_range, self.ratio)
