"""PIE-Bench, DreamBench and DreamBench++ in miniature copies: what is read, scores with known answers, bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from semantica.benchmarks.quality.published.clip import Clip
from semantica.benchmarks.quality.published.dreambench import read_subjects
from semantica.benchmarks.quality.published.pie_bench import Edit, read_edits
from semantica.benchmarks.quality.published.preservation import mse, psnr, ssim
from semantica.cli import main
from semantica.features import colour_and_shape
from semantica.images import fit, load_image

SIDE = 24


@pytest.fixture(scope="module")
def clip(foreign, tmp_path_factory):
    """A small CLIP in the files of openai/clip-vit-large-patch14."""
    folder = foreign.tokenizer(tmp_path_factory.mktemp("clip") / "model")
    words = len(json.loads((folder / "vocab.json").read_text()))
    torch.manual_seed(0)
    text = dict(vocab_size=words, hidden_size=32, max_position_embeddings=foreign.LENGTH, bos_token_id=words - 2,
                eos_token_id=words - 1, **foreign.ALL)  # fmt: skip
    vision = dict(hidden_size=32, image_size=32, patch_size=8, **foreign.ALL)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def noise(seed, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


@pytest.fixture
def pie(tmp_path):
    """Three edits: of the left third, of everything, and of a square; PNGs under the names of JPEGs."""
    square = [n for row in range(8, 16) for n in (row * SIDE + 8, 8)]
    masks = {"000000000000": [n for row in range(SIDE) for n in (row * SIDE, 8)], "911000000001": [0, SIDE * SIDE + 9],
             "111000000002": square}  # fmt: skip
    places = {"000000000000": "0_random_140/000000000000.jpg",
              "911000000001": "9_change_style_80/1_artificial/1_animal/911000000001.jpg",
              "111000000002": "1_change_object_80/1_artificial/1_animal/111000000002.jpg"}  # fmt: skip
    mapping, root, made = {}, tmp_path / "pie", tmp_path / "made"
    for i, (name, path) in enumerate(places.items()):
        mapping[name] = {
            "image_path": path, "original_prompt": "two [red] bicycles", "editing_prompt": "two [blue] bicycles",
            "editing_instruction": "make them blue", "editing_type_id": name[0], "blended_word": "bicycles bicycles",
            "mask": masks[name],
        }  # fmt: skip
        place = root / "annotation_images" / path
        save(place.with_suffix(".png"), noise(i))
        place.with_suffix(".png").rename(place)
        save((made / path).with_suffix(".png"), noise(i))
    (root / "mapping_file.json").write_text(json.dumps(mapping))
    return root, made


def table(capsys, *arguments):
    assert main(["bench", *map(str, arguments), "--bootstrap", "20", "--device", "cpu"]) == 0
    return capsys.readouterr().out


def said(capsys, *arguments):
    capsys.readouterr()
    assert main(["bench", *map(str, arguments)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and not line.endswith(":\n")
    return line


def test_ssim_is_that_of_torchmetrics_and_psnr_follows_from_mse():
    """Figures of torchmetrics 1.9.0 on these very pictures, data_range 1."""
    a, b = noise(0, 20) / 255, noise(1, 20) / 255
    assert ssim(a, a) == pytest.approx(1, abs=1e-12) and mse(a, a) == 0 and np.isnan(psnr(0.0))
    assert ssim(a, b) == pytest.approx(0.013970186552299814, abs=1e-9)
    assert ssim(a, 0.7 * a + 0.3 * b) == pytest.approx(0.8867935153293675, abs=1e-9)
    # constant pictures: the formula of the means alone
    x, y = np.full((11, 11, 3), 0.2), np.full((11, 11, 3), 0.6)
    assert ssim(x, y) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-12)
    assert mse(x, y) == pytest.approx(0.16) and psnr(0.16) == pytest.approx(7.9588, abs=1e-4)


def test_masks_are_runs_with_the_border_set():
    runs = Edit("0", "", "", "", "", "", "0", (7, 2, 20, 99)).region(5, 5)
    expected = np.zeros(25, bool)
    expected[[7, 8, 20, 21, 22, 23, 24]] = True
    expected = expected.reshape(5, 5)
    expected[[0, -1]] = expected[:, [0, -1]] = True
    assert np.array_equal(runs, expected) and runs.sum() == 18


def test_pie_bench_scores_what_lies_outside_the_mask(pie, clip, capsys, tmp_path):
    root, made = pie
    first, whole, square = (made / edit.path for edit in read_edits(root))
    # a change within its mask, any change where all may change, and 51 of 255 everywhere for the square
    inside, everywhere = noise(0), noise(2).astype(int)
    inside[:, :8] = 0
    save(first.with_suffix(".png"), inside)
    save(whole.with_suffix(".png"), noise(77))
    up = np.where(everywhere < 128, everywhere + 51, everywhere - 51).astype(np.uint8)
    save(square.with_suffix(".png"), up)
    shown = table(capsys, "pie-bench", "--data", root, "--images", made, "--clip", clip)
    result = json.loads((tmp_path / "pie-bench.json").read_text())
    row = result["rows"]["edited"]
    # of 24 x 24 the border of 92 pixels and the square of 64 are black in both
    error = 0.04 * (SIDE * SIDE - 92 - 64) / SIDE**2
    assert row["mse"]["value"] == pytest.approx((0 + error) / 2) and row["mse"]["pictures"] == 2
    assert row["psnr"] == {"value": pytest.approx(-10 * np.log10(error)), "low": None, "high": None, "pictures": 1}
    assert row["identical"] == 1 and "1 of 3 edited pictures are the same as their source" in shown
    assert result["types"]["0"]["ssim"]["value"] == pytest.approx(1) and "mse" not in result["types"]["9"]
    assert result["rows"]["source, unedited"]["identical"] == 2
    # by transformers' own model, of the prompt without brackets
    model, judge = CLIPModel.from_pretrained(clip).eval(), Clip(clip, "cpu")
    numbers = torch.from_numpy(judge.tokenizer(["two blue bicycles"]))
    pictures = [noise(77), up * read_edits(root)[2].region(SIDE, SIDE)[..., None]]
    seen = judge.prepare.prepare([Image.fromarray(picture) for picture in pictures])
    with torch.no_grad():
        out = model(input_ids=numbers, pixel_values=((seen + 1) / 2 - judge.prepare.mean) / judge.prepare.std)
        expected = 100 * (out.logits_per_image[:, 0] / model.logit_scale.exp()).clamp(min=0)
    assert result["types"]["9"]["clip"]["value"] == pytest.approx(float(expected[0]), abs=1e-4)
    assert result["types"]["1"]["clip_edited"]["value"] == pytest.approx(float(expected[1]), abs=1e-4)
    one = table(capsys, "pie-bench", "--data", root, "--images", made, "--types", "1", "--out", tmp_path / "one.json")
    assert "1 change object" in one and "9 change style" not in one


def test_bad_input_of_pie_bench_is_one_line(pie, clip, capsys, tmp_path):
    root, made = pie
    given = ("pie-bench", "--data", root, "--images", made)
    path = root / "mapping_file.json"
    good = json.loads(path.read_text())
    for change, line in (
        ({"mask": [3]}, "has no mask in runs"),
        ({"mask": [-1, 4]}, "has no mask in runs"),
        ({"mask": [SIDE * SIDE, 1]}, "is of a larger picture than 24 x 24"),
        ({"editing_prompt": 3}, "has no editing_prompt"),
        ({"image_path": "../../x.jpg"}, "outside of annotation_images"),
        ({"image_path": "0_random_140/7.jpg"}, "1 of 3 edited pictures are not in"),
    ):
        path.write_text(json.dumps(good | {"000000000000": good["000000000000"] | change}))
        assert line in said(capsys, *given)
    path.write_text(json.dumps(good))
    assert "has no edits of type 4, only 0, 1, 9" in said(capsys, *given, "--types", "4")
    assert "no mapping_file.json and annotation_images" in said(capsys, "pie-bench", "--data", made, "--images", made)
    assert "is not a folder: give that of the edited" in said(capsys, "pie-bench", "--data", root, "--images", path)
    assert "--bootstrap is 3" in said(capsys, *given, "--bootstrap", "3")
    assert "has no config.json: give the folder of a CLIP model" in said(capsys, *given, "--clip", made)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert "holds a 'bert': expected 'clip'" in said(capsys, *given, "--clip", other)
    (other / "config.json").write_text((clip / "config.json").read_text())
    (other / "pytorch_model.bin").write_bytes(b"")
    assert "has no safetensors weights: other files are never read" in said(capsys, *given, "--clip", other)
    save((made / good["000000000000"]["image_path"]).with_suffix(".png"), noise(0, 12))
    assert "is 12 x 12, its source in mapping_file.json 24 x 24" in said(capsys, *given)
    assert not (tmp_path / "pie-bench.json").exists()


LISTED = """Classes

subject_name,class
backpack_dog,backpack
dog2,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a santa hat'.format(unique_token, class_token)
]
"""


@pytest.fixture
def dreambench(tmp_path):
    root = tmp_path / "dataset"
    for subject, seeds in (("backpack_dog", (1, 2, 3)), ("dog2", (4, 5))):
        for i, seed in enumerate(seeds):
            save(root / subject / f"{i:02d}.jpg", noise(seed, 32))
    (root / "prompts_and_classes.txt").write_text(LISTED)
    return root


def test_subjects_and_prompts_are_those_of_either_benchmark(dreambench, tmp_path):
    bag, dog = read_subjects(dreambench.parent)
    assert bag.prompts == ("a backpack in the jungle", "a red backpack") and len(bag.pictures) == 3
    assert dog.prompts == ("a dog wearing a santa hat",) and [p.name for p in dog.pictures] == ["00.jpg", "01.jpg"]
    plus = tmp_path / "plus" / "data"
    for place, lines in (("live_subject/animal/00", "Kitten\na kitten in the snow\na kitten, oil\n"),
                         ("object/03", "Red Car\na red car at dusk\n")):  # fmt: skip
        save(plus / "images" / f"{place}.jpg", noise(6, 32))
        (plus / "captions" / place).parent.mkdir(parents=True, exist_ok=True)
        (plus / "captions" / f"{place}.txt").write_text(lines)
    kitten, car = read_subjects(plus.parent)
    assert kitten.name == "live_subject_animal_00_kitten" and kitten.prompts[1] == "a kitten, oil"
    assert car.name == "object_03_red_car" and car.pictures == (plus / "images" / "object" / "03.jpg",)


def judged(path):
    described = colour_and_shape(fit(load_image(path), 224)[None])[0]
    return described / np.linalg.norm(described)


def test_dreambench_scores_are_mean_cosines(dreambench, clip, capsys, tmp_path):
    made = tmp_path / "samples" / "tgt_image"
    named = {"backpack_dog/0_0": 10, "backpack_dog/0_1": 11, "backpack_dog/1_0": 12, "dog2/0_0": 13}
    for name, seed in named.items():
        save(made / f"{name}.png", noise(seed, 32))
    given = ("dreambench", "--data", dreambench, "--images", made.parent, "--clip", clip)
    assert "generated" in table(capsys, *given, "--features", "colour-and-shape")
    result = json.loads((tmp_path / "dreambench.json").read_text())
    judge = Clip(clip, "cpu")
    real = {s.name: judge.pictures(s.pictures) for s in read_subjects(dreambench)}
    texts = {s.name: judge.texts(s.prompts) for s in read_subjects(dreambench)}
    pairs, prompts = [], []
    for name in named:
        subject, place = name.split("/")
        own = judge.pictures([made / f"{name}.png"])[0]
        pairs.append(np.mean([own @ other for other in real[subject]]))
        prompts.append(own @ texts[subject][int(place[0])])
    row = result["rows"]["generated"]
    assert row["clip_i"]["value"] == pytest.approx(np.mean(pairs), abs=1e-6) and row["pictures"] == 4
    assert row["clip_t"]["value"] == pytest.approx(np.mean(prompts), abs=1e-6)
    distinct = [np.mean([a @ b for j, b in enumerate(v) if i != j]) for v in real.values() for i, a in enumerate(v)]
    assert result["rows"]["real pictures"]["clip_i"]["value"] == pytest.approx(np.mean(distinct), abs=1e-6)
    # two subjects, drawn again with all their pictures: the interval is as wide as their means are apart, or less
    apart, found = abs(np.mean(pairs[:3]) - pairs[3]), row["clip_i"]
    assert found["low"] < found["value"] < found["high"] and found["high"] - found["low"] <= apart + 1e-6
    # by another encoder, of which directions count
    seen = {path: judged(path) for path in made.rglob("*.png")}
    own = [np.mean([seen[made / f"{name}.png"] @ judged(other) for other in s.pictures])
           for s in read_subjects(dreambench) for name in named if name.startswith(s.name)]  # fmt: skip
    assert row["encoder_i"]["value"] == pytest.approx(np.mean(own), abs=1e-6)
    (made / "dog2" / "0_0.png").unlink()
    assert "1 prompts have no picture in" in said(capsys, *given)
    assert table(capsys, *given, "--subjects", "backpack_dog")
    save(made / "backpack_dog" / "2_0.png", noise(1, 32))
    assert "is of no prompt: name it P_I, P from 0 to 1" in said(capsys, *given)
    assert "--subjects 'cat' is none of" in said(capsys, *given, "--subjects", "cat")
    assert "nothing judges: give --features" in said(capsys, *given[:5])
    assert "neither prompts_and_classes.txt nor images" in said(capsys, "dreambench", "--data", made, *given[3:])
    (dreambench / "prompts_and_classes.txt").write_text("Classes\n\n../up,cat\n" + LISTED.partition("\n\n")[2])
    assert "has a subject '../up'" in said(capsys, *given)
    (dreambench / "prompts_and_classes.txt").write_text("nothing")
    assert "lists no subjects" in said(capsys, *given)
