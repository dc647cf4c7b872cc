"""Frechet distance between Gaussians: FID over Inception's features (arXiv 1706.08500), FD over those of others."""

import numpy as np


class Gaussian:
    """Mean and covariance of features `[N, F]`, N at least 2, to which others are compared; float64."""

    def __init__(self, features: np.ndarray):
        x = features.astype(np.float64)
        self.mean = x.mean(0)
        covariance = np.atleast_2d(np.cov(x, rowvar=False))
        self.trace = float(np.trace(covariance))
        values, vectors = np.linalg.eigh(covariance)
        self.root = (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def distance(self, features: np.ndarray) -> float:
        """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) to the Gaussian around features `[N, F]`, N at least 2."""
        return float(self.distances(features, np.ones((1, len(features)), np.int64))[0])

    def distances(self, features: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """`distance` to each of R sets `[R]`: row i of features `[N, F]` stands `draws[r, i]` times in set r."""
        # from the reference's mean, so that a large common offset costs no digits
        x = features.astype(np.float64) - self.mean
        turned = x @ self.root
        squares = np.square(x).sum(1)
        found = np.empty(len(draws))
        for r, times in enumerate(draws):
            rows = np.flatnonzero(times)
            times, total = times[rows].astype(np.float64), times.sum()
            between = np.square(times @ x[rows] / total).sum()
            trace = (times @ squares[rows] - total * between) / (total - 1)
            centred = turned[rows] - times @ turned[rows] / total
            centred *= np.sqrt(times / (total - 1))[:, None]
            # with B = X^T X, tr (A B)^1/2 is the sum of the singular values of X A^1/2, which the smaller product has
            few = len(rows) < centred.shape[1]
            values = np.linalg.eigvalsh(centred @ centred.T if few else centred.T @ centred)
            found[r] = between + self.trace + trace - 2 * np.sqrt(values.clip(0)).sum()
        return found


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians around features `[N, F]` and `[M, F]`.

    Biased upwards for few pictures, most of all for fewer than F + 1: compare figures of equal numbers.
    """
    return Gaussian(b).distance(a)
