"""Stored rows of the kernels in a few lines: how much faster the fused operators are than what PyTorch offers."""

import math
from collections.abc import Iterable

from semantica.benchmarks.harness.sources import stale

# what PyTorch offers: the operators on the tensor as it is, the same on a contiguous copy, and its compiler
RIVALS = ("native", "eager", "compile")
COLUMNS = ("operator", "direction", "layout", "dtype", *(f"against {name}" for name in (*RIVALS, "the fastest")))
PROBLEM = ("op", "direction", "layout", "dtype", "shape")
# ratios of rows whose 80th percentile is further than this from their 20th are marked
SPREAD = 2.0


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each operator, direction, layout and dtype of one device: how many times less time the fused operator
    takes, geometric mean over the shapes; in brackets the least, and over how many shapes. Where code has changed
    since, the operator is marked stale; where a time was unsteady, the mean is marked "~".
    """
    times = {(*(row[k] for k in PROBLEM), row["impl"]): row for row in rows}
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["impl"] == "fused":
            groups.setdefault(tuple(row[k] for k in PROBLEM[:-1]), []).append(row)
    lines = []
    for (op, direction, layout, dtype), own in groups.items():
        gains: dict[str, list[tuple[float, bool]]] = {name: [] for name in (*RIVALS, "fastest")}
        for row in own:
            place = tuple(row[k] for k in PROBLEM)
            found = {name: times[*place, name] for name in RIVALS if (*place, name) in times}
            ratios = {
                name: (rival["median_us"] / row["median_us"], unsteady(rival) or unsteady(row))
                for name, rival in found.items()
            }
            for name, ratio in ratios.items():
                gains[name].append(ratio)
            if ratios:
                gains["fastest"].append(min(ratios.values()))
        mark = " (stale)" if any(map(stale, own)) else ""
        lines.append((op + mark, direction, layout, dtype, *map(cell, gains.values())))
    return lines


EVALUATION = ("evaluation", "operator", "dtype", "direction", "calls", *(f"{n} ms" for n in ("fused", *RIVALS, "best")))


def evaluations(rows: list[dict]) -> list[tuple[str, ...]]:
    """What an operator takes in one evaluation of a public model: the median of each shape times its calls, in ms.

    "best" takes for each shape whichever of PyTorch's ways is fastest there. An implementation that lacks a shape has
    no sum; where no row has a shape, the calls say of how many they are, and the sums are of these alone.
    """
    sums: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        for what in row.get("calls", ()):
            group = sums.setdefault((what, row["op"], row["dtype"], row["direction"]), {})
            group.setdefault(row["shape"] + row["layout"], []).append(row)
    lines = []
    for (what, *named), shapes in sums.items():
        calls = [own[0]["calls"][what] for own in shapes.values()]
        columns = []
        for names in (("fused",), *((name,) for name in RIVALS), RIVALS):
            times = [min((r["median_us"] for r in own if r["impl"] in names), default=None) for own in shapes.values()]
            whole = None not in times
            columns.append(f"{sum(n * t for n, t in zip(calls, times)) / 1e3:.2f}" if whole else "")
        every = next(iter(shapes.values()))[0]["calls_of_all"][what]
        timed = str(every) if sum(calls) == every else f"{sum(calls)} of {every}"
        lines.append((what, *named, timed, *columns))
    return lines


def unsteady(row: dict) -> bool:
    return row["p80_us"] > SPREAD * row["p20_us"]


def cell(gains: list[tuple[float, bool]]) -> str:
    if not gains:
        return ""
    ratios = [ratio for ratio, _ in gains]
    mark = "~" if any(shaky for _, shaky in gains) else ""
    return f"{mark}{geometric_mean(ratios):.2f}x ({min(ratios):.2f}x of {len(ratios)})"
