"""`semantica bench train`: training steps, from a plain loop to the trainer, and where a step's time goes."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tyro.extras import literal_type_from_choices

from semantica.benchmarks.harness.verb import Outputs, measure, need
from semantica.benchmarks.training.tables import KIND
from semantica.errors import UserError
from semantica.model.presets import PRESETS


@dataclass(frozen=True)
class TrainingConfig(Outputs):
    """Time training steps: a plain loop (fp32, contiguous, no fused operators), that loop compiled in bf16 (strong),
    then each optimisation added to the plain one in turn, up to what `semantica train --compile` and, with the network
    compiled as one graph, `--compile-scope network` run.

    Each rung runs in a process of its own, in turns of a few steps, on the same samples from the same weights; one
    whose losses are not those of the plain loop is listed and not timed. Then the last one is profiled.
    """

    preset: literal_type_from_choices(PRESETS) = "tiny"
    batch: int = 16
    steps: int = 20
    """Timed steps of each rung."""
    workers: int = 1
    """Processes that load data, for each rung."""
    processes: tuple[int, ...] = ()
    """Also train with so many processes under torchrun, such as 1 2: each with --batch pictures a step."""


def train(config: TrainingConfig) -> int:
    """Run the race; returns the exit code.

    Raises:
        UserError: impossible options, or a package that is missing.
    """
    config.check()
    need("pytest", "pytest_benchmark")
    for name in ("batch", "steps"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} is {getattr(config, name)}: give at least 1")
    if config.workers < 0:
        raise UserError(f"--workers is {config.workers}: give 0 or more")
    if any(count < 1 for count in config.processes) or len(set(config.processes)) < len(config.processes):
        raise UserError(f"--processes is {' '.join(map(str, config.processes))}: give different numbers from 1 on")

    from semantica.benchmarks.training import scaling
    from semantica.benchmarks.training.suite import TrainingBench
    from semantica.benchmarks.training.worker import rungs

    device = config.device_kind()
    bench = TrainingBench(config.preset, config.batch, config.steps, device, config.workers, tuple(rungs(device)))
    if config.processes:
        with tempfile.TemporaryDirectory() as place:
            bench.scaling = scaling.measure(
                config.processes, config.preset, config.batch, config.steps, device, config.workers, Path(place)
            )
    measure(config, bench, KIND)
    return 1 if bench.wrong else 0
