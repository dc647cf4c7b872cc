"""`semantica bench tune`: what it can be told; the work is in `semantica.benchmarks.kernels.tune`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class TuneConfig:
    """Tune the launch table of an operator on this machine's GPU."""

    op: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """The operator, such as "group_norm"."""
    kernel: tuple[str, ...] = ()
    """Only these ladders, such as "apply"; by default all."""
    seconds: float = 360.0
    """Stop looking after this time; what was found by then is kept."""
    margin: float = 0.02
    """A row is replaced by one that is faster by this share at least, in the geometric mean."""
    out: Path | None = None
    """Where the table is written, by default over the package's own; a file that exists is gone on from."""


def tune(config: TuneConfig) -> int:
    """Tune a launch table; returns the exit code. Raises `UserError` as `semantica.benchmarks.kernels.tune.tune`."""
    from semantica.benchmarks.kernels.tune import tune

    return tune(config)
