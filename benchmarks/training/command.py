"""`semantica bench train`: training steps, from a plain loop to the trainer, and where a step's time goes."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantica.benchmarks.harness.suite import device_kind, need, publish, run_suite, show, writable
from semantica.benchmarks.training import scaling
from semantica.errors import UserError

COLUMNS = (
    "operator", "problem", "implementation", "arithmetic", "median ms", "p20 - p80", "steps", "images/s",
    "against plain", "against strong", "MFU", "data wait", "peak MiB", "first step s", "loss",
)  # fmt: skip
# left out of the README
DETAILS = ("operator", "p20 - p80", "steps", "loss")
SCALING = f"'semantica train --compile' in several processes, {scaling.ROUNDS} rounds in turn"
SHARES = ("operator", "ms a step", "share", "calls a step")


@dataclass(frozen=True)
class TrainConfig:
    """Time training steps: a plain loop (fp32, contiguous, no fused operators), that loop compiled in bf16 (strong),
    then each optimisation added to the plain one in turn, up to what `semantica train --compile` and, with the network
    compiled as one graph, `--compile-scope network` run.

    Each rung runs in a process of its own, in turns of a few steps, on the same samples from the same weights; one
    whose losses are not those of the plain loop is listed and not timed. Then the last one is profiled.
    """

    preset: Literal["tiny", "small", "base", "large"] = "tiny"
    batch: int = 16
    steps: int = 20
    """Timed steps of each rung."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    workers: int = 1
    """Processes that load data, for each rung."""
    processes: tuple[int, ...] = ()
    """Also train with so many processes under torchrun, such as 1 2: each with --batch pictures a step."""
    json: Path | None = None
    """Store the rows."""
    html: Path | None = None
    """Write a page of tables and plots."""
    png: Path | None = None
    """Write the plot as a picture."""


def train(config: TrainConfig) -> int:
    """Run the race; returns the exit code.

    Raises:
        UserError: impossible options, or a package that is missing.
    """
    writable(config.json, config.html, config.png)
    need("pytest", "pytest_benchmark")
    for name in ("batch", "steps"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} is {getattr(config, name)}: give at least 1")
    if config.workers < 0:
        raise UserError(f"--workers is {config.workers}: give 0 or more")
    if any(count < 1 for count in config.processes) or len(set(config.processes)) < len(config.processes):
        raise UserError(f"--processes is {' '.join(map(str, config.processes))}: give different numbers from 1 on")

    from semantica.benchmarks.training import suite as suite_train
    from semantica.benchmarks.training.worker import rungs

    device = device_kind(config.device)
    plan = suite_train.Plan(config.preset, config.batch, config.steps, device, config.workers, tuple(rungs(device)))
    if config.processes:
        with tempfile.TemporaryDirectory() as place:
            plan.scaling = scaling.measure(
                config.processes, config.preset, config.batch, config.steps, device, config.workers, Path(place)
            )
    content = run_suite(plan, suite_train)
    publish(config, plan, content, COLUMNS, cells, page, figure)
    if plan.shares:
        print(f"\na step of {plan.shares['rung']!r}, by kind of work and by operator (PyTorch's profiler)")
        show(SHARES, shares(plan.shares))
    if plan.scaling:
        print(f"\n{SCALING}")
        show(scaling.COLUMNS, scaling.cells(plan.scaling))
    return 1 if plan.wrong else 0


def cells(row: dict, rows: list[dict]) -> tuple[str, ...]:
    """A row as text."""

    def against(name: str) -> str:
        found = [r for r in rows if r["impl"] == name and all(r[k] == row[k] for k in ("shape", "device"))]
        return f"{found[0]['median_us'] / row['median_us']:.2f}x" if found else ""

    return (
        *(row[k] for k in ("op", "shape", "impl", "dtype")),
        f"{row['median_us'] / 1e3:.1f}",
        f"{row['p20_us'] / 1e3:.1f} - {row['p80_us'] / 1e3:.1f}",
        str(row["rounds"]),
        f"{row['images_per_s']:.1f}",
        against("plain"),
        against("strong"),
        f"{row['mfu']:.1%}",
        f"{row['data_wait']:.1%}",
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['first_s']:.1f}",
        f"{row['loss']:.4f}",
    )


def shares(found: dict) -> list[tuple[str, ...]]:
    """Rows of `SHARES`: kinds of work first, then operators."""
    total = sum(found["kinds"].values())
    kinds = sorted(found["kinds"].items(), key=lambda item: -item[1])
    body = [(f"all {name}", f"{s * 1e3:.2f}", f"{s / total:.1%}", "") for name, s in kinds]
    for name, seconds, calls in found["operators"]:
        short = name if len(name) <= 60 else f"{name[:57]}..."
        body.append((short, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}", f"{calls:g}"))
    return body


def figure(rows: list[dict]):
    """Bars of the time of a step, the bf16 matrix rate's floor as a line."""
    from semantica.report import bars

    floor = rows[0]["flops"] / rows[0]["matrix_tflops"] / 1e9
    times = {f"{r['impl']} ({r['dtype']})": tuple(r[k] / 1e3 for k in ("median_us", "p20_us", "p80_us")) for r in rows}
    label = "ms a step (median; 20th to 80th percentile)"
    return bars({rows[0]["shape"]: (times, floor)}, label, "operations at the measured bf16 matrix rate")


ABOUT = (
    "Each rung trained in a process of its own, in turns of a few steps, from the same weights on the same samples and "
    "noise; its first losses are those of the plain loop. MFU: operations of the model, by the rate of a matrix "
    "product in the rung's precision, timed in the same rounds. Data wait: share of the time in which the step waited "
    "for its batch. First step: with compiling."
)


def page(path: Path, rows: list[dict], plan) -> None:
    from semantica.report import Part, svg, write_page

    parts = [Part(text=ABOUT, note=True)]
    if rows:
        parts.append(Part("Time of a step", svg=svg(figure(rows))))
        body = tuple(cells(row, rows)[2:] for row in rows)
        parts.append(Part(rows[0]["shape"], columns=COLUMNS[2:], rows=body))
    if plan.shares:
        parts.append(Part(f"A step of {plan.shares['rung']!r}", columns=SHARES, rows=tuple(shares(plan.shares))))
    if plan.scaling:
        parts.append(Part(SCALING, columns=scaling.COLUMNS, rows=tuple(scaling.cells(plan.scaling))))
    wrong = tuple((row["impl"], row["reason"]) for row in plan.wrong)
    parts.append(Part("Wrong, not timed", columns=("implementation", "reason"), rows=wrong))
    if rows:
        facts = tuple((k, str(rows[0][k])) for k in ("device", "arch", "torch", "commit", "date"))
        parts.append(Part("What ran", columns=("", ""), rows=facts))
    write_page(path, "Semantica: training", [part for part in parts if part.text or part.svg or part.rows], 1200)
