"""Folders of diffusers' pipelines sampled here: the same images as diffusers' own pipelines, prompts to numbers."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImageVariationPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizer

from semantica import UserError
from semantica.cli import main
from semantica.pipelines.sample import load_pipeline
from semantica.pipelines.unets import UNetPipeline
from semantica.tokens import ClipTokenizer

PROMPTS = ["two red bicycles at dusk", "a lighthouse; canvas"]
TEXTS = ["", "  Two RED   bicycles\n", "don't we'll it's 'tis", "naïve café 東京 12½ ²",
         "hello!!! ???...'s <|endoftext|>", "ΟΔΟΣ ΙΣΤΑΝΒΟΥΛ", "a\u0301 e\u0301", "x" * 200,
         "🙂 emoji_under-score 3.14"]  # fmt: skip
STOCK = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline,
         "variations": StableDiffusionImageVariationPipeline}  # fmt: skip


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))


@pytest.fixture(scope="module", params=STOCK)
def folder(request, foreign, tmp_path_factory):
    return request.param, foreign.write(tmp_path_factory.mktemp("foreign") / "model", request.param)


def test_prompts_become_the_numbers_of_transformers(foreign, tmp_path):
    path = foreign.tokenizer(tmp_path / "t")
    own, merges = ClipTokenizer(path), (path / "merges.txt").read_text().splitlines()[1:]
    theirs = CLIPTokenizer(json.loads((path / "vocab.json").read_text()), [tuple(m.split()) for m in merges],
                           model_max_length=own.length)  # fmt: skip
    expected = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="np").input_ids
    assert own(TEXTS).tolist() == expected.tolist()
    # the one file of newer folders
    theirs.save_pretrained(tmp_path / "new")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "new" / name).unlink(missing_ok=True)
    assert ClipTokenizer(tmp_path / "new")(TEXTS).tolist() == expected.tolist()
    (path / "merges.txt").unlink()
    with pytest.raises(UserError, match="merges.txt is missing"):
        ClipTokenizer(path)


@pytest.mark.parametrize("settings, special", [
    ({"pad_token": "!"}, None),
    ({"pad_token": "<|endoftext|>"}, {"pad_token": "!"}),
    ({"pad_token": "<|endoftext|>"}, {"pad_token": {"content": "!", "lstrip": False, "normalized": True,
                                                    "rstrip": False, "single_word": False}}),
    ({"pad_token": "<|endoftext|>", "added_tokens_decoder": {}}, {"pad_token": "!"}),
], ids=["SDXL's second", "SD 2", "SD 2 with more", "newer"])  # fmt: skip
def test_padding_and_its_word_within_prompts_are_those_of_transformers(foreign, tmp_path, settings, special):
    path = foreign.tokenizer(tmp_path / "t")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | settings))
    if special:
        (path / "special_tokens_map.json").write_text(json.dumps(special))
    theirs, own = CLIPTokenizer.from_pretrained(path), ClipTokenizer(path)
    prompts = [*TEXTS, "a cat", "a cat! of 1987!", "!", "wow !! x!y", "!!<|endoftext|>!"]
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=own.length)["input_ids"]
    assert own(prompts).tolist() == expected
    with pytest.raises(UserError, match="no text in UTF-8"):
        own(["a \udcff"])


def test_callbacks_see_the_timesteps_of_their_solver(foreign, tmp_path):
    pipe, seen = UNetPipeline.load(foreign.write(tmp_path / "model", "sd")), []
    for solver in ("dpmpp_2m", "ddim"):
        given = {"num_inference_steps": 4, "seed": 0, "solver": solver, "guidance_scale": 1.0}
        pipe("a", **given, callback_on_step_end=lambda _, i, t, kept: seen.append(int(t)) or kept)
    # DPM-Solver++ of diffusers counts the end of a run too
    assert seen == [801, 601, 401, 201, 751, 501, 251, 1]


def test_sdxl_folders_that_do_not_say_so_have_zeros_for_the_empty_prompt(foreign, tmp_path):
    path = foreign.write(tmp_path / "model", "xl")
    index = json.loads((path / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (path / "model_index.json").write_text(json.dumps(index))
    assert not UNetPipeline.load(path).unet.blank["text"].tokens.any()


def stock(kind, folder, **more):
    own = {} if kind != "variations" else {"feature_extractor": CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})}  # fmt: skip
    if kind != "xl":
        own |= {"safety_checker": None}
    if kind == "sd":
        own |= {"feature_extractor": None}
    pipe = STOCK[kind].from_pretrained(folder, local_files_only=True, **own, **more)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@torch.no_grad()
def test_images_are_those_of_diffusers_pipelines(folder, picture):
    kind, path = folder
    pipe = UNetPipeline.load(path)
    latents = torch.randn(2, *pipe.sample_shape, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 6, "guidance_scale": 4.0, "latents": latents}
    inputs = [picture, picture] if kind == "variations" else PROMPTS
    made = pipe(inputs, solver="ddim", output_type="pt", **options).images
    side = {} if kind == "variations" else {"height": 8 * 8, "width": 8 * 8}
    expected = stock(kind, path)(inputs, output_type="pt", **side, **options).images
    assert made.shape == expected.shape == (2, 3, 64, 64)
    assert float((made - expected).abs().max()) < 1e-3
    # the second sample differs by its prompt, not by its noise alone
    same = pipe(inputs[:1] * 2, solver="ddim", output_type="pt", **options).images
    assert kind == "variations" or float((made - same)[1].abs().max()) > 1e-3


@torch.no_grad()
def test_an_ip_adapter_is_what_diffusers_loads(foreign, tmp_path, picture):
    path = foreign.write(tmp_path / "model", "sd")
    weights = tmp_path / "ip" / "ip.safetensors"
    pipe = UNetPipeline.load(path, weights, 0.6)
    latents = torch.randn(2, *pipe.sample_shape, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "latents": latents, "output_type": "pt"}
    made = pipe({"text": PROMPTS, "image": [picture] * 2}, solver="ddim", **options).images
    theirs = stock("sd", path)
    theirs.load_ip_adapter(str(tmp_path), "ip", "ip.safetensors", image_encoder_folder="image_encoder")
    theirs.set_ip_adapter_scale(0.6)
    theirs.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    one = theirs(PROMPTS, ip_adapter_image=picture, height=64, width=64, **options).images
    assert float((made - one).abs().max()) < 1e-3
    without = UNetPipeline.load(path)(PROMPTS, solver="ddim", **options).images
    assert float((made - without).abs().max()) > 1e-3


def test_the_command_writes_pictures_of_prompts(folder, picture, tmp_path, capsys):
    kind, path = folder
    picture.save(tmp_path / "condition.png")
    given = ["--image", str(tmp_path / "condition.png")] if kind == "variations" else ["--prompt", *PROMPTS]
    arguments = ["sample", "--model", str(path), *given, "--steps", "2", "-n", "2", "--guidance", "3"]
    assert main([*arguments, "--out", str(tmp_path / "grid.png")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "single")]) == 0
    names = sorted(p.name for p in (tmp_path / "single").glob("*.png"))
    if kind == "variations":
        assert names == ["000-condition-0.png", "000-condition-1.png"]
    else:
        assert names[0] == "000-two-red-bicycles-at-dusk-0.png" and len(names) == 4
    assert Image.open(tmp_path / "single" / names[0]).size == (64, 64)
    assert json.loads((tmp_path / "grid.json").read_text())["steps"] == 2


def test_what_cannot_be_sampled_is_one_line(foreign, tmp_path, picture, capsys):
    path = foreign.write(tmp_path / "model", "sd")

    def said(*arguments, model=path):
        assert main(["sample", "--model", str(model), "--out", str(tmp_path / "o.png"), *arguments]) == 2
        return capsys.readouterr().err

    assert "--image and --prompt are empty" in said()
    picture.save(tmp_path / "p.png")
    both = ("--prompt", "x", "--image", str(tmp_path / "p.png"))
    assert "condition holds ['image', 'text']: expected {'text': ...}" in said(*both)
    assert "has 2 pictures for 3 prompts" in said("--prompt", "x", "y", "z", "--image", *[str(tmp_path / "p.png")] * 2)
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "unet has no safetensors weights" in said("--prompt", "x", model=broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"unet": ["mine", "Backdoor"]}))
    assert "asks for ['mine', 'Backdoor'] as unet" in said("--prompt", "x", model=broken)
    (broken / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    assert "holds a 'StableDiffusion3Pipeline'" in said("--prompt", "x", model=broken)
    for part, change, message in (
        ("unet", {"sample_size": [8, 12]}, "only squares are sampled"),
        ("vae", {"latents_mean": [0.1] * 4}, "latents_mean or latents_std"),
    ):
        other = tmp_path / part
        shutil.copytree(path, other)
        config = other / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        assert message in said("--prompt", "x", model=other)
    assert "--guidance is nan: give a number" in said("--prompt", "x", "--guidance", "nan")
    assert "is no safetensors file" in said("--prompt", "x", "--ip-adapter", str(tmp_path / "no.bin"))
    assert not (tmp_path / "o.png").exists()
    assert isinstance(load_pipeline(path, "cpu"), UNetPipeline)
