"""Two feature spaces that no model was trained with, for judging variations: pure numpy, deterministic.

Pictures of any size are first averaged down to 32x32. Three classical descriptors, compared by Euclidean distance:

- colour: square root of a soft RGB histogram (Swain and Ballard 1991; the square root makes it Hellinger distance);
- silhouette: the background is the median of the border, the foreground what differs from it, cut by Otsu's threshold
  (1979); every connected region is moved to its centroid and scaled by its second moments (Hu 1962), and their mean is
  the descriptor. It knows an object's outline, but not its colour, nor how many there are and where they lie;
- oriented gradients: a coarse HOG (Dalal and Triggs 2005) with a low weight: it tells where things lie, which diversity
  should feel, and keeps the space meaningful on photos, which seldom have a clean silhouette.

The silhouette and the gradients see grey values only, and a light object on dark as they see a dark one on light.
"""

from collections.abc import Callable, Sequence

import numpy as np

SIDE = 32
LUMA = np.array([0.299, 0.587, 0.114])
COLOUR_LEVELS = 4
# the silhouette's grid, and how far it reaches in units of the region's root mean square radius
GRID, REACH = 14, 2.2
# a region counts from this many pixels and this share of the largest one; what is smaller is a speck
SPECK, SPECK_SHARE = 6, 0.3
# with more weight, shapeless blobs in the right places would begin to count as the right shape
CELLS, ORIENTATIONS, GRADIENT_WEIGHT = 4, 8, 0.2
BLOCK = 256


def colour_and_shape(images: np.ndarray) -> np.ndarray:
    """Colour and shape descriptors of pictures uint8 [N, H, W, 3]: float32 [N, 388].

    The colour histogram and the shape descriptor weigh about alike: the right palette with a wrong shape is as far
    away as the right shape with a wrong palette. Raises ValueError on any other kind of array.
    """
    return in_blocks(images, lambda small: np.concatenate([colour_histogram(small), shape(small)], axis=1))


def shape_only(images: np.ndarray) -> np.ndarray:
    """The shape descriptor of pictures uint8 [N, H, W, 3], from grey values only: float32 [N, 324].

    Made for objects on a calm background; of photos in general it says little. Raises ValueError on any other kind of
    array.
    """
    return in_blocks(images, shape)


def nearest(queries: np.ndarray, gallery: np.ndarray, excluded: np.ndarray | None = None) -> np.ndarray:
    """Index [N] of the nearest row of gallery [M, F] for each row of queries [N, F]; the first one of equals.

    Exact: Euclidean in float64, block by block. `excluded [N]` names one row of the gallery that is not an answer for
    each query, -1 for none: `np.arange(M)` with the gallery as queries is leave-one-out. Raises ValueError when no
    candidate is left, or for another number of exclusions than queries.
    """
    if len(gallery) < 1 + (excluded is not None):
        raise ValueError(f"the nearest of {len(gallery)} pictures is asked for: give at least one that is not excluded")
    if excluded is not None and len(excluded) != len(queries):
        raise ValueError(f"{len(excluded)} exclusions for {len(queries)} queries: give one for each")
    points = gallery.astype(np.float64)
    lengths = (points**2).sum(1)
    found = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), BLOCK):
        # the query's own length is the same for all candidates
        distance = lengths - 2 * queries[start : start + BLOCK].astype(np.float64) @ points.T
        if excluded is not None:
            places = excluded[start : start + BLOCK]
            rows = np.flatnonzero(places >= 0)
            distance[rows, places[rows]] = np.inf
        found[start : start + BLOCK] = distance.argmin(1)
    return found


def pairwise_mean_distance(features: np.ndarray, groups: Sequence[object] | np.ndarray) -> float:
    """Mean Euclidean distance between two different rows of a group, averaged over the groups.

    `features [N, F]`, `groups [N]` one label per row; groups of one row have no pair and are left out. Raises
    ValueError when no group has a pair.
    """
    labels = np.asarray(groups)
    means = []
    for label in np.unique(labels):
        rows = features[labels == label].astype(np.float64)
        if len(rows) > 1:
            total = sum(np.linalg.norm(rows[i + 1 :] - row, axis=1).sum() for i, row in enumerate(rows))
            means.append(total / (len(rows) * (len(rows) - 1) / 2))
    if not means:
        raise ValueError(f"no group of {len(labels)} pictures has two of them: there is no distance to average")
    return float(np.mean(means))


def in_blocks(images: np.ndarray, describe: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Averages pictures down to float64 [n, 32, 32, 3] in [0, 1] and describes them, a bounded number at a time."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape[1:]:
        raise ValueError(f"pictures must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    rows, columns = area_weights(images.shape[1]), area_weights(images.shape[2])
    described = []
    # one pass even over no pictures, so that the answer has its width
    for start in range(0, max(len(images), 1), BLOCK):
        block = images[start : start + BLOCK] / 255
        described.append(describe(np.einsum("yh,nhwc,xw->nyxc", rows, block, columns, optimize=True)))
    return np.concatenate(described).astype(np.float32)


def area_weights(size: int) -> np.ndarray:
    """Matrix [32, size] whose rows average the source pixels that each target pixel covers."""
    edges = np.linspace(0, size, SIDE + 1)[:, None]
    source = np.arange(size)
    overlap = np.minimum(edges[1:], source + 1) - np.maximum(edges[:-1], source)
    return np.clip(overlap, 0, None) * SIDE / size


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [N, F] scaled to length 1; zero rows stay zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def colour_histogram(small: np.ndarray) -> np.ndarray:
    """Square root of the RGB histogram [N, 64], trilinear between 4 levels a channel: rows of length 1."""
    levels = np.arange(COLOUR_LEVELS)
    soft = np.clip(1 - np.abs(small.reshape(len(small), SIDE**2, 3, 1) * (COLOUR_LEVELS - 1) - levels), 0, None)
    histogram = np.einsum("npi,npj,npk->nijk", soft[:, :, 0], soft[:, :, 1], soft[:, :, 2], optimize=True)
    return np.sqrt(histogram.reshape(len(small), COLOUR_LEVELS**3) / SIDE**2)


def shape(small: np.ndarray) -> np.ndarray:
    """Silhouette and weighted gradients [N, 324] of pictures [N, 32, 32, 3]."""
    grey = smooth(small @ LUMA)
    return np.concatenate([silhouette(foreground(grey)), GRADIENT_WEIGHT * gradients(grey)], axis=1)


def smooth(maps: np.ndarray, sigma: float = 0.6) -> np.ndarray:
    """Gaussian blur of maps [N, 32, 32], borders repeated: takes a little pixel noise off."""
    kernel = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(maps, ((0, 0), (2, 2), (2, 2)), mode="edge")
    rows = sum(weight * padded[:, i : i + SIDE] for i, weight in enumerate(kernel))
    return sum(weight * rows[:, :, i : i + SIDE] for i, weight in enumerate(kernel))


def gradients(grey: np.ndarray) -> np.ndarray:
    """HOG [N, 128] over 4x4 overlapping cells, 8 orientations without sign: rows of length 1, clipped at 0.2."""
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    dx, dy = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2], padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    turn = np.arctan2(dy, dx)[..., None] / np.pi * ORIENTATIONS - np.arange(ORIENTATIONS)
    # distance on the circle of orientations, so that a pixel is shared between the two nearest bins
    apart = np.abs((turn + ORIENTATIONS / 2) % ORIENTATIONS - ORIENTATIONS / 2)
    votes = np.hypot(dx, dy)[..., None] * np.clip(1 - apart, 0, None)
    cell = SIDE / CELLS
    centres = (np.arange(CELLS)[:, None] + 0.5) * cell
    tent = np.clip(1 - np.abs(np.arange(SIDE) + 0.5 - centres) / cell, 0, None)
    cells = np.einsum("ay,nyxk,bx->nabk", tent, votes, tent, optimize=True)
    return unit(np.minimum(unit(cells.reshape(len(grey), CELLS**2 * ORIENTATIONS)), 0.2))


def foreground(grey: np.ndarray) -> np.ndarray:
    """Soft foreground [N, 32, 32] in [0, 1]: the distance to the background grey, 0.5 at its Otsu threshold."""
    border = np.concatenate([grey[:, 0], grey[:, -1], grey[:, 1:-1, 0], grey[:, 1:-1, -1]], axis=1)
    distance = np.abs(grey - np.median(border, axis=1)[:, None, None])
    threshold = otsu(distance.reshape(len(grey), SIDE**2))[:, None, None]
    return np.clip(distance / np.maximum(2 * threshold, 1e-3), 0, 1)


def otsu(values: np.ndarray) -> np.ndarray:
    """Otsu's threshold [N] of each row of values [N, P]: half-way between the two means that it separates best."""
    ordered = np.sort(values, axis=1)
    size = values.shape[1]
    below = np.arange(1, size)
    sums = np.cumsum(ordered, axis=1)
    low, high = sums[:, :-1] / below, (sums[:, -1:] - sums[:, :-1]) / (size - below)
    cut = np.argmax(below * (size - below) * (high - low) ** 2, axis=1)
    row = np.arange(len(values))
    return (low[row, cut] + high[row, cut]) / 2


def regions(mask: np.ndarray) -> np.ndarray:
    """Labels [N, 32, 32] of the 4-connected regions of bool masks, 0 outside; each spreads its largest index."""
    labels = np.where(mask, np.arange(1, SIDE**2 + 1).reshape(SIDE, SIDE), 0)
    while True:
        spread = np.where(mask, neighbours(labels), 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def neighbours(maps: np.ndarray) -> np.ndarray:
    """The largest of each value of maps [N, 32, 32] and its four neighbours."""
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    across = np.maximum(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    return np.maximum.reduce([maps, across, padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]])


def silhouette(soft: np.ndarray) -> np.ndarray:
    """The mean normalised silhouette [N, 196] of the regions of soft foregrounds: rows of length 1, 0 if no region."""
    labels = regions(soft > 0.5)
    total = np.zeros((len(soft), GRID, GRID))
    y, x = np.mgrid[:SIDE, :SIDE]
    steps = np.linspace(-REACH, REACH, GRID)
    for n, label in enumerate(labels):
        names, areas = np.unique(label[label > 0], return_counts=True)
        names = names[areas >= max(SPECK, SPECK_SHARE * areas.max(initial=0))]
        cores = label == names[:, None, None]
        # one pixel further out, for the soft edge, but never into another region
        edges = neighbours(cores) & ((label == 0) | cores)
        for weight in edges * soft[n]:
            area = weight.sum()
            row, column = (weight * y).sum() / area, (weight * x).sum() / area
            radius = np.sqrt((weight * ((y - row) ** 2 + (x - column) ** 2)).sum() / area)
            total[n] += area * sample(weight, row + radius * steps, column + radius * steps)
    return unit(total.reshape(len(soft), GRID**2))


def sample(field: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear values [len(rows), len(columns)] of a field [32, 32], 0 outside it."""
    by_row = np.clip(1 - np.abs(rows[:, None] - np.arange(SIDE)), 0, None)
    by_column = np.clip(1 - np.abs(columns[:, None] - np.arange(SIDE)), 0, None)
    return by_row @ field @ by_column.T
