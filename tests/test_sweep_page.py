"""What a sweep found: means and intervals, differences between settings, and the page that shows them."""

import math
import random
import re
from statistics import mean, stdev

import pytest

from semantica.benchmarks.quality.sweep.figures import against_each_other, against_guidance, against_points
from semantica.benchmarks.quality.sweep.page import page
from semantica.benchmarks.quality.sweep.results import (
    Mean,
    all_names,
    baselines,
    effects,
    figure,
    figures,
    groups,
    mean_of,
    named,
    row_of,
    shared,
    t_quantile,
)

# of printed tables: degrees of freedom -> 97.5 % quantile
STUDENT = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 7: 2.3646, 9: 2.2622, 19: 2.0930, 100: 1.9840}
MODES, FILTERS, SEEDS, SCALES = ("pairs", "reconstruct"), ("all", "strict"), (0, 1, 2), (1.0, 2.0)


def value(mode: str, filtered: str, seed: int, scale: float) -> float:
    """A diversity: reconstruction has a quarter less, strict thresholds an eighth, with something of each seed; all
    exact in binary numbers."""
    return 1.0 - (mode == "reconstruct") / 4 - (filtered == "strict") / 8 - scale / 16 + seed**2 / 64


def rows() -> list[dict]:
    made = []
    for seed in SEEDS:
        for mode in MODES:
            for filtered in FILTERS:
                for scale in SCALES:
                    diversity = value(mode, filtered, seed, scale)
                    found = {
                        "on_topic": 0.5 + scale / 8,
                        "diversity": diversity,
                        "fid": {"value": 30 - 5 * scale + seed, "low": 20.0, "high": 40.0, "biased": True},
                        "precision": {"value": 0.6},
                        "recall": 0.4,
                        "note": "no figure",
                    }
                    settings = {"mode": mode, "thresholds": filtered}
                    own = {"ignore the condition": {"diversity": 1.1 + 0.1 * seed}, "copy": {"diversity": 0.0}}
                    made.append({
                        "cell": f"{mode}-{filtered}-{seed}", "settings": settings, "seed": seed, "guidance": scale,
                        "figures": found, "loss": {"right_below_shuffled": 0.03}, "baselines": own,
                    })  # fmt: skip
    return made


def content(found: list[dict]) -> dict:
    same, kept = shared(found)
    return {
        "axes": {
            "mode": {mode: {"mode": mode} for mode in MODES},
            "thresholds": {"all": {}, "strict": {"low": 0.4}},
        },
        "description": {"train": {"steps": 10}},
        "evaluate": {"n": 4, "guidance": [1.0, 2.0]},
        "cells": {row["cell"]: {"state": "finished"} for row in kept}
        | {"broken": {"state": "failed", "reason": "<out> of memory"}},
        "baselines": same,
        "rows": kept,
    }


def test_intervals_are_student_s():
    for freedom, wanted in STUDENT.items():
        assert t_quantile(freedom) == pytest.approx(wanted, rel=3e-3), freedom
    values = [3.0, 5.0, 10.0]
    found = mean_of(values)
    half = STUDENT[2] * stdev(values) / math.sqrt(3)
    assert (found.value, found.count) == (6.0, 3) and found.high - 6.0 == pytest.approx(half, rel=1e-4)
    assert 6.0 - found.low == pytest.approx(half, rel=1e-4)
    assert mean_of([4.0]) == Mean(4.0, None, None, 1)


def test_intervals_hold_the_mean_as_often_as_they_say():
    draw = random.Random(0)
    held = [mean_of([draw.gauss(1.0, 2.0) for _ in range(4)]) for _ in range(4000)]
    # a binomial share of 0.95 in 4000 has a deviation of 0.0034
    assert abs(mean(found.low <= 1.0 <= found.high for found in held) - 0.95) < 0.014


def test_figures_are_numbers_or_values_with_intervals_of_their_own():
    assert figure(2) == Mean(2.0) and figure({"value": 2, "low": 1, "high": 4}) == Mean(2.0, 1.0, 4.0)
    assert figure({"value": 2, "low": None}) == Mean(2.0) and Mean(2.0, biased=True).write() == "2*"
    assert [figure(x) for x in (None, True, "2", math.nan, {"low": 1}, {"value": "2"}, [2])] == [None] * 7
    assert figure({"value": 2, "low": 1, "high": 4}).write() == "2.0 (1.0 to 4.0)" and Mean(2.0).write() == "2"
    written = {
        (0.5, 0.4, 0.6): "+0.50 ± 0.10",
        (-0.00403, -0.02203, 0.01397): "-0.004 ± 0.018",
        (30, 17.6, 42.4): "+30 ± 12",
    }
    for bounds, text in written.items():
        assert Mean(*bounds).write("+") == text


def test_means_are_over_seeds_of_equal_settings():
    found = groups(reversed(rows()))
    assert len(found) == 8 and [group.guidance for group in found[:2]] == [1.0, 2.0]
    for group in found:
        mode, filtered = group.settings.values()
        wanted = mean_of([value(mode, filtered, seed, group.guidance) for seed in SEEDS])
        means = group.means()
        assert means["diversity"].value == pytest.approx(wanted.value) and means["diversity"].count == 3
        assert means["fid"].value == pytest.approx(31 - 5 * group.guidance) and "note" not in means
        assert means["right_below_shuffled"].value == pytest.approx(0.03)
    # of a single seed the interval is that of its evaluation
    alone = groups(row for row in rows() if row["seed"] == 1)[0].means()
    assert alone["fid"] == Mean(26.0, 20.0, 40.0, biased=True) and alone["diversity"].low is None


def test_effects_are_paired_by_seed_and_all_other_settings():
    found = effects(rows(), "mode")
    assert [(e.value, e.base, e.guidance) for e in found] == [("reconstruct", "pairs", s) for s in SCALES]
    for effect in found:
        change = effect.figures["diversity"]
        # what the seeds have in common is not in it
        assert change.value == pytest.approx(-0.25) and change.high - change.low < 1e-9 and change.count == 3
    # a cell that failed takes its partner with it, and no others
    rest = [row for row in rows() if (row["cell"], row["guidance"]) != ("pairs-strict-2", 1.0)]
    assert effects(rest, "mode")[0].figures["diversity"].value == pytest.approx(-0.25)
    assert effects([row for row in rows() if row["settings"]["mode"] == "pairs"], "mode") == []


def test_baselines_that_all_share_stand_once_and_others_as_their_mean():
    same, kept = shared(rows())
    assert same == {"copy": {"diversity": 0.0}} and shared([]) == ({}, [])
    assert kept[0]["baselines"] == {"ignore the condition": {"diversity": 1.1}}
    found = baselines({"baselines": same, "rows": kept})
    assert found["copy"] == {"diversity": Mean(0.0)}
    assert found["ignore the condition, mean"]["diversity"].value == pytest.approx(1.2)


def test_figures_with_intervals_stand_in_a_table_of_their_own():
    fid = {"value": 9.0, "low": 8.0, "high": 10.0}
    evaluation = {
        "figures": {"model": {"on_topic": 0.5, "diversity": 0.7}, "copy": {"diversity": 0.0}},
        "metrics": {"rows": {"model": {"fid": fid, "diversity": {"value": 0.7}}, "noise": {"fid": fid}}},
    }
    row = row_of("a", {}, 0, 1.0, evaluation)
    assert figures(row) == {"on_topic": Mean(0.5), "diversity": Mean(0.7), "fid": Mean(9.0, 8.0, 10.0)}
    assert row["baselines"] == {"copy": {"diversity": 0.0}, "noise": {"fid": fid}}
    assert set(evaluation["figures"]["model"]) == {"on_topic", "diversity"}


def test_figures_are_found_by_what_they_are_called():
    names = ["on_topic", "fid_like", "fid", "kid", "vendi_score"]
    assert named(names, "fid", "frechet") == "fid" and named(names, "frechet") is None
    assert named(names, "diversity", "vendi") == "vendi_score" and named(["frechet_dino"], "fid", "frechet")
    # not where a word is a part of another one
    assert named(["confidence"], "fid") is None


def lines(figure_) -> dict[str, tuple[list, list]]:
    """The points of each curve, over all panels."""
    return {
        (i, container.get_label()): tuple(map(list, container[0].get_data()))
        for i, axes in enumerate(figure_.axes)
        for container in axes.containers
    }


def test_curves_are_the_means_over_guidance():
    found, beside = groups(rows()), baselines(content(rows()))
    drawn = lines(against_guidance(found, "fid", beside))
    x, y = drawn[0, "pairs, all"]
    assert x == pytest.approx([1.0, 2.0], abs=0.01) and y == [26.0, 21.0] and len(drawn) == 4
    both = against_each_other(found, "diversity", "on_topic", beside)
    x, y = lines(both)[0, "reconstruct, strict"]
    assert x == pytest.approx([found[-2].means()["diversity"].value, found[-1].means()["diversity"].value])
    assert y == [0.625, 0.75]
    panels = against_points(found, "thresholds", "diversity")
    assert [axes.get_title() for axes in panels.axes] == ["guidance 1", "guidance 2"]
    assert [label.get_text() for label in panels.axes[0].get_xticklabels()] == ["all", "strict"]
    x, y = lines(panels)[1, "pairs"]
    wanted = [mean(value("pairs", f, seed, 2.0) for seed in SEEDS) for f in FILTERS]
    assert x == [0, 1] and y == pytest.approx(wanted)


def test_the_page_says_what_the_rows_say(tmp_path):
    page(tmp_path / "sweep.html", content(rows()))
    text = (tmp_path / "sweep.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings[:5] == [
        "Failed", "FID against guidance", "Precision against recall", "On-topic rate against diversity",
        "Diversity against thresholds",
    ]  # fmt: skip
    assert "A star: of so few pictures" in text and "<td>21.0* ± 2.5</td>" in text
    assert text.count("<svg") == 4 and "&lt;out&gt; of memory" in text and "<out>" not in text
    # self-contained: nothing is loaded from elsewhere
    assert not re.search(r"""(src|href)="(?!#|data:)|@import|url\((?!#)""", text)
    for group in groups(rows()):
        cells = [*group.settings.values(), f"{group.guidance:g}", "3", *(m.write() for m in group.means().values())]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert "<td>mode</td><td>reconstruct - pairs</td><td>1</td><td>+0.000 ± 0.000</td><td>-0.250 ± 0.000</td>" in text
    assert "<td>strict</td><td>low = 0.4</td>" in text and all_names(rows())[0] == "on_topic"


def test_a_page_of_nothing_yet_and_of_one_cell(tmp_path):
    empty = content([])
    page(tmp_path / "empty.html", empty)
    text = (tmp_path / "empty.html").read_text()
    assert "0 of 1 cells are trained" in text and "<svg" not in text
    (row,) = [{**rows()[0], "settings": {}, "figures": {"on_topic": 0.5}}]
    page(tmp_path / "one.html", content([row]) | {"axes": {}})
    text = (tmp_path / "one.html").read_text()
    assert "<td>1</td><td>1</td><td>0.5</td><td>0.03</td>" in text and "<svg" not in text
