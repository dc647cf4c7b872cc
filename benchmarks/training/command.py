"""`semantica bench train`: training steps, from a plain loop to the trainer, and where a step's time goes."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.extras import literal_type_from_choices

from semantica.benchmarks.harness import table
from semantica.benchmarks.harness.verb import Outputs, leave_out, listed, measure, named_apart, need
from semantica.benchmarks.training.tables import KIND
from semantica.errors import UserError
from semantica.files import write_json
from semantica.model.presets import PRESETS

# pictures a step of a preset
BATCH = 16


@dataclass(frozen=True)
class TrainingConfig(Outputs):
    """Time training steps: a plain loop (fp32, contiguous, no fused operators), that loop compiled in bf16 (strong),
    then each optimisation added to the plain one in turn, up to what `semantica train --compile` and, with the network
    compiled as one graph, `--compile-scope network` run.

    Each rung runs in a process of its own, in turns of a few steps, on the same samples from the same weights; one
    whose losses are not those of the plain loop is listed and not timed. Then the last one is profiled.
    """

    preset: literal_type_from_choices(PRESETS) = "tiny"
    models: Annotated[str, tyro.conf.arg(metavar="NAMES")] = ""
    """Instead: fine-tune the UNets of public models, separated by commas: names (drawn weights; sd-1.5, sdxl-base) or
    folders of diffusers' pipelines. The step is that of diffusers' text-to-image scripts."""
    tune: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """Of public models: adapters of the attentions alone, or every weight."""
    size: int | None = None
    """Of public models: side of the pictures in pixels, by default what the model was made for."""
    batch: int | None = None
    """Pictures a step, by default 16, of public models 1."""
    steps: int = 20
    """Timed steps of each rung."""
    only: Annotated[str, tyro.conf.arg(metavar="NAMES")] = ""
    """These rungs alone, separated by commas, and the plain loop, whose losses theirs are compared with."""
    workers: int | None = None
    """Processes that load data, by default one for each rung; with --sustained as many as `semantica train` takes."""
    sustained: float | None = None
    """Instead: the trainer with its loader for so many seconds, beside each of them alone: does data keep up?"""
    data: str | None = None
    """With --sustained: what `semantica train --data` takes; by default drawn photos of 1024 x 768 pixels."""
    processes: tuple[int, ...] = ()
    """Also train with so many processes under torchrun, such as 1 2: each with --batch pictures a step."""


def train(config: TrainingConfig) -> int:
    """Run the race; returns the exit code.

    Raises:
        UserError: impossible options, or a package that is missing.
    """
    config.check()
    need("pytest", "pytest_benchmark")
    for name in ("batch", "steps", "size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give at least 1")
    if (config.workers or 0) < 0:
        raise UserError(f"--workers is {config.workers}: give 0 or more")
    if any(count < 1 for count in config.processes) or len(set(config.processes)) < len(config.processes):
        raise UserError(f"--processes is {' '.join(map(str, config.processes))}: give different numbers from 1 on")

    if config.models:
        return tune(config)
    leave_out(config, "is for --models", "size", "tune")
    if config.batch is None:
        config = replace(config, batch=BATCH)
    if config.sustained is not None:
        return sustain(config)
    if config.data is not None:
        raise UserError("--data is for --sustained: the ladder is trained on drawn pictures")

    from semantica.benchmarks.training import scaling
    from semantica.benchmarks.training.suite import TrainingBench
    from semantica.benchmarks.training.worker import rungs

    device, workers = config.device_kind(), 1 if config.workers is None else config.workers
    names = chosen(config.only, tuple(rungs(device)))
    bench = TrainingBench(config.preset, config.batch, config.steps, device, workers, names)
    if config.processes:
        with tempfile.TemporaryDirectory() as place:
            bench.scaling = scaling.measure(
                config.processes, config.preset, config.batch, config.steps, device, workers, Path(place)
            )
    measure(config, bench, KIND)
    return 1 if bench.wrong else 0


def tune(config: TrainingConfig) -> int:
    """`--models`; returns the exit code. Raises `UserError` for what does not go with it, and for unknown models."""
    alone = ("preset", "sustained", "data", "processes", "workers")
    leave_out(config, "says nothing to --models, which are fine-tuned on drawn latents", *alone)
    from semantica.benchmarks.finetuning.contenders import CONTENDERS
    from semantica.benchmarks.finetuning.suite import TuningBench
    from semantica.benchmarks.finetuning.table import KIND
    from semantica.benchmarks.kernels.public import check, configuration, split

    models = listed(config.models)
    named_apart(models)
    if not config.tune or len(set(config.tune)) < len(config.tune):
        raise UserError(f"--tune {' '.join(config.tune)}: give lora, full or both")
    if "lora" in config.tune:
        need("peft")
    sides = {}
    for model in models:
        check(model)
        if split(model)[1]:
            raise UserError(f"--models {model}: IP-Adapters are not fine-tuned here, give {split(model)[0]}")
        unet, vae = (configuration(model, part) for part in ("unet", "vae"))
        # of a pixel of the latents in pixels, and the least side that the UNet halves at every level but the last
        scale, least = (2 ** (len(part["block_out_channels"]) - 1) for part in (vae, unet))
        size = config.size or unet["sample_size"] * scale
        if size % (scale * least):
            raise UserError(f"--size {size}: {model} takes multiples of {scale * least}")
        sides[model] = size // scale
    asked = listed(config.only)
    for name in (name for name in asked if name not in CONTENDERS):
        raise UserError(f"--only {name}: choose some of {', '.join(CONTENDERS)}")
    names = tuple(name for name in CONTENDERS if not asked or name in asked)
    bench = TuningBench(sides, config.tune, config.batch or 1, config.steps, names, config.device_kind())
    measure(config, bench, KIND)
    return 1 if bench.wrong else 0


def chosen(only: str, ladder: tuple[str, ...]) -> tuple[str, ...]:
    """Rungs of --only in the order of the ladder, after its first; all without it. Raises `UserError` for another."""
    asked = listed(only)
    for name in (name for name in asked if name not in ladder):
        raise UserError(f"--only {name}: choose some of {', '.join(ladder)}")
    return tuple(name for name in ladder if not asked or name in asked or name == ladder[0])


def sustain(config: TrainingConfig) -> int:
    """`--sustained`; returns the exit code. Raises `UserError` for what does not go with it, and for bad data."""
    if not config.sustained >= 1:
        raise UserError(f"--sustained is {config.sustained}: give at least 1 second")
    other = ("steps", "only", "processes", "resume", "html", "png")
    leave_out(config, "says nothing to --sustained, which times the trainer in one process and makes no page", *other)

    from semantica.benchmarks.harness.store import environment
    from semantica.benchmarks.training import sustained
    from semantica.benchmarks.training.worker import rungs

    device = config.device_kind()
    with tempfile.TemporaryDirectory() as place:
        data = config.data or sustained.drawn(Path(place))
        # what the trainer runs at its best
        rung = list(rungs(device))[-1]
        row, said = sustained.measure(rung, config.preset, config.batch, device, config.workers, config.sustained, data)
    table.show(table.heads(sustained.SUSTAINED), table.cells(sustained.SUSTAINED, [row]))
    print(said)
    if config.json is not None:
        write_json(config.json, {"environment": environment(device), "sustained": [row]})
    return 0
