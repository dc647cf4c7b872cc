"""One value for each made picture: how near it is to its condition, to a class, to its siblings, to a copy."""

import numpy as np

from semantica.benchmarks.quality.metrics.manifolds import distances, radii
from semantica.features import nearest, unit

# of the distance between real pictures; as Carlini et al. have it (arXiv 2301.13188, section 5.1)
COPY_SHARE = 0.5


def similarity(made: np.ndarray, conditions: np.ndarray) -> np.ndarray:
    """Cosine `[N]` between features `[N, F]` of pictures and of their conditions `[N, F]`."""
    a, b = (unit(x.astype(np.float64)) for x in (made, conditions))
    return (a * b).sum(1)


def of_class(made: np.ndarray, wanted: np.ndarray, gallery: np.ndarray, groups: np.ndarray, left_out: np.ndarray):
    """Whether the nearest of the gallery `[M, F]`, `left_out [N]` (-1: none) apart, is of the wanted group: `[N]`."""
    return groups[nearest(made, gallery, left_out)] == wanted


def spreads(made: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Mean distance `[N]` of each picture to the others of its set; nan where it is alone. `sets [N]`."""
    found = np.full(len(made), np.nan)
    for members in members_of(sets):
        if len(members) > 1:
            apart = np.sqrt(distances(made[members], made[members]))
            found[members] = apart.sum(1) / (len(members) - 1)
    return found


def copied(made: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Whether each picture `[N, F]` is a copy of one of the gallery `[M, F]`, M at least 2: bool `[N]`.

    Its nearest one is then at most `COPY_SHARE` as far as that one's nearest other is: authenticity of Alaa et al.
    (arXiv 2102.08921, section 3.3), where the share is 1 and every second honest picture fails.
    """
    apart = distances(made, gallery)
    found = apart.argmin(1)
    (own,) = radii(gallery, (1,))
    return apart[np.arange(len(made)), found] <= COPY_SHARE**2 * own[found]


def members_of(sets: np.ndarray) -> list[np.ndarray]:
    """The places of each set."""
    _, numbers = np.unique(sets, return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
