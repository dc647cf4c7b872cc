"""`semantica bench sample`: whole sampling runs, from condition images to images, beside what others would run."""

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from semantica.benchmarks.harness.table import (
    Column,
    Kind,
    against,
    against_fastest,
    mebibytes,
    milliseconds,
    share,
    times_by_shape,
)
from semantica.benchmarks.harness.verb import Outputs, leave_out, listed, measure, named_apart, need
from semantica.benchmarks.sampling import BOUND, GUIDANCE
from semantica.errors import UserError
from semantica.ranges import nvtx

MODELS = ("tiny", "small", "64px-16M")


@dataclass(frozen=True)
class SamplingConfig(Outputs):
    """Time whole sampling runs: latency one image at a time (SingleStream), throughput in batches (Offline).

    Each implementation runs in a process of its own, in random order within rounds, on inputs that no call had before.
    One whose images are not those of the fp32 pipeline is listed and not timed.
    """

    models: Annotated[str, tyro.conf.arg(metavar="NAMES")] = ""
    """Presets (with drawn weights), "64px-16M", or run folders, separated by commas; by default tiny, small and
    64px-16M, of which --quick takes the first. Or public models: names (drawn weights; sd-1.5, sdxl-base,
    sd-1.5+ip-adapter) or folders of diffusers' pipelines, of which the UNet and the decoder are raced: in PyTorch, and
    exported once, in each engine that is installed."""
    batch: tuple[int, ...] = ()
    """Images at a time: 1 is SingleStream, more is Offline; by default 1 and 8, of public models 1."""
    steps: tuple[int, ...] = ()
    """By default 10 and 20; of public models 1, which is one evaluation with both branches of guidance."""
    stages: tuple[Literal["unet", "decoder"], ...] = ("unet", "decoder")
    """Of public models."""
    only: Annotated[str, tyro.conf.arg(metavar="NAMES")] = ""
    """These implementations alone, separated by commas."""
    impl: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODULE:FUNCTION")] = ()
    """Own implementations, built as those of semantica.benchmarks.sampling.contenders are."""
    ladder: bool = False
    """Instead: the plain pipeline, then each optimisation added in turn."""
    seconds: float = 20.0
    """Time for the rounds of each problem, beside the least number of rounds."""
    rounds: int = 5
    """The least number of rounds."""
    quick: bool = False
    """Few rounds, and no search for the fastest kernels: to try things out, not to be quoted."""
    nvtx: bool = False
    """Mark what each implementation does as ranges for NVIDIA's profilers (nsys profile -t cuda,nvtx ...)."""


def sample(config: SamplingConfig) -> int:
    """Run the races; returns the exit code.

    Raises:
        UserError: impossible options or models, or a package that is missing.
    """
    config.check()
    need("pytest", "pytest_benchmark")
    for name in ("batch", "steps"):
        if min(getattr(config, name), default=1) < 1:
            raise UserError(f"--{name} {' '.join(map(str, getattr(config, name)))}: give numbers of at least 1")
    if config.rounds < 1 or not config.seconds >= 0:
        raise UserError(f"--rounds {config.rounds} --seconds {config.seconds:g}: give at least 1 and 0")

    if config.ladder:
        leave_out(config, "says nothing to --ladder, which has rungs of its own", "only")
    if config.nvtx:
        nvtx()

    models = listed(config.models)
    named_apart(models)
    if models:
        from semantica.benchmarks.kernels.public import is_public

        public = [is_public(model) for model in models]
        if any(public):
            if not all(public):
                raise UserError(f"--models {config.models}: race public models by themselves")
            leave_out(config, "marks ranges of presets and of run folders, not of public models", "nvtx")
            return sample_public(config, models)
    leave_out(config, "is for public models", "stages")

    from semantica.benchmarks.sampling.models import check
    from semantica.benchmarks.sampling.suite import QUICK, SamplingBench, protocol

    device = config.device_kind()
    models = models or (("tiny",) if config.quick else MODELS)
    # a misspelt name must not cost the races before it
    for model in models:
        check(model)
    names, absent = contenders(config, device)
    bench = SamplingBench(
        models=models,
        batches=config.batch or (1, 8),
        steps=config.steps or (10, 20),
        names=names,
        device=device,
        op="sample_ladder" if config.ladder else "sample",
        quick=config.quick,
        nvtx=config.nvtx,
        protocol=QUICK if config.quick else protocol(config.rounds, config.seconds),
        absent=absent,
    )
    measure(config, bench, KIND)
    return 1 if bench.wrong else 0


def sample_public(config: SamplingConfig, models: tuple[str, ...]) -> int:
    """Races of public UNets and their decoders; returns the exit code.

    Raises:
        UserError: a name of --only that is unknown or absent, or an own function that cannot be imported.
    """
    from semantica.benchmarks.unets.contenders import CONTENDERS, builder_of, rungs
    from semantica.benchmarks.unets.engines import ENGINES
    from semantica.benchmarks.unets.suite import QUICK, UNetBench, protocol
    from semantica.benchmarks.unets.table import KIND

    for target in config.impl:
        builder_of(target)
    device = config.device_kind()
    absent = {name: reason for name, engine in ENGINES.items() if (reason := engine.why_not(device))}
    asked, known, own = listed(config.only), {**CONTENDERS, **ENGINES}, tuple(dict.fromkeys(config.impl))
    for name in asked:
        if name not in known:
            raise UserError(f"--only {name}: choose some of {', '.join(known)}")
        if name in absent:
            raise UserError(f"--only {name}: {absent[name]}")
    raced = tuple(name for name, contender in known.items() if contender.raced and name not in absent)
    bench = UNetBench(
        models=models,
        batches=config.batch or (1,),
        steps=config.steps or (1,),
        names=(*(rungs("unet") if config.ladder else asked or raced), *own),
        device=device,
        absent={} if asked or config.ladder else absent,
        ladder=config.ladder,
        quick=config.quick,
        stages=config.stages,
        protocol=QUICK if config.quick else protocol(config.rounds, config.seconds),
    )
    if not bench.races:
        bench.closing.close()
        raise UserError(f"--only {config.only} --stages {' '.join(config.stages)}: none of these runs such a stage")
    measure(config, bench, KIND)
    return 1 if bench.wrong else 0


def contenders(config: SamplingConfig, device: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names to race, and why others are absent.

    Raises:
        UserError: a name of --only that is unknown or absent, or an own function that cannot be imported.
    """
    from semantica.benchmarks.sampling.contenders import CONTENDERS, builder_of, ladder_names

    for target in config.impl:
        builder_of(target)
    own = tuple(dict.fromkeys(config.impl))
    if config.ladder:
        return (*ladder_names(device), *own), {}
    reasons = {name: contender.why_not(device) for name, contender in CONTENDERS.items()}
    absent = {name: reason for name, reason in reasons.items() if reason}
    asked = listed(config.only)
    for name in asked:
        if name not in CONTENDERS:
            raise UserError(f"--only {name}: choose some of {', '.join(CONTENDERS)}")
        if name in absent:
            raise UserError(f"--only {name}: {absent[name]}")
    raced = (name for name, contender in CONTENDERS.items() if contender.raced and name not in absent)
    return (*(asked or raced), *own), absent


ABOUT = (
    "From condition images to images, numpy in and out, guidance {guidance} in every step. Each implementation ran in "
    "a process of its own, in random order within rounds, every call on images and noise that no call had before; PSNR "
    "is to the fp32 pipeline's images from the same noise, and below {bound:g} dB nothing is timed. First call: with "
    "building and compiling. Nominal operations: encoder and both branches of every step, keys and values once; "
    "implementations that leave some of them out can exceed the matrix rate."
)


def tail(head: str, field: str, runs: int) -> Column:
    """A high quantile, of which fewer runs have but their slowest one: empty for those."""
    return Column(head, lambda row, rows: f"{row[field] / 1e3:.1f}" if row["rounds"] >= runs else "")


KIND = Kind(
    title="Semantica: sampling",
    about=ABOUT.format(guidance=GUIDANCE, bound=BOUND),
    columns=(
        Column("operator", "{op}", detail=True),
        Column("problem", "{shape}"),
        Column("scenario", "{layout}"),
        Column("implementation", "{impl}"),
        Column("arithmetic", "{dtype}"),
        milliseconds("p50 ms", "median_us"),
        tail("p95 ms", "p95_us", 20),
        tail("p99 ms", "p99_us", 100),
        Column("runs", "{rounds}", detail=True),
        Column("images/s", "{images_per_s:.2f}"),
        against("plain"),
        against("strong"),
        against_fastest(),
        Column("PSNR dB", "{psnr_db:.1f}"),
        Column("first call s", lambda row, rows: f"{row['build_s'] + row['first_s']:.1f}"),
        mebibytes("peak MiB", "peak_bytes"),
        Column("nominal TFLOP/s", "{tflops:.3g}", detail=True),
        share("of matrix", "share_of_matrix_rate"),
    ),
    by="shape",
    apart=3,
    figure=functools.partial(
        times_by_shape,
        label="ms (median; 20th to 80th percentile)",
        floor="nominal operations at the measured bf16 matrix rate",
    ),
    figures=lambda rows: {"Median time": rows},
)
