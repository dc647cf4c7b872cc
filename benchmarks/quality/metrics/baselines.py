"""What stands beside every figure: copies of the conditions, what ignores them, other real pictures, and noise."""

from dataclasses import dataclass

import numpy as np

from semantica.benchmarks.quality.metrics.jury import Row

# of a class, and of all: real pictures are judged against the rest, which must be as many
MOST = 0.5


@dataclass(frozen=True)
class Asked:
    """Conditions and how many pictures were made of each.

    places, classes: `[C]` of the conditions, among the real pictures.
    of: `[N]` the condition of each made picture, from 0 to C - 1.
    """

    places: np.ndarray
    classes: np.ndarray
    of: np.ndarray

    def row(self, described: np.ndarray) -> Row:
        """Pictures that were made of these conditions, as features `[N, F]`."""
        return Row(described, self.classes[self.of], self.of, self.of, self.places[self.of])

    def copies(self, gallery: np.ndarray) -> Row:
        """Each condition in the place of each of its variations. gallery: features of the real pictures `[M, F]`."""
        return self.row(gallery[self.places[self.of]])

    def others(self, gallery: np.ndarray, groups: np.ndarray, seed: int) -> Row | None:
        """Other real pictures of each condition's class, none of them twice, at most half of a class; None if none."""
        rng, mine = np.random.default_rng(seed), [[] for _ in self.places]
        most = np.bincount(self.of, minlength=len(self.places))
        for label in np.unique(self.classes):
            members = np.flatnonzero(groups == label)
            free = rng.permutation(np.setdiff1d(members, self.places))[: int(MOST * len(members))]
            take_turns(free, np.flatnonzero(self.classes == label), most, mine)
        return self._real(gallery, mine)

    def any(self, gallery: np.ndarray, seed: int) -> Row | None:
        """Real pictures of any class, which ignore conditions: none twice, at most half of all; None if none."""
        rng, mine = np.random.default_rng(seed), [[] for _ in self.places]
        free = rng.permutation(np.setdiff1d(np.arange(len(gallery)), self.places))[: int(MOST * len(gallery))]
        take_turns(free, np.arange(len(self.places)), np.bincount(self.of, minlength=len(self.places)), mine)
        return self._real(gallery, mine)

    def _real(self, gallery: np.ndarray, mine: list[list[int]]) -> Row | None:
        """Real pictures are drawn for each condition, independently: each is a unit of its own."""
        own = np.array([place for places in mine for place in places], np.int64)
        of = np.repeat(np.arange(len(mine)), [len(places) for places in mine])
        if not len(own):
            return None
        return Row(gallery[own], self.classes[of], np.arange(len(own)), of, self.places[of], own)


def take_turns(free: np.ndarray, conditions: np.ndarray, most: np.ndarray, mine: list[list[int]]) -> None:
    """Give the free places to the conditions, one at a time, until each has as many as it may or none is left."""
    left = list(free)
    while left:
        wanting = [c for c in conditions if len(mine[c]) < most[c]]
        if not wanting:
            return
        for c in wanting[: len(left)]:
            mine[c].append(int(left.pop()))


def noise(count: int, size: int, seed: int) -> np.ndarray:
    """Pictures of uniform noise, uint8 `[count, size, size, 3]`."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
