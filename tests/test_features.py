"""The two feature spaces: ceilings on real held-out pictures, and drawn counterexamples that must not pass."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from semantica import features
from semantica.benchmarks.quality import web


def rng(*key):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Gallery:
    """The held-out pictures with, for each, its group, shape and palette, and both descriptors."""

    def __init__(self, folder):
        table = json.loads((folder / "attributes.json").read_text())
        paths = sorted(folder.glob("val/*/*.png"))
        self.images = np.stack([np.asarray(Image.open(path)) for path in paths])
        self.group = np.array([path.parent.name for path in paths])
        self.shape = np.array([table[name]["shape"] for name in self.group])
        self.palette = np.array([table[name]["palette"] for name in self.group])
        self.full, self.outline = features.colour_and_shape(self.images), features.shape_only(self.images)

    def on_topic(self, images, shapes, palettes):
        found = features.nearest(features.colour_and_shape(images), self.full)
        return np.mean((self.shape[found] == shapes) & (self.palette[found] == palettes))

    def right_shape(self, images, shapes):
        return np.mean(self.shape[features.nearest(features.shape_only(images), self.outline)] == shapes)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "web"
    web.draw_web(out, groups=1)
    return Gallery(out)


def variants(change, repeats=4):
    """Pictures of every held-out group after `change(group, n)`, beside the shapes and palettes of the groups."""
    groups = [group for group in web.held_out_groups() for _ in range(repeats)]
    images = [web.draw_image(change(g, n), n % 12, rng(7, n)) for n, g in enumerate(groups)]
    return np.stack(images), np.array([g.shape for g in groups]), np.array([g.palette for g in groups])


def degraded(images, blur, noise):
    soft = np.stack([np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(blur)), np.float64) for i in images])
    return np.clip(np.rint(soft + noise * rng(5).standard_normal(soft.shape)), 0, 255).astype(np.uint8)


def test_leave_one_out_on_real_pictures(held_out):
    own = features.nearest(held_out.full, held_out.full, np.arange(len(held_out.full)))
    assert np.mean(held_out.group[own] == held_out.group) >= 0.99
    own = features.nearest(held_out.outline, held_out.outline, np.arange(len(held_out.outline)))
    assert np.mean(held_out.shape[own] == held_out.shape) >= 0.99


def test_shape_is_found_among_other_groups_only(held_out):
    # no candidate shares palette, count, layout and texture with the query: nothing but the shape can help
    right = []
    for group in np.unique(held_out.group):
        mine = held_out.group == group
        found = features.nearest(held_out.outline[mine], held_out.outline[~mine])
        right.append(np.mean(held_out.shape[~mine][found] == held_out.shape[mine]))
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize(("blur", "noise", "topic", "shape"), [(0.7, 8, 0.98, 0.98), (1.3, 16, 0.95, 0.93)])
def test_blur_and_noise_cost_little(held_out, blur, noise, topic, shape):
    images = degraded(held_out.images, blur, noise)
    assert held_out.on_topic(images, held_out.shape, held_out.palette) >= topic
    assert held_out.right_shape(images, held_out.shape) >= shape


def test_shape_fades_to_chance_when_the_picture_does(held_out):
    rates = [held_out.right_shape(degraded(held_out.images, blur, 0), held_out.shape) for blur in (0.7, 2, 4)]
    assert rates[0] > rates[1] + 0.05 > rates[2] + 0.2 and rates[2] < 0.5
    noise = rng(1).integers(0, 256, held_out.images.shape).astype(np.uint8)
    assert held_out.right_shape(noise, held_out.shape) < 0.35


def test_right_palette_with_another_held_out_shape_is_off_topic(held_out):
    others = web.HELD_OUT_SHAPES
    # the four repeats of a group go through the other three shapes
    images, shapes, palettes = variants(lambda g, n: replace(g, shape=others[(others.index(g.shape) + 1 + n % 3) % 4]))
    assert held_out.on_topic(images, shapes, palettes) <= 0.02
    assert held_out.right_shape(images, shapes) <= 0.02


def test_right_shape_with_another_held_out_palette_is_off_topic(held_out):
    others = web.HELD_OUT_PALETTES
    images, shapes, palettes = variants(
        lambda g, n: replace(g, palette=others[(others.index(g.palette) + 1 + n % 3) % 4])
    )
    assert held_out.on_topic(images, shapes, palettes) <= 0.02
    assert held_out.right_shape(images, shapes) >= 0.98


@pytest.mark.parametrize("shape", list(web.OUTLINES)[4:])
def test_a_shape_from_training_is_on_topic_no_more_than_by_chance(held_out, shape):
    # the palette and the count are the group's own: only the outline is wrong
    images, shapes, palettes = variants(lambda g, n: replace(g, shape=shape))
    assert held_out.on_topic(images, shapes, palettes) <= 0.4
    assert held_out.right_shape(images, shapes) <= 0.4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_count_layout_and_texture_do_not_hide_the_shape(held_out, count):
    images, shapes, palettes = variants(lambda g, n: replace(g, count=count, texture=web.TEXTURES[n % 4]))
    assert held_out.right_shape(images, shapes) >= 0.98
    assert held_out.on_topic(images, shapes, palettes) >= 0.98


def test_shape_ignores_polarity_and_colour_does_not(held_out):
    negative = 255 - held_out.images
    assert np.abs(features.shape_only(negative) - held_out.outline).max() < 1e-6
    assert np.linalg.norm(features.colour_and_shape(negative) - held_out.full, axis=1).min() > 0.5


@pytest.mark.parametrize("factor", [2, 8])
def test_larger_pictures_are_averaged_down(held_out, factor):
    large = held_out.images[::32].repeat(factor, 1).repeat(factor, 2)
    np.testing.assert_allclose(features.colour_and_shape(large), held_out.full[::32], atol=1e-5)


def test_uneven_sizes_average_over_areas():
    for size in (1, 7, 32, 45, 500):
        weights = features.area_weights(size)
        np.testing.assert_allclose(weights.sum(1), 1)
        np.testing.assert_allclose(weights.sum(0), 32 / size)
    tall = rng(2).integers(0, 256, (3, 61, 40, 3)).astype(np.uint8)
    described = features.colour_and_shape(tall)
    assert described.shape == (3, 388) and described.dtype == np.float32 and np.isfinite(described).all()


def test_blocks_and_neighbours_in_the_batch_do_not_matter(held_out):
    assert len(held_out.images) > features.BLOCK
    alone = np.concatenate([features.colour_and_shape(held_out.images[n : n + 1]) for n in (0, 100, 300)])
    np.testing.assert_allclose(alone, held_out.full[[0, 100, 300]], atol=1e-6)


def test_pictures_without_content_stay_finite():
    flat = np.full((2, 32, 32, 3), 77, np.uint8)
    assert not features.shape_only(flat).any()
    # 77 lies 77/85 of the way between the first two of the four levels: that share in each of three channels
    share = np.array([8 / 85, 77 / 85, 0, 0])
    found = features.colour_and_shape(flat)[0, :64].reshape(4, 4, 4)
    np.testing.assert_allclose(found**2, np.einsum("i,j,k->ijk", share, share, share), atol=1e-6)
    assert np.isfinite(features.colour_and_shape(np.zeros((1, 1, 1, 3), np.uint8))).all()
    assert features.colour_and_shape(flat[:0]).shape == (0, 388) and features.shape_only(flat[:0]).shape == (0, 324)


@pytest.mark.parametrize(("size", "kind"), [((2, 32, 32, 3), float), ((32, 32, 3), np.uint8), ((2, 3, 9, 9), np.uint8)])
def test_other_arrays_are_refused(size, kind):
    with pytest.raises(ValueError, match="must be uint8"):
        features.shape_only(np.zeros(size, kind))


def test_gradients_vote_for_their_orientation():
    steps = np.arange(32) / 32
    # the gradient of a horizontal ramp points along x (bin 0), of a vertical one along y (bin 4 of 8), mirrored or not
    for ramp, expected in ((steps[None, :], 0), (1 - steps[None, :], 0), (steps[:, None], 4), (1 - steps[:, None], 4)):
        found = features.gradients(np.broadcast_to(ramp, (1, 32, 32))).reshape(16, 8)
        assert (found.argmax(1) == expected).all() and np.isclose(np.linalg.norm(found), 1)
        assert np.abs(np.delete(found, expected, 1)).max() < 1e-9


def test_otsu_separates_two_levels_half_way():
    values = np.concatenate([rng(3).normal(0.1, 0.02, (4, 700)), rng(4).normal(0.7, 0.02, (4, 324))], axis=1)
    np.testing.assert_allclose(features.otsu(values), 0.4, atol=0.005)


def test_regions_agree_with_a_flood_fill():
    masks = rng(6).random((4, 32, 32)) < np.array([0.4, 0.55, 0.6, 0.8])[:, None, None]
    for mask, labels in zip(masks, features.regions(masks), strict=True):
        left, flooded = {tuple(p) for p in np.argwhere(mask)}, set()
        while left:
            queue, region = [left.pop()], set()
            while queue:
                y, x = queue.pop()
                region.add((y, x))
                for step in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if step in left:
                        left.remove(step)
                        queue.append(step)
            flooded.add(frozenset(region))
        found = {frozenset(map(tuple, np.argwhere(labels == name).tolist())) for name in np.unique(labels[labels > 0])}
        assert found == flooded and not labels[~mask].any()


def test_nearest_is_exact_across_blocks():
    points = rng(8).standard_normal((600, 17)).astype(np.float32)
    points[300] = points[10]
    queries = rng(9).standard_normal((550, 17)).astype(np.float32)
    truth = ((queries[:, None].astype(np.float64) - points[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(features.nearest(queries, points), truth.argmin(1))
    truth = ((points[:, None].astype(np.float64) - points[None]) ** 2).sum(-1)
    # of two equal rows the first answers, and each answers for the other once itself is excluded
    assert features.nearest(points, points)[300] == 10
    np.fill_diagonal(truth, np.inf)
    found = features.nearest(points, points, np.arange(len(points)))
    np.testing.assert_array_equal(found, truth.argmin(1))
    assert found[300] == 10 and found[10] == 300


def test_nearest_needs_a_candidate():
    with pytest.raises(ValueError, match="of 1 pictures is asked for"):
        features.nearest(np.zeros((1, 3)), np.zeros((1, 3)), np.arange(1))
    with pytest.raises(ValueError, match="3 exclusions for 2 queries"):
        features.nearest(np.zeros((2, 3)), np.zeros((3, 3)), np.arange(3))


def test_pairwise_mean_distance_in_closed_form():
    # group a: 0, 3, 6 on a line (3, 3, 6: mean 4); group b: a 3-4-5 pair (mean 5); c has no pair
    rows = np.array([[0, 0], [0, 0], [3, 0], [3, 4], [6, 0], [9, 9]], np.float32)
    assert features.pairwise_mean_distance(rows, ["a", "b", "a", "b", "a", "c"]) == pytest.approx(4.5, abs=1e-12)
    with pytest.raises(ValueError, match="no group of 2 pictures"):
        features.pairwise_mean_distance(rows[:2], ["a", "b"])


def test_diversity_separates_copies_variations_and_strangers(held_out):
    within = features.pairwise_mean_distance(held_out.full, held_out.group)
    assert features.pairwise_mean_distance(held_out.full[::32].repeat(4, 0), held_out.group[::32].repeat(4)) == 0
    assert 0.15 < within < 0.35
    # pixel noise alone must not pass for diversity
    noisy = features.colour_and_shape(degraded(held_out.images[::32].repeat(4, 0), 0.7, 8))
    assert features.pairwise_mean_distance(noisy, held_out.group[::32].repeat(4)) < 0.5 * within
    assert features.pairwise_mean_distance(held_out.full[::32], np.zeros(16)) > 4 * within
