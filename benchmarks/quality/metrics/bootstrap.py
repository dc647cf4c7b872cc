"""Intervals: conditions are drawn again, with all their variations, since variations of one condition are dependent."""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Units:
    """What is drawn again. `of [N]` is the unit of each sample, numbered from 0; samples of a unit come together."""

    of: np.ndarray

    @property
    def count(self) -> int:
        return int(self.of.max()) + 1

    def draws(self, replicates: int, seed: int) -> np.ndarray:
        """How often each sample is in each replicate: `[R, N]`, int64. Efron and Tibshirani 1993, chapter 8."""
        rng = np.random.default_rng(seed)
        shares = np.full(self.count, 1 / self.count)
        return rng.multinomial(self.count, shares, size=replicates)[:, self.of]


def interval(value: float, replicates: np.ndarray) -> tuple[float, float]:
    """The interval of `LEVEL` around a figure: the percentiles of its replicates `[R]`, moved by their mean's offset.

    A replicate holds some conditions twice, which biases what is no mean (a Frechet distance, coverage, the Vendi
    score): its spread is that of the figure, its place is not. Of a mean the offset is zero but for chance, and this
    is the percentile interval.
    """
    tails = (1 - LEVEL) / 2
    low, high = np.quantile(replicates, (tails, 1 - tails))
    offset = value - replicates.mean()
    # a figure lies in its interval, however skewed the replicates are
    return float(min(low + offset, value)), float(max(high + offset, value))


def means(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The mean `[R]` of one value per sample `[N]` in each replicate `[R, N]`; nan values are left out."""
    known = ~np.isnan(values)
    return draws[:, known] @ values[known] / np.maximum(draws[:, known].sum(1), 1)
