"""Drawn scenes: reproducible, with captions that say what is there and masks that a recogniser finds again."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from semantica.benchmarks.quality import scenes
from semantica.benchmarks.quality.recognise import find, ground_of, iou, largest, on_topic, shape_of
from semantica.benchmarks.quality.scenes import Scene, Thing, picture_of, scene_of
from semantica.errors import UserError


def drawn(count: int) -> list[tuple[Scene, np.ndarray]]:
    """Scenes of both splits in turn, and their pictures."""
    places = [(("train", "val")[i % 2], 0, i // 2) for i in range(count)]
    return [(scene_of(*place), picture_of(*place)) for place in places]


def test_same_arguments_draw_the_same_files(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        scenes.draw_scenes(tmp_path / name, seed, pictures=120, held_out=12)
    first, second, other = (
        {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in "abc"
    )
    assert first == second and len(first) == 120 + 12 + 3
    assert not any(first[path] == other[path] for path in first)
    lines = [json.loads(line) for line in (tmp_path / "a" / "train" / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == 120 and lines[101] == {"file": "001/00101.png", "text": scene_of("train", 3, 101).caption}
    with Image.open(tmp_path / "a" / "train" / lines[101]["file"]) as picture:
        assert np.array_equal(np.asarray(picture), picture_of("train", 3, 101))
    # a complete web is left alone, another one drawn again
    before = (tmp_path / "a").stat().st_ino
    scenes.draw_scenes(tmp_path / "a", 3, pictures=120, held_out=12)
    assert (tmp_path / "a").stat().st_ino == before
    scenes.draw_scenes(tmp_path / "a", 3, pictures=10, held_out=12)
    assert len(list((tmp_path / "a").glob("*/*/*.png"))) == 22


def test_captions_say_what_is_there_with_a_word_for_each_attribute():
    cross, ring = Thing("cross", "red", (9, 9), 4), Thing("ring", "blue", (23, 20), 4)
    assert Scene((cross,), "green").caption == "a red cross on green"
    assert Scene((cross, ring), "green", "left of").caption == "a red cross left of a blue ring on green"
    assert Scene((cross, ring), "grey").caption == "a red cross and a blue ring on grey"
    assert Scene((cross, cross), "teal").caption == "two red crosses on teal"
    assert Scene((ring, ring, ring), "teal").caption == "three blue rings on teal"
    assert Scene((cross,), "grey", open=True).caption == "a cross on grey"
    assert Scene((cross, ring), "grey", open=True).caption == "a cross and a ring on grey"
    assert Scene((cross, cross), "grey", open=True).caption == "two crosses on grey"
    assert scenes.related((cross, ring)) == "left of" and scenes.related((ring, cross)) == "right of"
    above = Thing("square", "black", (10, 3), 2)
    assert scenes.related((above, cross)) == "above" and scenes.related((cross, above)) == "below"


def test_training_shows_every_shape_and_colour_but_no_held_out_crossing():
    training = [scene_of("train", 0, i) for i in range(1500)]
    seen = Counter((t.shape, t.colour) for scene in training for t in scene.things)
    assert len(scenes.HELD_OUT) == 4 and not scenes.HELD_OUT & {*seen} and len(seen) == 20
    assert max(seen.values()) < 2 * min(seen.values())
    assert 0.15 < np.mean([scene.open for scene in training]) < 0.25
    assert {len(scene.things) for scene in training} == {1, 2, 3} and {s.ground for s in training} == {*scenes.GROUNDS}
    held = [scene_of("val", 0, i) for i in range(36)]
    firsts = Counter(((s.things[0].shape, s.things[0].colour), len(s.things)) for s in held)
    assert firsts == {(crossing, count): 3 for crossing in scenes.HELD_OUT for count in (1, 2, 3)}
    assert all((t.shape, t.colour) not in scenes.HELD_OUT for s in held for t in s.things[1:])


def test_objects_lie_apart_and_inside_at_free_places_and_sizes():
    training = [scene_of("train", 1, i) for i in range(600)]
    things = [t for scene in training for t in scene.things]
    centres, radii = np.array([t.centre for t in things]), np.array([t.radius for t in things])
    assert all(t.reach <= min(*t.centre, 32 - t.centre[0], 32 - t.centre[1]) + 1e-9 for t in things)
    # far from the middle, and over a range of areas of 4 and more
    assert (centres.std(0) > 5).all() and (centres.min(0) < 6).all() and (centres.max(0) > 26).all()
    assert (np.quantile(radii, 0.95) / np.quantile(radii, 0.05)) ** 2 > 4
    for scene in training:
        total = scenes.masks(scene).astype(int).sum(0)
        assert total.max() == 1


def test_the_recogniser_finds_every_object_at_its_place_and_says_what_it_is():
    overlaps, misplaced, areas = [], [], []
    for scene, picture in drawn(200):
        found = find(picture)
        assert on_topic(found, ground_of(picture)[0], scene), scene.caption
        assert len(found) == len(scene.things)
        for thing in scene.things:
            exact = scenes.cover(thing.shape, thing.centre, thing.radius)
            same = [each for each in found if each.colour == thing.colour]
            best = max(same, key=lambda each: iou(each.cover, exact))
            overlaps.append(iou(best.cover, exact))
            x, y = (exact.sum(axis) @ (np.arange(32) + 0.5) / exact.sum() / 32 for axis in (0, 1))
            misplaced.append(np.hypot(best.centroid[0] - x, best.centroid[1] - y))
            areas.append(best.area / exact.mean())
    assert min(overlaps) >= 0.9 and np.mean(overlaps) > 0.98
    assert max(misplaced) < 0.01 and 0.93 < min(areas) and max(areas) < 1.07


def test_what_is_not_there_is_not_found():
    scene = Scene((Thing("cross", "red", (9, 9), 4), Thing("ring", "blue", (22, 20), 6)), "green")
    picture = scenes.draw(scene, scenes.philox(0))
    found, ground = find(picture), ground_of(picture)[0]
    assert [(each.colour, each.shape) for each in found] == [("red", "cross"), ("blue", "ring")]
    assert largest(found, "white") is None and largest(found, "red").shape == "cross"
    assert on_topic(found, ground, scene)
    # another shape, another colour, one object less, another ground: each is seen
    for other in (
        Scene((Thing("square", "red", (9, 9), 4), scene.things[1]), "green"),
        Scene((Thing("cross", "pink", (9, 9), 4), scene.things[1]), "green"),
        Scene(scene.things[:1], "green"),
        Scene(scene.things, "teal"),
    ):
        assert not on_topic(found, ground, other)
    noise = scenes.philox(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert not on_topic(find(noise), ground_of(noise)[0], scene)
    assert find(np.full((32, 32, 3), 134, np.uint8)) == []


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shapes_are_told_apart_at_every_size(shape):
    for radius in np.linspace(3.5, 9.5, 7):
        for place in (15.5, 16.0, 16.3):
            assert shape_of(scenes.cover(shape, (place, 16.1), float(radius)) >= 0.5) == shape, (radius, place)


def test_other_folders_and_impossible_numbers_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("keep")
    with pytest.raises(UserError, match="is not a drawn web: give another folder"):
        scenes.draw_scenes(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot draw 1 scenes"):
        scenes.draw_scenes(tmp_path / "web", pictures=1)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "mine"]
