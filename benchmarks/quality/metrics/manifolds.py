"""Which part of a set lies in another: precision, recall (arXiv 1904.06991), density, coverage (2002.09797)."""

from dataclasses import dataclass

import numpy as np

from semantica.features import BLOCK

# the neighbours that the papers count
PRECISION_K, DENSITY_K = 3, 5


@dataclass(frozen=True)
class Inside:
    """For N made and M real pictures: what lies in whose neighbourhood.

    precise: `[N]` whether each made one lies in a real one's ball of `PRECISION_K`; its mean is precision.
    dense: `[N]` in how many real ones' balls of `DENSITY_K`, over that number; its mean is density.
    recalled: `[N, M]` whether made one i's ball of `PRECISION_K` holds real one j; any over i, mean over j is recall.
    covering: `[N, M]` whether real one j's ball of `DENSITY_K` holds made one i; any over i, mean over j is coverage.
    """

    precise: np.ndarray
    dense: np.ndarray
    recalled: np.ndarray
    covering: np.ndarray


def inside(made: np.ndarray, real: np.ndarray, of_real: list[np.ndarray] | None = None) -> Inside:
    """Compare features `[N, F]`, N above `PRECISION_K`, with `[M, F]`, M above `DENSITY_K`.

    of_real: `radii` of the real ones for both k, where they are known.
    """
    apart = distances(made, real)
    precise, dense = of_real or radii(real, (PRECISION_K, DENSITY_K))
    (own,) = radii(made, (PRECISION_K,))
    covering = apart <= dense
    return Inside((apart <= precise).any(1), covering.sum(1) / DENSITY_K, apart <= own[:, None], covering)


def share_reached(within: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Recall or coverage `[R]` of the made ones that are in each replicate `[R, N]`, given `within [N, M]`.

    The neighbourhoods stay those of the whole sets.
    """
    reached = (draws > 0).astype(np.float32) @ within.astype(np.float32)
    return (reached > 0.5).mean(1)


def precision_recall(made: np.ndarray, real: np.ndarray, k: int = PRECISION_K) -> tuple[float, float]:
    """Share of what is made that lies among what is real, and the other way round.

    A point lies among others where it is nearer to one of them than that one's k-th neighbour of its own kind.
    """
    apart = distances(made, real)
    (of_real,), (of_made,) = radii(real, (k,)), radii(made, (k,))
    return float((apart <= of_real).any(1).mean()), float((apart <= of_made[:, None]).any(0).mean())


def radii(points: np.ndarray, ks: tuple[int, ...]) -> list[np.ndarray]:
    """Squared distance `[N]` of each point to its k-th neighbour, for each k."""
    own = distances(points, points)
    np.fill_diagonal(own, np.inf)
    ordered = np.partition(own, [k - 1 for k in ks], axis=1)
    return [ordered[:, k - 1].copy() for k in ks]


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances `[N, M]`, in float64; 0 where they are below the rounding of float32 features."""
    b = b.astype(np.float64)
    lengths = np.square(b).sum(1)
    made = np.empty((len(a), len(b)))
    for start in range(0, len(a), BLOCK):
        block = a[start : start + BLOCK].astype(np.float64)
        both = np.square(block).sum(1)[:, None] + lengths
        apart = both - 2 * block @ b.T
        # a copy lies where its original does, in a ball of radius 0 too
        made[start : start + BLOCK] = np.where(apart < 1e-12 * both, 0, apart)
    return made
