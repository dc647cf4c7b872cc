"""`semantica bench sample`: whole sampling runs, from condition images to images, beside what others would run."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from semantica.benchmarks.harness.suite import device_kind, need, publish, run_suite, writable
from semantica.errors import UserError

COLUMNS = (
    "operator", "problem", "scenario", "implementation", "arithmetic", "p50 ms", "p95 ms", "p99 ms", "runs", "images/s",
    "against plain", "against strong", "PSNR dB", "first call s", "peak MiB", "nominal TFLOP/s", "of matrix",
)  # fmt: skip
# left out of the README
DETAILS = ("operator", "runs", "nominal TFLOP/s")


MODELS = ("tiny", "small", "64px-16M")


@dataclass(frozen=True)
class SampleConfig:
    """Time whole sampling runs: latency one image at a time (SingleStream), throughput in batches (Offline).

    Each implementation runs in a process of its own, in random order within rounds, on inputs that no call had before.
    One whose images are not those of the fp32 pipeline is listed and not timed.
    """

    models: Annotated[str, tyro.conf.arg(metavar="NAMES")] = ""
    """Presets (with drawn weights), "64px-16M", or run folders, separated by commas; by default tiny, small and
    64px-16M, of which --quick takes the first."""
    batch: tuple[int, ...] = (1, 8)
    """Images at a time: 1 is SingleStream, more is Offline."""
    steps: tuple[int, ...] = (10, 20)
    only: Annotated[str, tyro.conf.arg(metavar="NAMES")] = ""
    """These implementations alone, separated by commas."""
    impl: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODULE:FUNCTION")] = ()
    """Own implementations, built as those of semantica.benchmarks.sampling.contenders are."""
    ladder: bool = False
    """Instead: the plain pipeline, then each optimisation added in turn."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    seconds: float = 20.0
    """Time for the rounds of each problem, beside the least number of rounds."""
    rounds: int = 5
    """The least number of rounds."""
    quick: bool = False
    """Few rounds, and no search for the fastest kernels: to try things out, not to be quoted."""
    json: Path | None = None
    """Store the rows."""
    html: Path | None = None
    """Write a page of tables and plots."""
    png: Path | None = None
    """Write the plot as a picture."""


def sample(config: SampleConfig) -> int:
    """Run the races; returns the exit code.

    Raises:
        UserError: impossible options or models, or a package that is missing.
    """
    writable(config.json, config.html, config.png)
    need("pytest", "pytest_benchmark")
    for name in ("batch", "steps"):
        if not getattr(config, name) or min(getattr(config, name)) < 1:
            raise UserError(f"--{name} {' '.join(map(str, getattr(config, name)))}: give numbers of at least 1")
    if config.rounds < 1 or not config.seconds >= 0:
        raise UserError(f"--rounds {config.rounds} --seconds {config.seconds:g}: give at least 1 and 0")

    from semantica.benchmarks.sampling import suite as suite_sample
    from semantica.benchmarks.sampling.models import check

    device = device_kind(config.device)
    models = tuple(filter(None, config.models.split(","))) or (("tiny",) if config.quick else MODELS)
    # a misspelt name must not cost the races before it
    for model in models:
        check(model)
    names, absent = contenders(config, device)
    protocol = suite_sample.QUICK if config.quick else suite_sample.protocol(config.rounds, config.seconds)
    plan = suite_sample.Plan(
        models=models, batches=config.batch, steps=config.steps, names=names, device=device,
        op="sample_ladder" if config.ladder else "sample", quick=config.quick, protocol=protocol, absent=absent,
    )  # fmt: skip
    content = run_suite(plan, suite_sample)
    publish(config, plan, content, COLUMNS, cells, page, figure)
    return 1 if plan.wrong else 0


def contenders(config: SampleConfig, device: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names to race, and why others are absent.

    Raises:
        UserError: a name of --only that is unknown or absent, or an own function that cannot be imported.
    """
    from semantica.benchmarks.sampling.contenders import (
        CPU_ONLY,
        IMPLEMENTATIONS,
        PACKAGES,
        RACED,
        builder_of,
        ladder_names,
    )

    for target in config.impl:
        builder_of(target)
    if config.ladder:
        return (*ladder_names(device), *config.impl), {}
    absent = {name: "runs on the CPU only" for name in CPU_ONLY if device != "cpu"}
    for name, packages in PACKAGES.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing and name not in absent:
            absent[name] = f"not installed: {', '.join(missing)}"
    asked = tuple(filter(None, config.only.split(",")))
    for name in asked:
        if name not in IMPLEMENTATIONS:
            raise UserError(f"--only {name}: choose some of {', '.join(IMPLEMENTATIONS)}")
        if name in absent:
            raise UserError(f"--only {name}: {absent[name]}")
    return (*(asked or (name for name in RACED if name not in absent)), *config.impl), absent


def cells(row: dict, rows: list[dict]) -> tuple[str, ...]:
    """A row as text. Nominal: operations of the plain pipeline with keys and values computed once."""
    same = ("op", "shape", "direction", "device")

    def against(name: str) -> str:
        found = [r for r in rows if r["impl"] == name and all(r[k] == row[k] for k in same)]
        return f"{found[0]['median_us'] / row['median_us']:.2f}x" if found else ""

    return (
        *(row[k] for k in ("op", "shape", "layout", "impl", "dtype")),
        *(f"{row[k] / 1e3:.1f}" for k in ("median_us", "p95_us", "p99_us")),
        str(row["rounds"]),
        f"{row['images_per_s']:.2f}",
        against("plain"),
        against("strong"),
        f"{row['psnr_db']:.1f}",
        f"{row['build_s'] + row['first_s']:.1f}",
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['tflops']:.3g}",
        f"{row['share_of_matrix_rate']:.0%}",
    )


def figure(rows: list[dict]):
    """Bars of median time by implementation, one panel for each problem, the bf16 matrix rate's floor as a line."""
    from semantica.report import bars

    panels = {}
    for problem in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == problem]
        floor = own[0]["flops"] / own[0]["matrix_tflops"] / 1e9
        times = {f"{row['impl']} ({row['dtype']})": tuple(row[k] / 1e3 for k in TIMES) for row in own}
        panels[problem] = times, floor
    return bars(panels, "ms (median; 20th to 80th percentile)", "nominal operations at the measured bf16 matrix rate")


TIMES = ("median_us", "p20_us", "p80_us")
ABOUT = (
    "From condition images to images, numpy in and out, guidance {guidance} in every step. Each implementation ran in "
    "a process of its own, in random order within rounds, every call on images and noise that no call had before; PSNR "
    "is to the fp32 pipeline's images from the same noise, and below {bound:g} dB nothing is timed. First call: with "
    "building and compiling. Nominal operations: encoder and both branches of every step, keys and values once; "
    "implementations that leave some of them out can exceed the matrix rate."
)


def page(path: Path, rows: list[dict], plan) -> None:
    from semantica.benchmarks.sampling.race import BOUND, GUIDANCE
    from semantica.report import Part, svg, write_page

    parts = [Part(text=ABOUT.format(guidance=GUIDANCE, bound=BOUND), note=True)]
    if rows:
        parts.append(Part("Median time", svg=svg(figure(rows))))
    for problem in dict.fromkeys(row["shape"] for row in rows):
        body = tuple(cells(row, rows)[3:] for row in rows if row["shape"] == problem)
        parts.append(Part(problem, columns=COLUMNS[3:], rows=body))
    wrong = tuple((row["problem"], row["impl"], row["reason"]) for row in plan.wrong)
    parts.append(Part("Wrong, not timed", columns=("problem", "implementation", "reason"), rows=wrong))
    parts.append(Part("Absent", columns=("implementation", "reason"), rows=tuple(plan.absent.items())))
    if rows:
        facts = tuple((k, str(rows[0][k])) for k in ("device", "arch", "torch", "commit", "date"))
        parts.append(Part("What ran", columns=("", ""), rows=facts))
    write_page(path, "Semantica: sampling", [part for part in parts if part.text or part.svg or part.rows], 1200)
