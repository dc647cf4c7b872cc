"""The drawn web: reproducible, with combinations that are really held out, and never half-written."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantica import features
from semantica.benchmarks.quality import web
from semantica.errors import UserError


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    out = tmp_path_factory.mktemp("web") / "full"
    web.draw_web(out, images_per_group=4)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_arguments_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        web.draw_web(tmp_path / name, seed=seed, groups=5, images_per_group=3)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert len(first) == (5 + 16) * 3 + 2
    # the held-out groups are the same ones, but not one of their pictures is
    held_out = [path for path in first if path.startswith("val/")]
    assert len(held_out) == 48 and not any(first[path] == other[path] for path in held_out)


def test_a_picture_depends_on_nothing_but_seed_group_and_index(tmp_path):
    web.draw_web(tmp_path / "few", groups=3, images_per_group=2)
    web.draw_web(tmp_path / "more", groups=9, images_per_group=4)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert all(more[path] == few[path] for path in few if path.endswith(".png"))


def test_held_out_combinations_never_occur_in_training(full):
    table = json.loads((full / "attributes.json").read_text())
    folders = {split: sorted(p.name for p in (full / split).iterdir()) for split in ("train", "val")}
    assert len(folders["train"]) == 240 and len(folders["val"]) == 16
    assert sorted(table) == sorted(folders["train"] + folders["val"])
    assert all(set(row) == {"shape", "palette", "count", "texture"} for row in table.values())
    combination = {name: (row["shape"], row["palette"]) for name, row in table.items()}
    held_out = {combination[name] for name in folders["val"]}
    seen = Counter(combination[name] for name in folders["train"])
    shapes, palettes = {s for s, _ in held_out}, {p for _, p in held_out}
    assert held_out == set(product(shapes, palettes)) and len(shapes) == len(palettes) == 4
    assert not held_out & set(seen)
    # every other combination is there with every count, so each held-out shape and palette is seen in many groups
    assert set(seen) == set(product(web.OUTLINES, web.PALETTES)) - held_out and len(seen) == 80
    assert set(seen.values()) == {3}
    assert len({(*combination[name], table[name]["count"]) for name in folders["train"]}) == 240
    assert all(sum(n for (s, _), n in seen.items() if s == shape) == 24 for shape in shapes)
    assert all(sum(n for (_, p), n in seen.items() if p == palette) == 12 for palette in palettes)


def test_pictures_are_small_rgb_and_all_different(full):
    paths = sorted(full.glob("*/*/*.png"))
    assert len(paths) == 256 * 4 and len({path.read_bytes() for path in paths}) == len(paths)
    with Image.open(paths[0]) as picture:
        assert (picture.size, picture.mode, picture.format) == ((32, 32), "RGB", "PNG")


def test_held_out_counts_and_textures_say_nothing_of_shape_or_palette():
    groups = web.held_out_groups()
    for attribute in ("shape", "palette"):
        rows = defaultdict(list)
        for group in groups:
            rows[getattr(group, attribute)].append(group)
        assert all(sorted(g.count for g in row) == [1, 1, 2, 3] for row in rows.values())
        assert all(sorted(g.texture for g in row) == sorted(web.TEXTURES) for row in rows.values())


def test_training_counts_are_independent_of_shape_and_palette():
    # by attribute: groups per count of the values that are held out with others, and of the free ones
    for attribute, held_out, free in (("shape", 8, 12), ("palette", 4, 8)):
        table = defaultdict(Counter)
        for group in web.training_groups(seed=1, groups=240):
            table[getattr(group, attribute)][group.count] += 1
        rows = sorted(tuple(row[n] for n in (1, 2, 3)) for row in table.values())
        assert rows == [(held_out,) * 3] * 4 + [(free,) * 3] * (len(rows) - 4)


def test_a_combination_that_occurs_again_has_another_count_and_texture():
    again = defaultdict(list)
    for group in web.training_groups(seed=0, groups=240):
        again[group.shape, group.palette].append(group)
    assert all(a.count != b.count and a.texture != b.texture for row in again.values() for a, b in pairwise(row))


def test_palettes_have_strong_contrast_both_ways_round():
    luma = np.array([[np.dot(features.LUMA, colour) for colour in pair] for pair in web.PALETTES.values()])
    assert (np.abs(luma[:, 0] - luma[:, 1]) > 100).all()
    assert (luma[:, 0] < luma[:, 1]).sum() == 6
    # grey values are alike across palettes, so that they give at most the polarity away
    assert np.ptp(luma.max(1)) < 30 and np.ptp(luma.min(1)) < 30


def test_as_many_separate_objects_are_seen_as_the_group_says(full):
    table = json.loads((full / "attributes.json").read_text())
    paths = sorted(full.glob("*/*/*.png"))
    pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
    labels = features.regions(features.foreground(pictures / 255 @ features.LUMA) > 0.5)
    seen = [int((np.bincount(label.ravel())[1:] >= 6).sum()) for label in labels]
    drawn = [table[path.parent.name]["count"] for path in paths]
    assert np.mean(np.array(seen) == drawn) > 0.99


def test_a_complete_web_is_left_alone_and_a_damaged_or_other_one_drawn_again(tmp_path):
    out = tmp_path / "web"
    web.draw_web(out, groups=2, images_per_group=2)
    before, inode = contents(out), out.stat().st_ino
    web.draw_web(out, groups=2, images_per_group=2)
    assert out.stat().st_ino == inode
    next(out.glob("train/*/01.png")).unlink()
    web.draw_web(out, groups=2, images_per_group=2)
    assert contents(out) == before
    web.draw_web(out, seed=1, groups=3, images_per_group=2)
    assert len(list(out.glob("train/*"))) == 3 and contents(out).keys() != before.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["web"]


@pytest.mark.parametrize("there_before", [False, True])
def test_an_interrupted_drawing_leaves_what_was_there(tmp_path, monkeypatch, there_before):
    out = tmp_path / "web"
    if there_before:
        web.draw_web(out, groups=1, images_per_group=2)
    before = contents(tmp_path)
    real, calls = web.draw_image, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(web, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        web.draw_web(out, groups=4, images_per_group=2)
    assert len(calls) == 20 and contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["web"] * there_before


def test_a_killed_drawing_leaves_no_web(tmp_path):
    out = tmp_path / "web"
    code = (
        "import os, sys; from pathlib import Path; from semantica.benchmarks.quality import web\n"
        "real = web.draw_texture\n"
        "web.draw_texture = lambda name, *rest: os._exit(9) if name == 'dots' else real(name, *rest)\n"
        "web.draw_web(Path(sys.argv[1]), groups=4, images_per_group=2)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code, str(out)], check=False).returncode == 9
    assert not out.exists()
    web.draw_web(out, groups=4, images_per_group=2)
    assert len(list(out.glob("*/*/*.png"))) == 40


def test_a_folder_that_is_not_a_web_is_refused_and_kept(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="photos exists and is not a drawn web: give another folder"):
        web.draw_web(tmp_path / "photos", groups=1, images_per_group=2)
    assert contents(tmp_path) == {"photos/mine.txt": b"keep"}


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"groups": 0}, {"images_per_group": 1}])
def test_numbers_out_of_range_are_refused(tmp_path, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        web.draw_web(tmp_path / "web", **wrong)
    assert not any(tmp_path.iterdir())
