"""The figures themselves: known answers for pictures whose answer is known, and the demo in small."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantica import UserError
from semantica.benchmarks.quality.demo import DemoConfig, demo, goals
from semantica.benchmarks.quality.evaluate import EvaluateConfig, Space, evaluate, spread
from semantica.benchmarks.quality.web import draw_web
from semantica.report import Part, plot, write_page


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    out = tmp_path_factory.mktemp("web") / "web"
    draw_web(out, groups=8, images_per_group=6)
    return out


def copy(web, out, pick):
    """A folder of made pictures: `pick(label, labels)` says whose pictures stand under a label."""
    labels = sorted(p.name for p in (web / "val").iterdir())
    for label in labels:
        (out / label).mkdir(parents=True)
        for file in sorted((web / "val" / pick(label, labels)).iterdir())[:3]:
            (out / label / file.name).write_bytes(file.read_bytes())
    return out


def figures(web, images, **options):
    given = dict(attributes=web / "attributes.json", bootstrap=20)
    result = evaluate(EvaluateConfig(data=web / "val", images=images, **given, **options))
    return result["figures"]


def test_known_folders_have_known_figures(web, tmp_path):
    table = json.loads((web / "attributes.json").read_text())
    right = figures(web, copy(web, tmp_path / "right", lambda label, labels: label))
    assert right["images"]["on_topic"] == right["images"]["same_shape_in_grey"] == 1.0
    assert right["copy the condition"]["diversity"] == 0.0 and right["copy the condition"]["on_topic"] == 1.0
    assert right["real pictures"]["on_topic"] >= 0.95 and 0.5 < right["images"]["diversity"] < 1.5
    assert json.loads((tmp_path / "evaluation.json").read_text())["chance"] == 1 / 16

    def same_palette_next_shape(label, labels):
        mine = table[label]
        alike = [x for x in labels if table[x]["palette"] == mine["palette"]]
        return alike[(alike.index(label) + 1) % 4]

    wrong = figures(web, copy(web, tmp_path / "wrong", same_palette_next_shape))["images"]
    assert wrong["on_topic"] == 0.0 and wrong["same_palette"] == 1.0 and wrong["same_shape"] == 0.0


def test_a_label_that_the_data_lacks_is_refused(web, tmp_path):
    folder = copy(web, tmp_path / "made", lambda label, labels: label)
    (folder / "unheard-of").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "unheard-of" / "0.png")
    with pytest.raises(UserError, match="'unheard-of', which is no label"):
        figures(web, folder)


def test_attributes_and_places_that_are_none_are_one_line(web, tmp_path):
    images = copy(web, tmp_path / "made", lambda label, labels: label)
    known, table = json.loads((web / "attributes.json").read_text()), tmp_path / "attributes.json"
    given = dict(data=web / "val", images=images, conditions=4, bootstrap=20, attributes=table)
    for place in (tmp_path, web / "attributes.json" / "x.json"):
        table.write_text(json.dumps(known))
        with pytest.raises(UserError, match=f"^--out {place} cannot be written"):
            evaluate(EvaluateConfig(**given, out=place))
    first = min(path.name for path in (web / "val").iterdir())
    table.write_text(json.dumps(known | {first: 3}))
    with pytest.raises(UserError, match=f"attributes.json says a int of group '{first}'"):
        evaluate(EvaluateConfig(**given))
    # what is not known of one group is no figure
    table.write_text(json.dumps(known | {first: {"palette": known[first]["palette"], "more": 1}}))
    row = evaluate(EvaluateConfig(**given))["figures"]["images"]
    assert {name for name in row if name.startswith("same_")} == {"same_palette"}


def test_options_of_sampling_say_nothing_to_pictures_that_are_there(tmp_path):
    for changed in (dict(guidance=3.0), dict(steps=5), dict(n=8), dict(seed=1)):
        (name,) = changed
        with pytest.raises(UserError, match=f"^--{name} says nothing to pictures that are there"):
            EvaluateConfig(data=tmp_path, images=tmp_path, **changed).check()
        EvaluateConfig(data=tmp_path, model=tmp_path, **changed).check()


def test_conditions_go_round_the_groups():
    groups = {"a": ("a0", "a1", "a2"), "b": ("b0",), "c": ("c0", "c1")}
    assert spread(groups, 5) == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1)]
    assert len(spread(groups, 99)) == 6


def test_on_topic_leaves_the_condition_itself_out():
    points = np.array([[0.0], [1.0], [10.0], [11.0]], np.float32)
    space = Space(
        lambda pictures: pictures.reshape(len(pictures), -1).astype(np.float32), points, ["a", "a", "b", "b"], {}
    )
    made = np.array([[0.0], [10.4]], np.float32)
    row = space.figures(made, [(0, "a"), (2, "b")], [0, 0])
    assert row["on_topic"] == 1.0 and row["diversity"] == pytest.approx(10.4)
    # without its own condition the nearest of 9.9 is 11, still the same group; of 5.4 from b it is 1
    assert space.figures(np.array([[5.4]], np.float32), [(2, "b")], None)["on_topic"] == 0.0


def test_goals_compare_each_figure():
    row = {"on_topic": 0.8, "same_shape_in_grey": 0.4, "diversity": 0.6}
    found = {
        g["figure"]: g["reached"] for g in goals({"figures": {"model": row}, "loss": {"right_below_shuffled": 0.3}})
    }
    assert found == {"loss_gain": True, "on_topic": True, "same_shape_in_grey": False, "diversity": True}


def test_the_report_escapes_what_it_shows(tmp_path):
    curves = plot({"a": ([1, 2], [3, 4])}, "x", "y")
    write_page(
        tmp_path / "r.html", "<t>", [Part("h", "<script>x</script>", columns=("a",), rows=(("<b>",),), svg=curves)]
    )
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page and "&lt;b&gt;" in page and "<svg" in page and "http" not in page.split("<svg")[0]


def test_the_demo_in_small_runs_and_repeats(tmp_path, monkeypatch):
    """Few steps: the whole path, its files, and the same figures when it is run again."""
    monkeypatch.setattr("semantica.benchmarks.quality.demo.CONDITIONS_PER_GROUP", 1)
    monkeypatch.setattr("semantica.benchmarks.quality.demo.VARIATIONS", 2)
    monkeypatch.setattr("semantica.benchmarks.quality.demo.SAMPLING_STEPS", 3)
    monkeypatch.setattr("semantica.benchmarks.quality.demo.LEVELS", 2)
    config = DemoConfig(out=tmp_path / "demo", steps=3, groups=8, compile=False)
    first = demo(config)
    names = {p.name for p in Path(config.out).iterdir()}
    made = {"grid.png", "engines.png", "metrics.json", "evaluation.json", "report.html"}
    # the page is there where npm is
    assert names - {"page"} == {"web", "run", "bundle"} | made
    assert set(first["figures"]) == {"model", "ignore the condition", "copy the condition", "real pictures"}
    assert first["figures"]["real pictures"]["on_topic"] >= 0.95 and len(first["goals"]) == 4
    page = (config.out / "report.html").read_text()
    assert ('href="page/index.html"' in page) == ("page" in names) and "The model in a browser" in page
    assert "data:image/png;base64," in page and "<svg" in page and 'src="http' not in page
    weights = (config.out / "run" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    # exported again it would be the same: what is repeated here is what comes before
    monkeypatch.setattr("semantica.benchmarks.quality.demo.export_bundle", lambda *_: None)
    again = demo(config)
    assert again["figures"] == first["figures"] and again["loss"] == first["loss"]
    assert (config.out / "run" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
