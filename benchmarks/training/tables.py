"""What the figures of training are shown as: steps, the shares of a step, and the speed-up by processes."""

import functools
from statistics import median

from semantica.benchmarks.harness.table import (
    RACED,
    Column,
    Kind,
    against,
    mebibytes,
    milliseconds,
    share,
    times_by_shape,
)
from semantica.benchmarks.training import ROUNDS

KIND = Kind(
    title="Semantica: training",
    about=(
        "Each rung trained in a process of its own, in turns of a few steps, from the same weights on the same samples "
        "and noise; its first losses are those of the plain loop. MFU: operations of the model, by the rate of a "
        "matrix product in the rung's precision, timed in the same rounds. Data wait: share of the time in which the "
        "step waited for its batch and the device had nothing else to do. First step: with compiling. On a GPU the "
        "steps of a turn are timed together, the device being waited for at their end, and a rung that waits for its "
        "turn keeps nothing there but its process: weights are parked on the host, and two steps that are not timed "
        "come first when it goes on. fp32 is fp32 throughout, TF32 off."
    ),
    columns=(
        *RACED,
        milliseconds("median ms", "median_us"),
        milliseconds("p20 - p80", "p20_us", "p80_us", detail=True),
        Column("steps", "{rounds}", detail=True),
        Column("images/s", "{images_per_s:.1f}"),
        against("plain"),
        against("strong"),
        share("MFU", "mfu", ".1%"),
        Column("data wait", "{data_wait:.1%}"),
        mebibytes("peak MiB", "peak_bytes"),
        Column("first step s", "{first_s:.1f}"),
        Column("loss", "{loss:.4f}", detail=True),
    ),
    by="shape",
    apart=2,
    figure=functools.partial(
        times_by_shape,
        label="ms a step (median; 20th to 80th percentile)",
        floor="operations at the measured bf16 matrix rate",
    ),
    figures=lambda rows: {"Time of a step": rows},
)
SHARES = ("operator", "ms a step", "share", "calls a step")


def shares(found: dict) -> list[tuple[str, ...]]:
    """Rows of `SHARES`: kinds of work first, then operators."""
    total = sum(found["kinds"].values())
    kinds = sorted(found["kinds"].items(), key=lambda item: -item[1])
    body = [(f"all {name}", f"{s * 1e3:.2f}", f"{s / total:.1%}", "") for name, s in kinds]
    for name, seconds, calls in found["operators"]:
        short = name if len(name) <= 60 else f"{name[:57]}..."
        body.append((short, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}", f"{calls:g}"))
    return body


def speed_up(row: dict, rows: list[dict]) -> float:
    """Against the first row, by median."""
    return median(row["images_per_s"]) / median(rows[0]["images_per_s"])


def efficiency(row: dict, rows: list[dict]) -> str:
    return f"{speed_up(row, rows) * rows[0]['processes'] / row['processes']:.0%}"


SCALING = f"'semantica train --compile' in several processes, {ROUNDS} rounds in turn"
SCALED = (
    Column("processes", "{processes}"),
    Column("threads each", lambda row, rows: str(row["threads"] or "")),
    Column("batch", "{batch}"),
    Column("images/s", lambda row, rows: f"{median(row['images_per_s']):.1f}"),
    Column("lowest - highest", lambda row, rows: f"{min(row['images_per_s']):.1f} - {max(row['images_per_s']):.1f}"),
    Column("speed-up", lambda row, rows: f"{speed_up(row, rows):.2f}x"),
    Column("efficiency", efficiency),
    Column("data wait", lambda row, rows: f"{median(row['data_wait']):.1%}"),
)
