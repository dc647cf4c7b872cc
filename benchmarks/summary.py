"""Stored rows of the kernels in a few lines: how much faster the fused operators are than what PyTorch offers."""

import math
from collections.abc import Iterable

from semantica.benchmarks import store

COLUMNS = (
    "operator", "direction", "layout", "dtype", "shapes", "against eager", "against compile", "against the faster"
)  # fmt: skip
RIVALS = ("eager", "compile")
PROBLEM = ("op", "direction", "layout", "dtype", "device", "shape")


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each operator, direction, layout and dtype: geometric means over the shapes of how many times less
    time the fused operator takes, in brackets the least. Where code has changed since, the operator is marked stale.
    """
    times = {(*(row[k] for k in PROBLEM), row["impl"]): row["median_us"] for row in rows}
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["impl"] == "fused":
            groups.setdefault(tuple(row[k] for k in PROBLEM[:-1]), []).append(row)
    lines = []
    for (op, direction, layout, dtype, _), own in groups.items():
        gains: dict[str, list[float]] = {name: [] for name in (*RIVALS, "the faster")}
        for row in own:
            place = tuple(row[k] for k in PROBLEM)
            found = {name: times[*place, name] / row["median_us"] for name in RIVALS if (*place, name) in times}
            for name, gain in found.items():
                gains[name].append(gain)
            if found:
                gains["the faster"].append(min(found.values()))
        cells = [f"{geometric_mean(g):.2f}x ({min(g):.2f}x)" if g else "" for g in gains.values()]
        stale = " (stale)" if any(map(store.stale, own)) else ""
        lines.append((op + stale, direction, layout, dtype, str(len(own)), *cells))
    return lines
