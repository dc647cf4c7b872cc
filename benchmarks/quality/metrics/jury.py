"""The metrics of one set of pictures against the real ones, each with its interval over conditions."""

from dataclasses import dataclass, field

import numpy as np

from semantica import features
from semantica.benchmarks.quality.metrics import closeness
from semantica.benchmarks.quality.metrics.bootstrap import LEVEL, Units, interval, means
from semantica.benchmarks.quality.metrics.gaussians import Gaussian
from semantica.benchmarks.quality.metrics.judges import Judge
from semantica.benchmarks.quality.metrics.kernels import Kernel, vendi, vendis
from semantica.benchmarks.quality.metrics.manifolds import DENSITY_K, PRECISION_K, inside, radii, share_reached

# what is measured, in the order of the table; the Frechet and the kernel distance are called by their judge
REAL = "real pictures"
SHARES = ("precision", "recall", "coverage", "nearest_class", "copies")
ORDER = (
    "fid", "kid", "fd", "kd", "precision", "recall", "density", "coverage", "vendi", "vendi_per_condition",
    "diversity", "condition_similarity", "nearest_class", "copies",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """N pictures to be judged.

    described: features float32 `[N, F]`.
    classes: `[N]` of each one's condition.
    units: `[N]` what is drawn again for intervals, numbered from 0: the condition.
    sets: `[N]` which ones are variations of one another.
    conditions: `[N]` place of each one's condition among the real pictures, -1 where none is known.
    own: places of real pictures that this row shows: it is judged against the others.
    """

    described: np.ndarray
    classes: np.ndarray
    units: np.ndarray
    sets: np.ndarray
    conditions: np.ndarray
    own: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class Reference:
    """The real pictures that a row is compared to, with what does not depend on the row."""

    def __init__(self, described: np.ndarray, kept: np.ndarray):
        self.kept, self.features = kept, described[kept]
        several = len(kept) > 1
        self.gaussian = Gaussian(self.features) if several else None
        self.kernel = Kernel(self.features) if several else None
        self.balls = radii(self.features, (PRECISION_K, DENSITY_K)) if len(kept) > DENSITY_K else None


class Jury:
    """Judges rows in a judge's space, where the real pictures lie at `described [M, F]`, of `groups [M]`.

    replicates: draws for an interval.
    """

    def __init__(self, judge: Judge, described: np.ndarray, groups: np.ndarray, replicates: int, seed: int):
        self.judge, self.described, self.groups = judge, described, np.asarray(groups)
        self.compared = judge.compared(described)
        self.replicates, self.seed = replicates, seed
        self.spread = features.pairwise_mean_distance(self.compared, self.groups)
        self.whole = Reference(described, np.arange(len(described)))

    def figures(self, row: Row) -> dict[str, dict[str, float | None]]:
        """Metric -> value, low and high; what a row has too few pictures for, or too few conditions, is not there."""
        count, units = len(row.described), Units(row.units)
        reference = self.whole
        if len(row.own):
            reference = Reference(self.described, np.setdiff1d(self.whole.kept, row.own))
        made, compared = row.described, self.judge.compared(row.described)
        # the set as it is, then as it is drawn again
        draws = np.concatenate([np.ones((1, count), np.int64), units.draws(self.replicates, self.seed)])
        found: dict[str, np.ndarray] = {}
        if count > 1 and reference.gaussian:
            found[self.judge.distance] = reference.gaussian.distances(made, draws)
            found[self.judge.distance.replace("f", "k")] = reference.kernel.distances(made, draws)
        if count > PRECISION_K and reference.balls:
            within = inside(made, reference.features, reference.balls)
            found["precision"] = means(within.precise.astype(np.float64), draws)
            found["recall"] = share_reached(within.recalled, draws)
            found["density"] = means(within.dense, draws)
            found["coverage"] = share_reached(within.covering, draws)
        found["vendi"] = vendis(compared, draws)
        members = closeness.members_of(row.sets)
        if any(len(places) > 1 for places in members):
            each = np.empty(count)
            for places in members:
                each[places] = vendi(compared[places])
            found["vendi_per_condition"] = means(each, draws)
            found["diversity"] = means(closeness.spreads(compared, row.sets) / self.spread, draws)
        known = row.conditions >= 0
        if known.all():
            found["condition_similarity"] = means(closeness.similarity(made, self.described[row.conditions]), draws)
        near = self.compared[reference.kept]
        if len(near) > 1:
            # a condition that is no picture of this reference needs not be left out
            left_out = np.searchsorted(reference.kept, row.conditions).clip(0, len(near) - 1)
            left_out = np.where(known & (reference.kept[left_out] == row.conditions), left_out, -1)
            right = closeness.of_class(compared, row.classes, near, self.groups[reference.kept], left_out)
            found["nearest_class"] = means(right.astype(np.float64), draws)
            found["copies"] = means(closeness.copied(compared, near).astype(np.float64), draws)
        return {name: self.figure(name, found[name], units.count) for name in ORDER if name in found}

    def figure(self, name: str, found: np.ndarray, units: int) -> dict[str, float | None]:
        """The first value, its interval and standard error by the others; one unit says nothing of its spread."""
        # one picture drawn again and again has no kernel distance
        value, replicates = float(found[0]), found[1:][~np.isnan(found[1:])]
        if units < 2:
            return {"value": value, "low": None, "high": None, "error": None}
        low, high = interval(value, replicates)
        if name in SHARES:
            low, high = max(low, 0.0), min(high, 1.0)
        elif name == self.judge.distance:
            # 0 but for rounding is the least that there is
            low = max(low, min(value, 0.0))
        return {"value": value, "low": low, "high": high, "error": float(replicates.std(ddof=1))}

    def table(self, rows: dict[str, Row]) -> dict:
        """The figures of all rows, and beside each Frechet distance what few pictures alone have added to it.

        With fewer pictures than features and one more a covariance is singular: `biased`. `of_real` is the distance of
        real pictures, `real_pictures` of them, to the other real ones, which has the same bias and no other cause.
        """
        figures = {name: self.figures(row) for name, row in rows.items()}
        distance, width = self.judge.distance, self.described.shape[1]
        real = figures.get(REAL, {}).get(distance)
        for name, row in rows.items():
            if distance in figures[name]:
                figures[name][distance] |= {
                    "pictures": len(row.described),
                    "biased": min(len(row.described), len(self.described) - len(row.own)) < width + 1,
                    "of_real": real["value"] if real else None,
                    "real_pictures": len(rows[REAL].described) if real else 0,
                }
        return {
            "judge": self.judge.name, "judge_identity": self.judge.identity, "features": width,
            "real_pictures": len(self.described), "level": LEVEL, "replicates": self.replicates, "rows": figures,
        }  # fmt: skip
