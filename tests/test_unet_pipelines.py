"""Folders of diffusers' pipelines sampled here: the same images as diffusers' own pipelines, prompts to numbers."""

import contextlib
import inspect
import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImageVariationPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    VersatileDiffusionImageVariationPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPTokenizer

from semantica import UserError
from semantica.cli import main
from semantica.fused.survey import survey
from semantica.pipelines.kinds import at_once
from semantica.pipelines.sample import load_pipeline
from semantica.pipelines.unets import UNetPipeline, part_of
from semantica.tokens import ClipTokenizer

PROMPTS = ["two red bicycles at dusk", "a lighthouse; canvas"]
TEXTS = ["", "  Two RED   bicycles\n", "don't we'll it's 'tis", "naïve café 東京 12½ ²",
         "hello!!! ???...'s <|endoftext|>", "ΟΔΟΣ ΙΣΤΑΝΒΟΥΛ", "a\u0301 e\u0301", "x" * 200,
         "🙂 emoji_under-score 3.14"]  # fmt: skip
STOCK = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline,
         "variations": StableDiffusionImageVariationPipeline,
         "versatile": VersatileDiffusionImageVariationPipeline}  # fmt: skip
# those that read pictures
PICTURES = ("variations", "versatile")


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


def test_what_of_a_prompt_is_not_read_is_said(foreign, tmp_path, caplog):
    own = ClipTokenizer(foreign.tokenizer(tmp_path / "t"))
    words = "two red bicycles and a lighthouse on a cliff at dusk, zebra quartz"
    caplog.set_level("WARNING", "semantica")
    made = own([words, "two red bicycles"])
    [said] = [record.getMessage() for record in caplog.records]
    kept = words[: words.index(said.rpartition("left out: ")[2].strip("'"))]
    assert f"{own.length - 2} are read" in said and len(kept) > 10
    # what is kept, alone, gives the same numbers
    assert own([kept]).tolist() == made[:1].tolist() and len(caplog.records) == 1
    # once in a process
    assert own([words]).tolist() == made[:1].tolist() and len(caplog.records) == 1
    own([words + " again"])
    assert len(caplog.records) == 2


def test_weights_that_are_missing_are_never_drawn(foreign, tmp_path):
    path = foreign.write(tmp_path / "model", "sd")
    for part in ("unet", "vae", "text_encoder"):
        file = next((path / part).glob("*.safetensors"))
        whole = load_file(file)
        name = next(name for name in whole if name.endswith("norm2.weight"))
        save_file({key: value for key, value in whole.items() if key != name}, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"{part} has no {name}, one of 1 missing weights"):
            part_of(path, part)
        save_file(whole | {name: whole[name][:5].clone()}, file, {"format": "pt"})
        with pytest.raises(UserError, match=rf"{part} has {name} of shape \[5\], its config.json says"):
            part_of(path, part)
        # such as the position_ids of old folders
        save_file(whole | {"more": torch.zeros(1)}, file, {"format": "pt"})
        assert torch.equal(part_of(path, part).state_dict()[name], whole[name])


def test_an_ip_adapter_that_does_not_fit_is_one_line(foreign, tmp_path):
    path = foreign.write(tmp_path / "model", "sd")
    weights = tmp_path / "ip" / "ip.safetensors"
    whole = load_file(weights)
    wider = {"image_proj.proj.weight": torch.zeros(4 * foreign.TEXT, foreign.PICTURE + 1)}
    narrower = {name: value[:, :5].clone() for name, value in whole.items() if name.endswith("_ip.weight")}
    for change, said in (
        (wider, "reads another image encoder than"),
        (narrower, "does not fit this UNet"),
        ({"ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 2)}, "as those that read faces"),
        ({"more": torch.zeros(1)}, "that is no IP-Adapter"),
    ):
        save_file(whole | change, weights)
        with pytest.raises(UserError, match=said) as raised:
            UNetPipeline.load(path, weights)
        assert "\n" not in str(raised.value)


WRONG = [
    ("text_encoder/config.json", {"attention_dropout": "x"}, "text_encoder/config.json makes no CLIPTextModel"),
    ("text_encoder/config.json", {"eos_token_id": None}, "cannot be loaded"),
    ("unet/config.json", {"attention_head_dim": 0}, "unet/config.json makes no UNet2DConditionModel"),
    ("unet/config.json", {"act_fn": None}, "unet/config.json makes no UNet2DConditionModel"),
    ("unet/config.json", {"sample_size": 0}, "has sample_size 0"),
    ("unet/config.json", {"in_channels": 5, "out_channels": 5}, "has conv_in.weight of shape"),
    ("vae/config.json", {"scaling_factor": None}, "scaling_factor and shift_factor"),
    ("model_index.json", {"_class_name": []}, "holds a []"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "give numbers"),
]  # fmt: skip


def test_configurations_that_make_nothing_are_one_line(foreign, tmp_path):
    path = foreign.write(tmp_path / "model", "sd")
    for name, change, said in WRONG:
        whole = (path / name).read_text()
        (path / name).write_text(json.dumps(json.loads(whole) | change))
        with pytest.raises(UserError, match=re.escape(said)) as raised:
            UNetPipeline.load(path)
        assert "\n" not in str(raised.value)
        (path / name).write_text(whole)
    for value in (0, -1, None, "x"):
        config = json.loads((path / "unet/config.json").read_text()) | {"attention_head_dim": value}
        (path / "unet/config.json").write_text(json.dumps(config))
        # it may also make another network
        with contextlib.suppress(UserError):
            survey(path)


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
    place = "image_feature_extractor" if kind == "versatile" else "feature_extractor"
    own = {} if kind not in PICTURES else {place: CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})}  # fmt: skip
    if kind in ("sd", "variations"):
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
    inputs = [picture, picture] if kind in PICTURES else PROMPTS
    made = pipe(inputs, solver="ddim", output_type="pt", **options).images
    side = {} if kind in PICTURES else {"height": 8 * 8, "width": 8 * 8}
    expected = stock(kind, path)(inputs, output_type="pt", **side, **options).images
    assert made.shape == expected.shape == (2, 3, 64, 64)
    assert float((made - expected).abs().max()) < 1e-3
    # the second sample differs by its prompt, not by its noise alone
    same = pipe(inputs[:1] * 2, solver="ddim", output_type="pt", **options).images
    assert kind in PICTURES or float((made - same)[1].abs().max()) > 1e-3


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
    given = ["--image", str(tmp_path / "condition.png")] if kind in PICTURES else ["--prompt", *PROMPTS]
    arguments = ["sample", "--model", str(path), *given, "--steps", "2", "-n", "2", "--guidance", "3"]
    assert main([*arguments, "--out", str(tmp_path / "grid.png")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "single")]) == 0
    names = sorted(p.name for p in (tmp_path / "single").glob("*.png"))
    if kind in PICTURES:
        assert names == ["000-condition-0.png", "000-condition-1.png"]
    else:
        assert names[0] == "000-two-red-bicycles-at-dusk-0.png" and len(names) == 4
    assert Image.open(tmp_path / "single" / names[0]).size == (64, 64)
    assert json.loads((tmp_path / "grid.json").read_text())["steps"] == 2


def test_what_is_not_named_is_as_in_diffusers_and_fits_into_memory(folder, picture, tmp_path):
    kind, path = folder
    pipe, seen = load_pipeline(path, "cpu"), []
    given = [picture] if kind in PICTURES else ["a"]
    pipe.unet.unet.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    assert pipe.guidance == inspect.signature(STOCK[kind].__call__).parameters["guidance_scale"].default
    fixed = {"seed": 1, "num_inference_steps": 1, "output_type": "np"}
    assert np.array_equal(pipe(given, **fixed).images, pipe(given, guidance_scale=pipe.guidance, **fixed).images)
    assert seen == [2, 2]
    # latents of 8 x 8 here, of 64 and 128 in public models
    assert pipe.max_samples == 64 and [at_once(side) for side in (64, 96, 128, 4096)] == [16, 7, 4, 1]
    pipe.max_samples = 2
    pipe(given, 3, guidance_scale=1.0, **fixed)
    assert seen[2:] == [2, 1]


def test_the_precision_is_the_one_that_was_asked_for(foreign, tmp_path, capsys):
    path = foreign.write(tmp_path / "model", "sd")
    exact = load_pipeline(path, "cpu")
    for part in ("unet", "vae", "text_encoder"):
        # a folder of half precision alone
        for file in (path / part).glob("*.safetensors"):
            half = {name: value.half() for name, value in load_file(file).items()}
            save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
            file.unlink()
    fixed = {"seed": 1, "num_inference_steps": 2, "output_type": "np", "guidance_scale": 4.0}
    expected = exact(PROMPTS, **fixed).images
    for precision, dtype, bound in (("auto", torch.float32, 0.01), ("bf16", torch.bfloat16, 0.1)):
        pipe = load_pipeline(path, "cpu", precision=precision)
        assert pipe.unet.dtype == dtype and pipe.vae.dtype == pipe.encoder.dtype == torch.float32
        assert 0 < np.abs(pipe(PROMPTS, **fixed).images - expected).max() < bound
    for options, said in (
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 is for GPUs"),
        (["--engine", "onnxruntime"], "runs a bundle"),
        (["--engine", "torch-compile", "--precision", "fp16", "--device", "cpu"], "--precision fp16 is for GPUs"),
    ):
        given = ["sample", "--model", str(path), "--prompt", "x", "--out", str(tmp_path / "o.png")]
        assert main([*given, *options]) == 2 and said in capsys.readouterr().err


def test_what_cannot_be_sampled_is_one_line(foreign, tmp_path, picture, capsys):
    path = foreign.write(tmp_path / "model", "sd")

    def said(*arguments, model=path):
        assert main(["sample", "--model", str(model), "--out", str(tmp_path / "o.png"), *arguments]) == 2
        return capsys.readouterr().err

    assert "--image and --prompt are empty" in said()
    picture.save(tmp_path / "p.png")
    both = ("--prompt", "x", "--image", str(tmp_path / "p.png"))
    assert "this model reads text, no pictures: leave pictures out" in said(*both)
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
