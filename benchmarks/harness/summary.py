"""Stored rows of the kernels in a few lines: how much faster the fused operators are than what others offer."""

import math
from collections.abc import Iterable

from semantica.benchmarks.harness.sources import stale
from semantica.benchmarks.harness.table import is_rival

# what PyTorch offers: the operators on the tensor as it is, the same on a contiguous copy, and its compiler; the
# fastest is that of all others in the race
RIVALS = ("native", "eager", "compile")
COLUMNS = ("operator", "direction", "layout", "dtype", *(f"against {name}" for name in (*RIVALS, "the fastest")))
PROBLEM = ("op", "direction", "layout", "dtype", "shape")
# which run a row is of: ratios are of one
RUN = ("device", "date")
# ratios of rows whose 80th percentile is further than this from their 20th are marked
SPREAD = 2.0


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each operator, direction, layout and dtype of one device: how many times less time the fused operator
    takes, geometric mean over the shapes, each by its latest run; in brackets the least, and over how many shapes.
    Where code has changed since, or a row is of a quick look, the operator is marked so; where a time was unsteady, the
    mean is marked "~".
    """
    groups: dict[tuple, list[list[dict]]] = {}
    for race in races(rows):
        if any(row["impl"] == "fused" for row in race):
            groups.setdefault(tuple(race[0][k] for k in PROBLEM[:-1]), []).append(race)
    lines = []
    for (op, direction, layout, dtype), found in groups.items():
        gains: dict[str, list[tuple[float, bool]]] = {name: [] for name in (*RIVALS, "fastest")}
        own = [row for race in found for row in race if row["impl"] == "fused"]
        for row, race in zip(own, found):
            ratios = {
                rival["impl"]: (rival["median_us"] / row["median_us"], unsteady(rival) or unsteady(row))
                for rival in filter(is_rival, race)
            }
            for name in ratios.keys() & gains.keys():
                gains[name].append(ratios[name])
            if ratios:
                gains["fastest"].append(min(ratios.values()))
        mark = " (stale)" * any(map(stale, own)) + " (quick)" * any(row.get("quick") for row in own)
        lines.append((op + mark, direction, layout, dtype, *map(cell, gains.values())))
    return lines


def races(rows: list[dict]) -> list[list[dict]]:
    """Rows that were raced with each other; of a problem raced in several runs, those of the latest with ours in it."""
    found: dict[tuple, dict[tuple, list[dict]]] = {}
    for row in rows:
        runs = found.setdefault(tuple(row[k] for k in PROBLEM), {})
        runs.setdefault(tuple(str(row.get(k)) for k in RUN), []).append(row)

    def order(race: list[dict]) -> tuple[bool, str]:
        # dates are of one form, and in order as text
        return any(row["impl"] == "fused" for row in race), str(race[0].get("date"))

    return [max(runs.values(), key=order) for runs in found.values()]


EVALUATION = ("evaluation", "operator", "dtype", "direction", "calls", *(f"{n} ms" for n in ("fused", *RIVALS, "best")))


def evaluations(rows: list[dict]) -> list[tuple[str, ...]]:
    """What an operator takes in one evaluation of a public model: the median of each shape times its calls, in ms.

    "best" takes for each shape whichever of the others is fastest there. An implementation that lacks a shape has no
    sum; where no row has a shape, the calls say of how many they are, and the sums are of these alone.
    """
    sums: dict[tuple, list[list[dict]]] = {}
    for race in races(rows):
        for what in race[0].get("calls", ()):
            named = (race[0][field] for field in ("op", "dtype", "direction"))
            sums.setdefault((what, *named), []).append(race)
    chosen = [*(lambda row, name=name: row["impl"] == name for name in ("fused", *RIVALS)), is_rival]
    lines = []
    for (what, *named), shapes in sums.items():
        calls = [own[0]["calls"][what] for own in shapes]
        columns = []
        for among in chosen:
            times = [min((row["median_us"] for row in own if among(row)), default=None) for own in shapes]
            whole = None not in times
            columns.append(f"{sum(n * t for n, t in zip(calls, times)) / 1e3:.2f}" if whole else "")
        every = shapes[0][0]["calls_of_all"][what]
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
