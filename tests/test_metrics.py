"""Metrics of sets against other implementations, closed forms and definitions, and intervals against their coverage."""

import numpy as np
import pytest

from semantica.benchmarks.quality.metrics.bootstrap import Units, interval, means
from semantica.benchmarks.quality.metrics.closeness import copied, of_class, similarity, spreads
from semantica.benchmarks.quality.metrics.gaussians import Gaussian, frechet
from semantica.benchmarks.quality.metrics.kernels import Kernel, vendi, vendis
from semantica.benchmarks.quality.metrics.manifolds import distances, inside, precision_recall, share_reached


def clouds(count, others, width, seed=0):
    """Two sets of correlated float32 features, as an encoder's are: far from 0, of very different scales."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) * np.geomspace(1, 1e-2, width)
    offset = 5 * rng.random(width)
    a = rng.standard_normal((count, width)) @ mix + offset
    b = 1.2 * rng.standard_normal((others, width)) @ mix + offset + 0.1
    return a.astype(np.float32), b.astype(np.float32)


def reference_frechet(a, b):
    """Of the definition, by a matrix square root of another library."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * root)


@pytest.mark.parametrize(("count", "others", "width"), [(300, 400, 24), (40, 300, 64), (65, 65, 64)])
def test_frechet_is_that_of_a_matrix_square_root(count, others, width):
    a, b = clouds(count, others, width)
    assert frechet(a, b) == pytest.approx(reference_frechet(a, b), rel=1e-4)


def test_frechet_of_long_gaussians_is_the_closed_form():
    rng = np.random.default_rng(1)
    # samples whose mean and covariance are exact: sqrt(n - 1) times orthonormal columns that sum to 0
    columns = np.linalg.qr(np.c_[np.ones(200), rng.standard_normal((200, 16))])[0][:, 1:] * np.sqrt(199)
    turn = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    s, t, away = rng.random(16) + 0.1, rng.random(16) + 0.1, rng.standard_normal(16)
    a, b = (columns * s) @ turn, (columns * t + away) @ turn
    # covariances that commute: the squares of the deviations apart
    assert frechet(a, b) == pytest.approx(np.square(away).sum() + np.square(s - t).sum(), rel=1e-9)


def test_a_set_drawn_twice_is_that_set():
    a, b = clouds(30, 200, 48)
    draws = np.random.default_rng(0).integers(0, 3, (4, 30))
    for width in (8, 48):
        reference = Gaussian(b[:, :width])
        expected = [reference.distance(np.repeat(a[:, :width], times, 0)) for times in draws]
        assert reference.distances(a[:, :width], draws) == pytest.approx(expected, rel=1e-6)
    assert vendis(a, draws) == pytest.approx([vendi(np.repeat(a, times, 0)) for times in draws], rel=1e-9)


def test_precision_recall_density_and_coverage_are_those_of_brute_force():
    a, b = clouds(70, 90, 5)
    truth = [np.linalg.norm(x[:, None].astype(np.float64) - y[None], axis=-1) for x, y in ((a, b), (a, a), (b, b))]
    apart, in_a, in_b = truth
    # the nearest of a point's own kind is itself
    of_a, of_b, of_b5 = np.sort(in_a, 1)[:, 3], np.sort(in_b, 1)[:, 3], np.sort(in_b, 1)[:, 5]
    precision = np.mean([any(apart[i, j] <= of_b[j] for j in range(90)) for i in range(70)])
    recall = np.mean([any(apart[i, j] <= of_a[i] for i in range(70)) for j in range(90)])
    density = sum(apart[i, j] <= of_b5[j] for i in range(70) for j in range(90)) / (5 * 70)
    coverage = np.mean([any(apart[i, j] <= of_b5[j] for i in range(70)) for j in range(90)])
    assert 0.1 < precision < 1 and 0.1 < recall < 1 and 0.1 < coverage < 1
    found, every = inside(a, b), np.ones((1, 70), np.int64)
    assert precision_recall(a, b) == (precision, recall)
    assert (found.precise.mean(), found.dense.mean()) == (precision, pytest.approx(density, rel=1e-12))
    assert share_reached(found.recalled, every) == [recall] and share_reached(found.covering, every) == [coverage]


def test_copies_lie_where_their_originals_do():
    a, b = clouds(20, 60, 40)
    assert (np.diag(distances(b, b)) == 0).all()
    copies = np.repeat(b[:10], 5, 0)
    found, every = inside(copies, b), np.ones((1, 50), np.int64)
    # of five equal pictures the third neighbour lies at 0: only the ten originals are recalled, all of them
    assert found.precise.all() and share_reached(found.recalled, every) == [10 / 60]
    assert copied(copies, b).all() and copied(b[:30], b[30:]).mean() < 0.05 and copied(a, b).mean() < 0.1
    assert similarity(copies, copies) == pytest.approx(1) and (spreads(copies, np.repeat(np.arange(10), 5)) == 0).all()


def test_kid_is_its_definition():
    a, b = clouds(13, 17, 6)

    def k(x, y):
        return (float(np.dot(x.astype(np.float64), y.astype(np.float64))) / 6 + 1) ** 3

    def pairs(x):
        return np.mean([k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j])

    expected = pairs(a) + pairs(b) - 2 * np.mean([k(p, q) for p in a for q in b])
    assert Kernel(b).distance(a) == pytest.approx(expected, rel=1e-9)
    # of one picture drawn twice there is none
    found = Kernel(b).distances(a[:2], np.array([[1, 1], [2, 0], [0, 2]]))
    assert np.isnan(found).tolist() == [False, True, True] and found[0] == Kernel(b).distance(a[:2])


def test_kid_is_unbiased_and_its_interval_covers():
    """Many small samples of one distribution: their mean is 0 within its own error, and so are their intervals."""
    rng = np.random.default_rng(0)
    reference, covered, found = Kernel(rng.standard_normal((4000, 4))), 0, []
    for trial in range(120):
        made = rng.standard_normal((40, 4))
        found.append(reference.distance(made))
        low, high = interval(found[-1], reference.distances(made, Units(np.arange(40)).draws(100, trial)))
        covered += low <= 0 <= high
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error and error < 0.05
    assert 0.85 <= covered / 120 <= 1


def test_vendi_of_equal_and_of_orthogonal_pictures():
    assert vendi(np.ones((7, 3))) == pytest.approx(1) and vendi(3 * np.eye(7)) == pytest.approx(7)
    # two pictures of cosine c: eigenvalues (1 + c) / 2 and (1 - c) / 2
    c, pair = 0.6, np.array([[1, 0], [0.6, 0.8]])
    p = np.array([1 + c, 1 - c]) / 2
    assert vendi(pair) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert vendi(np.repeat(np.eye(4), 5, 0)) == pytest.approx(4)


def test_intervals_over_conditions_cover_a_known_mean_and_those_over_samples_do_not():
    """Variations of a condition share most of their variance, so that there are as many facts as conditions."""
    rng, truth, trials = np.random.default_rng(0), 0.3, 300
    of = np.repeat(np.arange(30), 4)
    covered = {"conditions": 0, "samples": 0}
    for trial in range(trials):
        values = truth + rng.standard_normal(30)[of] + 0.3 * rng.standard_normal(120)
        for name, units in (("conditions", Units(of)), ("samples", Units(np.arange(120)))):
            low, high = interval(values.mean(), means(values, units.draws(200, trial)))
            covered[name] += low <= truth <= high
    assert 0.90 <= covered["conditions"] / trials <= 0.98 and covered["samples"] / trials < 0.8


def test_the_interval_of_a_frechet_distance_covers_what_few_pictures_give():
    """Biased as it is, it is the mean figure of as many pictures that the interval is for."""
    rng = np.random.default_rng(0)
    reference, of = Gaussian(rng.standard_normal((2000, 4))), np.repeat(np.arange(40), 2)

    def draw():
        return 1.3 * (rng.standard_normal((40, 4))[of] + 0.5 * rng.standard_normal((80, 4))) + 0.4

    mean = np.mean([reference.distance(draw()) for _ in range(1000)])
    covered = 0
    for trial in range(120):
        made = draw()
        low, high = interval(reference.distance(made), reference.distances(made, Units(of).draws(100, trial)))
        covered += low <= mean <= high
    assert 0.86 <= covered / 120 <= 1


def test_units_are_drawn_whole():
    of = np.array([0, 1, 1, 2])
    draws = Units(of).draws(50, 3)
    assert (draws[:, 1] == draws[:, 2]).all() and (draws[:, [0, 1, 3]].sum(1) == 3).all()
    values = np.array([1.0, np.nan, 2.0, 3.0])
    assert means(values, np.array([[1, 1, 1, 1], [0, 5, 0, 2]])) == pytest.approx([2.0, 3.0])


def test_nearest_class_leaves_the_condition_out():
    gallery, groups = np.array([[0.0], [1.0], [3.0]]), np.array(["a", "b", "b"])
    made, wanted = np.array([[0.1], [0.1]]), np.array(["a", "b"])
    assert of_class(made, wanted, gallery, groups, np.array([-1, 0])).tolist() == [True, True]
