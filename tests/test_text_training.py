"""Training on texts, alone and beside pictures: gradients, exact continuation, prompts, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from semantica import Conditioner, SemanticaPipeline, UserError, UViT, ViTEncoder, WordEncoder
from semantica.cli import main
from semantica.pipelines.networks import NetworkPipeline
from semantica.train.config import TrainConfig
from semantica.train.loop import train
from semantica.train.objective import Objective

SMALL = ["--patch-size", "4", "--channels", "16", "--depths", "1", "--width", "32", "--depth", "2", "--heads", "2"]
COLOURS = ("red", "green", "blue", "black", "white", "grey")


@pytest.fixture(scope="module")
def web(photos, tmp_path_factory):
    """The pictures of `photos` with texts, some of them with two."""
    root = shutil.copytree(photos, tmp_path_factory.mktemp("texts") / "web")
    rows = []
    for path in sorted(root.glob("*/*.png")):
        file, colour, place = f"{path.parent.name}/{path.name}", COLOURS[int(path.parent.name[1:])], int(path.stem)
        rows.append({"file": file, "text": f"a {colour} picture, number {place}"})
        rows += [{"file": file, "text": f"{colour} noise"}] * (place % 2)
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(web, out, *options):
    common = ["--batch", "4", "--log-every", "1", "--save-every", "2", "--eval-every", "2", "--sample-every", "4",
              "--workers", "0", "--device", "cpu", "--precision", "fp32", "--held-out", "0.2"]  # fmt: skip
    return main(["train", "--data", str(web), "--out", str(out), *common, *SMALL, *map(str, options)])


@pytest.fixture(scope="module")
def runs(web, tmp_path_factory):
    """Two runs of four steps: on texts alone, and on pictures and texts."""
    made = {name: tmp_path_factory.mktemp(name) / "run" for name in ("text", "both")}
    for name, out in made.items():
        assert run(web, out, "--steps", 4, "--condition-on", name, "--conditioning", "both") == 0
    return made


def batch(names, count=3):
    generator = torch.Generator().manual_seed(0)
    images, noise, pictures = torch.randn(3, count, 3, 16, 16, generator=generator, dtype=torch.float64)
    numbers = torch.tensor([[1, 2, 0], [3, 0, 0], [2, 3, 1]])
    condition = {name: pictures if name == "image" else numbers for name in names}
    drop = torch.tensor([[False, True], [False, False], [True, False]])
    return condition, images, noise, torch.tensor([0.0, 1.0, -2.0]).double(), drop if len(names) == 2 else drop[:, 1]


@pytest.mark.parametrize("names", [("text",), ("image", "text")])
def test_gradients_of_a_step_are_those_of_finite_differences(names):
    torch.manual_seed(0)
    parts = {"image": ViTEncoder(16, 4, 32, 1, 1), "text": WordEncoder(("a", "b", "c"), 3, 16)}
    encoder = Conditioner({name: parts[name] for name in names})
    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=32, depth=2, heads=2, emb_dim=32,
        streams={name: parts[name].token_dim for name in names}, conditioning="both",
    )  # fmt: skip
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    objective, given = Objective(unet, encoder).double(), batch(names)
    losses, *_ = objective(*given)
    losses.mean().backward()
    for name, p in unet.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    # the loss of each sample does not depend on the others, whose conditions differ in what is dropped
    for i in range(3):
        one = [{n: v[i : i + 1] for n, v in given[0].items()}, *(value[i : i + 1] for value in given[1:])]
        torch.testing.assert_close(objective(*one)[0], losses[i : i + 1])
    # the objective takes v in fp32, which bounds what differences can show
    generator, step = torch.Generator().manual_seed(1), 1e-4
    parameters = [p for p in objective.parameters() if p.requires_grad]
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    expected = sum((p.grad * d).sum() for p, d in zip(parameters, along)).item()
    found = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, along):
                p.add_(sign * step * d)
            found.append(objective(*given)[0].mean().item())
    assert abs((found[0] - found[1]) / (2 * step) / expected - 1) < 5e-4


def rows(out):
    """The log without what is measured."""
    measured = ("images_per_s", "data_wait", "seconds", "mfu", "peak")
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in kept]


@pytest.mark.parametrize("name", ["text", "both"])
def test_a_run_on_texts_continues_to_the_bit(web, runs, name, tmp_path):
    out = tmp_path / "run"
    options = ("--condition-on", name, "--conditioning", "both")
    assert run(web, out, "--steps", 2, *options) == 0
    assert run(web, out, "--steps", 4, *options, "--accumulate", 1) == 0
    assert rows(out) == rows(runs[name])
    for path in sorted(runs[name].glob("*/**/*.safetensors")):
        whole, parted = load_file(path), load_file(out / path.relative_to(runs[name]))
        assert whole.keys() == parted.keys() and all(torch.equal(whole[k], parted[k]) for k in whole), path
    # of the six groups one is held out: there are no conditions of another
    assert any("held_out_loss" in row for row in rows(out))
    assert not any("held_out_loss_shuffled" in row for row in rows(out))
    # conditions above, texts below
    sheet = np.asarray(Image.open(out / "samples" / "step-00000004.png"))
    assert sheet.shape[0] > len(COLOURS) and (sheet == 0).any()


def test_a_run_folder_says_what_it_was_made_of(web, runs, capsys):
    index = json.loads((runs["both"] / "model_index.json").read_text())
    assert index["encoder"] == ["semantica", "Conditioner"]
    words = json.loads((runs["text"] / "encoder" / "text" / "config.json").read_text())
    # held-out pictures are of one colour, which no training text may have
    assert set(words["vocabulary"]) <= {"a", "noise", "number", "picture", "0", "1", "2", "3", *COLOURS}
    assert words["length"] == 5 and len(set(words["vocabulary"]) & set(COLOURS)) == 5
    config = json.loads((runs["both"] / "config.json").read_text())["train"]
    assert config["condition_on"] == "both" and config["drop_text"] == 0.1 and config["channels"] == [16]
    # the small trainable encoder is averaged; of words nothing is
    names = {path.stem for path in (runs["both"] / "checkpoints").glob("*/*.safetensors")}
    assert {"encoder", "ema_encoder"} <= names
    assert "encoder" not in {path.stem for path in (runs["text"] / "checkpoints").glob("*/*.safetensors")}
    # other texts are other data
    assert run(web, runs["text"], "--steps", 4, "--condition-on", "both", "--conditioning", "both") == 2
    assert "was made with --condition-on text, not both" in capsys.readouterr().err


def known(folder):
    return [
        w for w in json.loads((folder / "encoder" / "text" / "config.json").read_text())["vocabulary"] if w in COLOURS
    ]


def images(pipeline, *given, **named):
    return pipeline(*given, **named, num_inference_steps=3, output_type="pt", seed=1).images


def test_prompts_are_sampled_alone_or_beside_pictures(runs, photos, tmp_path, capsys):
    colour, other = known(runs["both"])[:2]
    pipeline, picture = NetworkPipeline.load(runs["both"]), Image.open(photos / "g0" / "0.png")
    prompts = [f"a {colour} picture", f"{other} noise"]
    assert pipeline.tokens_of(prompts[0], "picture") == (2,)
    both = images(pipeline, [picture, picture], prompt=prompts)
    alone, without = images(pipeline, prompt=prompts), images(pipeline, {"image": [picture] * 2, "text": None})
    assert len({array.numpy().tobytes() for array in (both, alone, without)}) == 3
    assert torch.equal(alone, images(pipeline, {"image": None, "text": prompts}))
    # as diffusers' pipeline, and accelerated, the same
    whole = SemanticaPipeline.from_pretrained(runs["both"])
    whole.set_progress_bar_config(disable=True)
    assert torch.equal(images(whole, prompt=prompts), alone)
    fast = NetworkPipeline.load(runs["both"]).accelerate(torch.float32, "none")
    torch.testing.assert_close(images(fast, prompt=prompts), alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(images(fast, [picture] * 2, prompt=prompts), both, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="has no image and no text: give at least one"):
        pipeline({"image": None, "text": None})
    for i, extra in enumerate((["--prompt", *prompts], ["--image", photos / "g0" / "0.png"])):
        given = ["--model", runs["both"], "--steps", 2, "--n", 2, "--device", "cpu", "--out", tmp_path / f"{i}.png"]
        assert main([str(a) for a in ("sample", *given, *extra)]) == 0
    assert Image.open(tmp_path / "0.png").size[1] > Image.open(tmp_path / "1.png").size[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a purple picture"], "word 'purple' is not among the"),
        (["--prompt", "a a a a a a"], "has 6 words: this model takes at most 5"),
        (["--prompt", "!"], "has no words"),
        (["--image", "{picture}"], "this model reads text, no pictures: leave pictures out"),
    ],
)
def test_prompts_that_cannot_be_sampled_are_one_line(runs, photos, tmp_path, capsys, options, message):
    options = [option.format(picture=photos / "g0" / "0.png") for option in options]
    out = tmp_path / "out.png"
    assert main(["sample", "--model", str(runs["text"]), "--out", str(out), "--device", "cpu", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--condition-on", "text", "--encoder", "facebook/dinov2-small"], "--encoder is for pictures as conditions"),
        (["--condition-on", "text", "--conditions", "2"], "--conditions is for pictures as conditions"),
        (["--text-encoder", "elsewhere"], "--text-encoder elsewhere is nothing without --condition-on text or both"),
        (["--condition-on", "text", "--text-encoder", "elsewhere"], "--text-encoder elsewhere is no folder"),
        (["--condition-on", "both", "--drop-text", "2"], "--drop-text is 2.0: give 0 to 1"),
        (["--condition-on", "text", "--heads", "3"], "width=32 must split into 3 heads"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(web, tmp_path, capsys, options, message):
    assert run(web, tmp_path / "run", "--steps", 1, *options) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and not (tmp_path / "run").exists()


def test_data_without_texts_is_refused(photos, tmp_path, capsys):
    assert run(photos, tmp_path / "run", "--steps", 1, "--condition-on", "text") == 2
    assert "captions.jsonl does not exist: write a line" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("encoder", "text", "message"), [
    ("words", "?!", "text '?!' has no words"),
    ("run", "a purple picture", "word 'purple' is not among the"),
    ("run", "a a a a a a", "has 6 words: this model takes at most 5"),
])  # fmt: skip
def test_a_text_that_cannot_be_read_ends_training_at_once(web, runs, tmp_path, capsys, encoder, text, message):
    root, kept = shutil.copytree(web, tmp_path / "web"), known(runs["text"])
    files = [path.relative_to(root).as_posix() for path in sorted(root.glob("*/*.png"))]
    # one of many texts, which the first step does not draw
    rows = [{"file": file, "text": f"a {kept[0]} picture"} for file in files] * 9 + [{"file": files[0], "text": text}]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = runs["text"] if encoder == "run" else encoder
    options = ("--condition-on", "text", "--text-encoder", source, "--held-out", "0")
    assert run(root, tmp_path / "run", "--steps", 1, *options) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and not (tmp_path / "run").exists()


def test_a_run_begins_with_one_that_reads_the_same_words(web, runs, tmp_path, capsys):
    """Frozen codes of words are what the denoiser's weights were trained on: of other words they say nothing."""
    options = ("--condition-on", "text", "--conditioning", "both", "--held-out", "0", "--steps", "1")
    begin = ("--init", runs["text"])
    # all six colours are known here, of which that run knows five
    assert run(web, tmp_path / "run", *options, *begin) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"another WordEncoder than this run: give --text-encoder {runs['text']}") and "\n" not in said
    assert run(web, tmp_path / "run", *options, *begin, "--text-encoder", "phrases") == 2
    assert not (tmp_path / "run").exists()
    # the same training texts, and the encoder itself
    assert run(web, tmp_path / "same", *options, *begin, "--held-out", "0.2") == 0
    root, kept = shutil.copytree(web, tmp_path / "web"), known(runs["text"])
    files = [path.relative_to(root).as_posix() for path in sorted(root.glob("*/*.png"))]
    rows = [{"file": file, "text": f"a {kept[0]} picture"} for file in files]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(root, tmp_path / "other", *options, *begin, "--text-encoder", runs["text"]) == 0


def test_pictures_in_one_folder_are_told_of_the_mode_that_takes_them(web, tmp_path, capsys):
    single = tmp_path / "single"
    shutil.copytree(web / "g0", single / "g0")
    texts = [line for line in (web / "captions.jsonl").read_text().splitlines() if '"g0/' in line]
    (single / "captions.jsonl").write_text("\n".join(texts))
    for root, said in ((web / "g0", "put them into label folders, or"), (single, "hold out a fraction of 0, or")):
        assert run(root, tmp_path / "run", "--steps", 1, "--condition-on", "text") == 2
        line = capsys.readouterr().err.strip()
        assert line.endswith(f"{said} train with --mode reconstruct, which needs no pairs") and "\n" not in line


def test_a_run_of_words_does_not_export(runs, tmp_path, capsys):
    assert main(["export", "--model", str(runs["text"]), "--out", str(tmp_path / "bundle")]) == 2
    assert "cannot be exported: a bundle's are fixed" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_attention_stands_on_the_grid_that_options_ask_for(web, tmp_path):
    from semantica.train.build import build

    for patch, side in ((1, 16), (2, 8)):
        config = TrainConfig(data=str(web), out=tmp_path, patch_size=patch, channels=(32,), depths=(1,), depth=1)
        unet, *_ = build(config, torch.device("cpu"))
        assert unet.config.image_size == 32 and len(unet.rope_cos) == side**2 and len(unet.transformer_blocks) == 1


@pytest.mark.slow
def test_clip_s_text_tower_trains_samples_and_exports_with_its_tokenizer(web, foreign, tmp_path):
    sd = foreign.write(tmp_path / "sd", "sd")
    out = tmp_path / "run"
    assert run(web, out, "--steps", 2, "--condition-on", "both", "--text-encoder", sd) == 0
    shutil.rmtree(sd)
    pipeline, picture = NetworkPipeline.load(out), Image.open(web / "g0" / "0.png")
    assert pipeline.tokens_of("two red bicycles", "bicycles") == (3,)
    expected = images(pipeline, picture, prompt="two red bicycles")
    assert (images(pipeline, picture, prompt="a lighthouse") - expected).abs().max() > 0
    bundle = tmp_path / "bundle"
    assert main(["export", "--model", str(out), "--out", str(bundle), "--levels", "2", "--steps", "2"]) == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["tokenizers"] == {"text": ["tokenizer_text"]} and manifest["inputs"]["text"] == [foreign.LENGTH]
    for backend in ("onnxruntime", "torch"):
        made = SemanticaPipeline.from_bundle(bundle, backend)
        torch.testing.assert_close(images(made, picture, prompt="two red bicycles"), expected, rtol=0, atol=1e-3)
    with pytest.raises(UserError, match="a bundle takes all of image, text: give each"):
        images(made, prompt="two red bicycles")
    # the same texts again, by the folder of the run
    again = tmp_path / "again"
    assert run(web, again, "--steps", 1, "--condition-on", "text", "--text-encoder", out) == 0
    assert (again / "encoder" / "text" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_stored_tokens_of_pictures_go_with_texts(home, stored, tmp_path):
    root = shutil.copytree(home / "photos", tmp_path / "photos")
    files = [path.relative_to(root).as_posix() for path in sorted(root.glob("*/*.png"))]
    (root / "captions.jsonl").write_text(
        "".join(json.dumps({"file": f, "text": f"group {f[1]}"}) + "\n" for f in files)
    )
    options = ("--condition-on", "both", "--encoder", home / "dino", "--encoder-size", 28, "--steps", 2)
    options += ("--crop", "centre", "--no-flip")
    kept, computed = tmp_path / "kept", tmp_path / "computed"
    assert run(root, kept, *options, "--tokens", stored) == 0
    assert run(root, computed, *options) == 0
    one, two = ([row["loss"] for row in rows(out) if "loss" in row] for out in (kept, computed))
    # tokens are stored in fp16
    np.testing.assert_allclose(one, two, rtol=1e-3)
    assert (kept / "encoder" / "image").is_dir() and Path(kept / "encoder" / "text").is_dir()


def test_a_run_on_texts_that_holds_nothing_out_shows_training_samples(web, tmp_path):
    config = TrainConfig(
        data=str(web), out=tmp_path / "run", steps=1, batch=2, condition_on="text", mode="reconstruct", workers=0,
        device="cpu", precision="fp32", patch_size=4, channels=(16,), depths=(1,), width=32, depth=1, heads=1,
        held_out=0.0, sample_every=1,
    )  # fmt: skip
    assert train(config) == config.out and (config.out / "samples" / "step-00000001.png").is_file()
