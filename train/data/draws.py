"""What a draw is, and where its randomness comes from: pure functions of (seed, purpose, place)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# how samples are drawn; it is counted up where the same seed gives other samples. 1 until version 0.1: noise by numpy's
# ziggurat, crops at fractions of a pixel
DRAWS = 2
# how a source refers to a picture: a path below its root, or a number
Ref = str | int
# one stream of random numbers per purpose, so that changing one leaves the others as they were
ORDER, PAIR, LEVEL, NOISE, DROP, SPLIT, CYCLE, CAPTION = range(8)


@dataclass(frozen=True)
class View:
    """A picture as one sample shows it.

    crop: (x, y, zoom), each uniform in [0, 1).
    """

    ref: Ref
    flip: bool
    crop: tuple[float, float, float]


@dataclass(frozen=True)
class Pair:
    """One draw: a target and the pictures that it is conditioned on. group: the label, or the page's number."""

    group: Ref
    target: View
    conditions: tuple[View, ...]


def generator(seed: int, *key: int) -> np.random.Generator:
    """Philox (Salmon et al., SC 2011), a fresh independent stream for each (seed, *key) of non-negative integers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


# of the epochs on either side of a boundary: every worker keeps them, of millions of pictures
@lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the targets in one epoch: a permutation of `range(count)`, in as few bytes as it takes."""
    return generator(seed, ORDER, epoch).permutation(count).astype(np.min_scalar_type(count))


@lru_cache(maxsize=4)
def strata(global_batch: int, seed: int, batch: int) -> np.ndarray:
    """Which noise-level stratum each sample of one global batch takes: a permutation of `range(global_batch)`."""
    return generator(seed, LEVEL, batch).permutation(global_batch)
