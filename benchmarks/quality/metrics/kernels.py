"""What is said by a matrix of similarities: KID (arXiv 1801.01401) and the Vendi score (arXiv 2210.02410)."""

import numpy as np

from semantica.features import BLOCK, unit


def polynomial(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KID's kernel (x . y / F + 1)^3 `[N, M]` of features `[N, F]`, `[M, F]` in float64."""
    return (a @ b.T / a.shape[1] + 1) ** 3


class Kernel:
    """A reference of features `[M, F]`, M at least 2, whose squared maximum mean discrepancy to others is estimated."""

    def __init__(self, features: np.ndarray):
        self.x = features.astype(np.float64)
        count = len(self.x)
        total = sum(polynomial(self.x[i : i + BLOCK], self.x).sum() for i in range(0, count, BLOCK))
        itself = ((np.square(self.x).sum(1) / self.x.shape[1] + 1) ** 3).sum()
        self.within = (total - itself) / (count * (count - 1))

    def distance(self, features: np.ndarray) -> float:
        """The unbiased estimate (equation 4 of the paper, all pairs of different pictures) to features `[N, F]`."""
        return float(self.distances(features, np.ones((1, len(features)), np.int64))[0])

    def distances(self, features: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """`distance` to each of R sets `[R]`: row i of features `[N, F]` stands `draws[r, i]` times in set r.

        A picture that was drawn twice makes no pair with itself; a set of nothing else has no distance, but nan.
        """
        x, times = features.astype(np.float64), draws.astype(np.float64)
        own = polynomial(x, x)
        np.fill_diagonal(own, 0)
        total = times.sum(1)
        pairs = total**2 - np.square(times).sum(1)
        across = np.concatenate([polynomial(x[i : i + BLOCK], self.x).mean(1) for i in range(0, len(x), BLOCK)])
        apart = np.divide(((times @ own) * times).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
        return apart + self.within - 2 * times @ across / total


def vendi(features: np.ndarray) -> float:
    """How many different pictures there are as it were: exp of the entropy of the eigenvalues of K / N, K the cosines.

    1 for N equal rows of features `[N, F]`, N for orthogonal ones.
    """
    return float(vendis(features, np.ones((1, len(features)), np.int64))[0])


def vendis(features: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """`vendi` of each of R sets `[R]`: row i of features `[N, F]` stands `draws[r, i]` times in set r."""
    x = unit(features.astype(np.float64))
    found = np.empty(len(draws))
    for r, times in enumerate(draws):
        rows = np.flatnonzero(times)
        scaled = x[rows] * np.sqrt(times[rows] / times.sum())[:, None]
        # both products have the same eigenvalues but for zeros
        values = np.linalg.eigvalsh(scaled @ scaled.T if len(rows) < x.shape[1] else scaled.T @ scaled)
        values = values[values > 1e-12]
        found[r] = np.exp(-(values * np.log(values)).sum())
    return found
