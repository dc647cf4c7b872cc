"""Steering scored on drawn scenes: the scores themselves on maps and pictures that are known, and the demo in small."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semantica.benchmarks.quality import controls, controls_demo, controls_runs
from semantica.benchmarks.quality.controls import Batch, Steering
from semantica.benchmarks.quality.demo import DemoConfig, demo
from semantica.benchmarks.quality.pointing import hits, score, solid
from semantica.benchmarks.quality.recognise import find
from semantica.benchmarks.quality.scenes import Scene, Thing, cover, draw, elsewhere, philox, recoloured, scene_of
from semantica.errors import UserError

CROSS, RING = Thing("cross", "red", (8.0, 8.0), 4.0), Thing("ring", "blue", (22.0, 20.0), 6.0)
PAIR = Scene((CROSS, RING), "green")


def shown(*scenes: Scene) -> np.ndarray:
    return np.stack([draw(scene, philox(0)) for scene in scenes])


def batch_of(*scenes: Scene) -> Batch:
    return Batch(list(scenes), None, None, shown(*scenes), None, 0)


def test_a_map_on_its_object_scores_a_hit_and_its_centroid_is_where_it_is():
    for thing in (CROSS, RING):
        drawn = solid(thing)
        exact = torch.from_numpy(drawn.reshape(8, 4, 8, 4).mean((1, 3))).float()
        hit, distance, chance = score(exact, drawn)
        assert hit == 1 and distance < 0.002 and chance == hits(drawn, 8).mean() < 0.2
        # mass everywhere else: no hit, and the middle of the picture
        hit, distance, _ = score(torch.from_numpy(~hits(drawn, 8)).float(), drawn)
        assert hit == 0 and distance > 0.1
    # a ring's hole counts as ring, and is not drawn
    assert solid(RING)[20, 22] == 1 and cover("ring", RING.centre, RING.radius)[20, 22] == 0
    # an object smaller than a place of the grid is on the places that it is on most
    assert hits(cover("square", (14, 14), 0.8), 8).sum() == 1


def test_distances_areas_overlaps_and_matches_of_pictures_that_are_known():
    moved = replace(PAIR, things=(replace(CROSS, centre=(20.0, 6.0)), RING))
    batch = batch_of(PAIR)
    before = controls.distances(batch, shown(PAIR), [(20 / 32, 6 / 32)])
    after = controls.distances(batch, shown(moved), [(20 / 32, 6 / 32)])
    assert before == pytest.approx(np.hypot(12, 2) / 32, abs=0.005) and after == pytest.approx(0, abs=0.005)
    gone = replace(PAIR, things=(RING,))
    assert controls.distances(batch, shown(gone), [(0.5, 0.5)]) == [controls.LOST]
    double = replace(PAIR, things=(replace(CROSS, radius=4 * 2**0.5), RING))
    ratio = controls.areas(batch, shown(double)) / controls.areas(batch, shown(PAIR))
    assert ratio == pytest.approx(2, rel=0.05) and controls.areas(batch, shown(gone)) == [0]
    # of one that grew, shrank, stayed, is lost, was not there
    sizes = np.array([[0.1, 0.1, 0.1, 0.1, 0.0], [0.2, 0.05, 0.1, 0.0, 0.1]])
    assert controls.ratios(*sizes).tolist() == [2, 0.5, 1, 0, 1]
    assert controls.directions(*sizes, 2.0).tolist() == [1, 0, 0, 0, 0]
    assert controls.directions(*sizes, 0.5).tolist() == [0, 1, 0, 0, 0]
    assert controls.overlaps(batch, shown(PAIR), [PAIR]) > 0.95
    assert controls.overlaps(batch, shown(moved), [PAIR]) == pytest.approx(0.5, abs=0.05)
    assert controls.matches(shown(PAIR), [PAIR]) == [1] and controls.matches(shown(gone), [PAIR]) == [0.5]
    # of red and blue, blue; of red, blue and white, two
    more = replace(PAIR, things=(*PAIR.things, Thing("square", "white", (26.0, 5.0), 3.5)))
    assert controls.palettes(shown(PAIR), [PAIR]) == [1] and controls.palettes(shown(gone), [PAIR]) == [0.5]
    assert controls.palettes(shown(more), [PAIR]) == pytest.approx(2 / 3)
    assert controls.topics(batch, shown(PAIR)) == [1] and controls.topics(batch, shown(gone)) == [0]


def test_destinations_are_far_inside_and_clear_of_other_objects():
    for number in range(40):
        scene = scene_of("train", 3, number)
        if len({thing.colour for thing in scene.things}) < len(scene.things):
            continue
        found = find(draw(scene, philox(number)), False)
        own, *others = (next(f for f in found if f.colour == t.colour) for t in scene.things)
        x, y = controls.destination(found, scene, philox(number, 1))
        assert np.hypot(x - own.centroid[0], y - own.centroid[1]) >= controls.FAR
        assert 0.1 < x < 0.9 and 0.1 < y < 0.9
        assert all(np.hypot(x - o.centroid[0], y - o.centroid[1]) > 0.15 for o in others)


def test_sources_show_the_same_things_elsewhere_or_in_other_colours():
    for number in range(12):
        scene = scene_of("val", 0, number)
        other = elsewhere(scene, philox(number))
        assert [(t.shape, t.colour) for t in other.things] == [(t.shape, t.colour) for t in scene.things]
        assert other.caption == scene.caption and all(a.centre != b.centre for a, b in zip(other.things, scene.things))
        other = recoloured(scene, philox(number))
        assert [t.shape for t in other.things] == [t.shape for t in scene.things]
        assert not {t.colour for t in other.things} & {t.colour for t in scene.things}


def test_objects_are_the_words_that_the_caption_has_for_them():
    tokenizer = SimpleNamespace(tokens_of=lambda caption, word: (caption.split().index(word),))
    pipe = SimpleNamespace(encoder=SimpleNamespace(encoders={"text": SimpleNamespace(tokenizer=tokenizer)}))
    how = Steering({})
    named = controls.things_of(pipe, [PAIR], how)
    assert (
        named.names == ("0", "1") and named.index.tolist() == [[1, 5]] and named.member[0].tolist() == [[1, 0], [0, 1]]
    )
    # "a cross and a ring on green" has no colours: shapes are what is left
    assert controls.things_of(pipe, [replace(PAIR, open=True)], how).index.tolist() == [[1, 4]]
    assert controls.things_of(pipe, [PAIR], replace(how, word="shape")).index.tolist() == [[2, 6]]


def test_each_word_is_read_in_the_layer_where_it_points_best():
    rows = [
        {"word": word, "layer": layer, "logsnr": level, "hits": hits}
        for word, layer, level, hits in (
            ("shape", "a", -1, 0.9), ("shape", "a", 1, 0.1), ("shape", "b", -1, 0.6), ("shape", "b", 1, 0.6),
            ("colour", "a", -1, 0.7), ("colour", "a", 1, 0.8), ("colour", "b", 1, 0.9), ("colour", "all", 1, 5.0),
        )
    ]  # fmt: skip
    assert controls_runs.best_layers(rows) == {"shape": ("b",), "colour": ("a",)}
    assert controls_runs.best_word(rows) == "colour"


def test_an_energy_is_turned_off_for_its_task_alone():
    how = Steering({"move": {"position": 2.0, "size": 1.0}, "layout": {"shape": 3.0}})
    assert how.scaled("layout", 3.0).weights == {"move": {"position": 2.0, "size": 1.0}, "layout": {"shape": 9.0}}
    assert how.without("move", "size").weights == {"move": {"position": 2.0, "size": 0.0}, "layout": {"shape": 3.0}}


def test_the_search_keeps_the_factor_that_serves_each_task_best(monkeypatch):
    """Outcomes that are made up: more of a weight moves further, until objects are lost."""

    def run(pipe, batch, how):
        weight = how.weights["move"]["position"]
        figures = {"distance after": 0.4 / weight, "on topic before": 1.0, "on topic after": float(weight < 20)}
        return SimpleNamespace(figures={name: np.array([value]) for name, value in figures.items()})

    monkeypatch.setattr(controls_runs, "TASKS", {"move": (2, False, run)})
    monkeypatch.setattr(controls_runs, "unguided", lambda *_: None)
    how, figures = controls_runs.search(None, Steering({"move": {"position": 10.0}}), 0, 2)
    assert how.weights["move"]["position"] == 10 and list(figures["move"]) == ["0.03", "0.1", "0.3", "1", "3"]
    assert figures["move"]["3"] == {
        "distance after": pytest.approx(0.4 / 30),
        "on topic before": 1,
        "on topic after": 0,
    }
    assert controls_runs.SCORES["half"]({"ratio": 0.5}) == 0 > controls_runs.SCORES["half"]({"ratio": 0.6})


def test_impossible_options_are_refused(tmp_path):
    with pytest.raises(UserError, match="--groups is for pictures without captions"):
        demo(DemoConfig(out=tmp_path / "d", controls=True, groups=3))
    with pytest.raises(UserError, match="--steps must be at least 1"):
        demo(DemoConfig(out=tmp_path / "d", controls=True, steps=0))
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_the_demo_of_controls_in_small_runs_and_repeats(tmp_path, monkeypatch):
    """Few steps: the whole path, its files, and the same figures when it is run again."""
    small = dict(PICTURES=40, HELD_OUT=12, POINTED=6, SAMPLES=2, SEEDS=2, SEARCHED=2, ABLATED=2, SAMPLING_STEPS=3)
    for name, value in small.items():
        monkeypatch.setattr(controls_demo, name, value)
    config = DemoConfig(out=tmp_path / "demo", controls=True, steps=2, compile=False)
    first, out = demo(config), config.out / "controls"
    pictures = {"attention.png", *(f"{task}.png" for task in controls.TASKS)}
    assert {p.name for p in out.iterdir()} == {"web", "run", "controls.html", "controls.json"} | pictures
    assert set(first["tasks"]) == set(first["ablations"]) == set(controls.TASKS)
    assert json.loads((out / "controls.json").read_text())["tasks"] == first["tasks"]
    page = (out / "controls.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "<svg" in page and 'src="http' not in page
    again = demo(config)
    assert all(again[name] == first[name] for name in ("goals", "pointing", "weights", "tasks", "ablations"))
