"""What a sweep found: rows of figures as sweep.json has them, means over seeds, and differences between settings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import floor, isfinite, log10, sqrt
from statistics import NormalDist, mean, stdev
from typing import Any

Row = dict[str, Any]
# of sweep.json
FORMAT = 1
# figures of a cell's own model in an evaluation, and the name of its figure of the loss
MODEL, BELOW = "model", "right_below_shuffled"


@dataclass(frozen=True)
class Mean:
    """A mean with the bounds of its 95 % interval, None where nothing is known of it; of `count` values. `biased`: an
    evaluation says that it had too few pictures for it."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 1
    biased: bool = False

    def write(self, sign: str = "") -> str:
        """As text, to the second digit of half the interval, which stands behind the mean where it is even about it;
        with a star where it is biased.

        sign: "+" for differences.
        """
        star = "*" * self.biased
        if self.low is None:
            return f"{self.value:{sign}.3g}{star}"
        half = (self.high - self.low) / 2
        digits = min(6, max(0, 1 - floor(log10(half)))) if half else 3
        if abs(self.value - (self.low + self.high) / 2) <= 1e-3 * half:
            return f"{self.value:{sign}.{digits}f}{star} ± {half:.{digits}f}"
        return f"{self.value:{sign}.{digits}f}{star} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for one and two degrees of freedom, else by an expansion in their
    inverse (Abramowitz and Stegun, 26.7.5), within 0.3 %."""
    if freedom <= 2:
        return {1: 12.70620473617471, 2: 4.302652729749464}[freedom]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def mean_of(values: Sequence[float]) -> Mean:
    """Of independent runs, with Student's interval; of one nothing more is known."""
    if len(values) < 2:
        return Mean(values[0])
    half = t_quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    middle = mean(values)
    return Mean(middle, middle - half, middle + half, len(values))


def figure(value: Any) -> Mean | None:
    """A figure of an evaluation: a number, or a `value` with its own interval, `low` and `high`, which may be `biased`;
    None for all else."""
    if isinstance(value, dict):
        found = [value.get(name) for name in ("value", "low", "high")]
        if not number(found[0]):
            return None
        known = found if all(map(number, found)) else found[:1]
        return Mean(*map(float, known), biased=bool(value.get("biased")))
    return Mean(float(value)) if number(value) else None


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def figures(row: Row) -> dict[str, Mean]:
    """All figures of a row, that of the loss among them."""
    found = {name: figure(value) for name, value in row["figures"].items()}
    if BELOW in row.get("loss", {}):
        found[BELOW] = figure(row["loss"][BELOW])
    return {name: value for name, value in found.items() if value is not None}


def row_of(name: str, settings: dict, seed: int, guidance: float, evaluation: dict) -> Row:
    """A row of one evaluation, with its baselines."""
    every = {label: dict(own) for label, own in evaluation["figures"].items()}
    # those with intervals stand in a table of their own
    for label, own in evaluation.get("metrics", {}).get("rows", {}).items():
        every.setdefault(label, {}).update(own)
    row = {"cell": name, "settings": settings, "seed": seed, "guidance": guidance, "figures": every.pop(MODEL)}
    if "loss" in evaluation:
        row["loss"] = evaluation["loss"]
    return row | {"baselines": every}


def shared(rows: list[Row]) -> tuple[dict, list[Row]]:
    """Baselines that are the same in all rows, such as copies, and the rows with the others alone."""
    first = rows[0]["baselines"] if rows else {}
    same = {name: value for name, value in first.items() if all(row["baselines"].get(name) == value for row in rows)}
    kept = []
    for row in rows:
        own = {name: value for name, value in row["baselines"].items() if name not in same}
        kept.append({**row, "baselines": own} if own else {k: v for k, v in row.items() if k != "baselines"})
    return same, kept


def baselines(content: Row) -> dict[str, dict[str, Mean]]:
    """Figures of all baselines: those that are the same everywhere, and of those that each run has the mean of all."""
    found = {name: {k: figure(v) for k, v in row.items()} for name, row in content["baselines"].items()}
    every: dict[str, dict[str, list[float]]] = {}
    for row in content["rows"]:
        for name, own in row.get("baselines", {}).items():
            for k, v in own.items():
                if (value := figure(v)) is not None:
                    every.setdefault(f"{name}, mean", {}).setdefault(k, []).append(value.value)
    found |= {name: {k: Mean(mean(values)) for k, values in own.items()} for name, own in every.items()}
    return {name: {k: v for k, v in row.items() if v is not None} for name, row in found.items()}


@dataclass(frozen=True)
class Group:
    """Rows that differ in their seed alone. settings: of each axis the name of its point."""

    settings: dict[str, str]
    guidance: float
    rows: list[Row]

    @property
    def name(self) -> str:
        return ", ".join(self.settings.values()) or "all"

    def means(self) -> dict[str, Mean]:
        """Each figure that all rows have: over the seeds, or of a single seed with the interval of its evaluation."""
        found = [figures(row) for row in self.rows]
        names = [name for name in found[0] if all(name in one for one in found)]
        if len(found) == 1:
            return {name: found[0][name] for name in names}
        means = {name: mean_of([one[name].value for one in found]) for name in names}
        return {name: replace(means[name], biased=any(one[name].biased for one in found)) for name in names}


def groups(rows: Iterable[Row]) -> list[Group]:
    """In the order of the rows, and of guidance within the same settings."""
    found: dict[tuple, Group] = {}
    for row in rows:
        place = (*row["settings"].values(), row["guidance"])
        found.setdefault(place, Group(row["settings"], row["guidance"], [])).rows.append(row)
    order = {name: i for i, name in enumerate(dict.fromkeys(group.name for group in found.values()))}
    return sorted(found.values(), key=lambda group: (order[group.name], group.guidance))


@dataclass(frozen=True)
class Effect:
    """What another value of an axis changes at a guidance: differences of figures, paired by all else, over seeds."""

    axis: str
    value: str
    base: str
    guidance: float
    figures: dict[str, Mean]


def effects(rows: list[Row], axis: str) -> list[Effect]:
    """Of each value of an axis against its first: within a seed the mean over all other settings that have both."""

    def rest(row: Row) -> tuple:
        return tuple(point for name, point in row["settings"].items() if name != axis)

    values = list(dict.fromkeys(row["settings"][axis] for row in rows))
    found = {(row["settings"][axis], row["guidance"], row["seed"], rest(row)): figures(row) for row in rows}
    made = []
    for value in values[1:]:
        for guidance in dict.fromkeys(row["guidance"] for row in rows):
            by_seed: dict[str, dict[int, list[float]]] = {}
            for (own, scale, seed, other), ours in found.items():
                base = found.get((values[0], scale, seed, other))
                if own == value and scale == guidance and base is not None:
                    for name in ours.keys() & base.keys():
                        apart = ours[name].value - base[name].value
                        by_seed.setdefault(name, {}).setdefault(seed, []).append(apart)
            if by_seed:
                changes = {name: mean_of([mean(each) for each in seeds.values()]) for name, seeds in by_seed.items()}
                made.append(Effect(axis, value, values[0], guidance, changes))
    return made


def named(names: Iterable[str], *wanted: str) -> str | None:
    """The first figure that is called one of the words, or has it as a part of its name."""
    names = list(names)
    exact: Callable[[str, str], bool] = str.__eq__
    for word in wanted:
        for same in (exact, lambda name, word: word in name.lower().split("_")):
            for name in names:
                if same(name, word):
                    return name
    return None


def all_names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in figures(row)))
