"""LoRAs added to the weights of diffusers' pipelines: the networks that diffusers makes of the same files."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

from semantica import UserError
from semantica.cli import main
from semantica.export.config import ExportConfig
from semantica.export.foreign import additions
from semantica.pipelines.lora import add_lora
from semantica.pipelines.unets import UNetPipeline, part_of

peft = pytest.importorskip("peft")
FILE = "pytorch_lora_weights.safetensors"
UNET = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "time_emb_proj"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
STOCK = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}


def drawn(folder, kind):
    """A LoRA of a folder's UNet and text encoders, as diffusers' training scripts save it."""
    names, given = ["unet", "text_encoder", *(["text_encoder_2"] if kind == "xl" else [])], {}
    torch.manual_seed(1)
    for name in names:
        model = part_of(folder, name)
        alpha = {"lora_alpha": 8 if name == "unet" else 2, "init_lora_weights": False}
        model.add_adapter(peft.LoraConfig(r=4, target_modules=UNET if name == "unet" else TEXT, **alpha))
        state = peft.get_peft_model_state_dict(model)
        given[f"{name}_lora_layers"] = state if name == "unet" else convert_state_dict_to_diffusers(state)
        given[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    STOCK[kind].save_lora_weights(folder.with_name("lora"), **given)
    return folder.with_name("lora") / FILE


@pytest.fixture(scope="module", params=STOCK)
def made(request, foreign, tmp_path_factory):
    folder = foreign.write(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return request.param, folder, drawn(folder, request.param)


def networks(folder, kind):
    return {name: part_of(folder, name) for name in ("unet", "text_encoder", "text_encoder_2")[: 2 + (kind == "xl")]}


def weights(models):
    return {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


def kohya(path, out):
    """The same file as kohya's scripts write it."""
    found, prefixes = {}, {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    ends = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"}
    ends |= {f"lora_linear_layer.{way}.weight": f"lora_{way}" for way in ("down", "up")}
    for key, value in load_file(path).items():
        part, rest = key.split(".", 1)
        end = next(end for end in ends if rest.endswith(end))
        stem = rest.removesuffix(f".{end}")
        stem = stem if part == "unet" or stem.startswith("text_model") else f"text_model.{stem}"
        name = f"{prefixes[part]}_{stem.replace('.', '_')}"
        found |= {f"{name}.{ends[end]}.weight": value, f"{name}.alpha": torch.tensor(8.0 if part == "unet" else 2.0)}
    save_file(found, out)
    return out


@torch.no_grad()
def test_weights_are_those_that_diffusers_fuses(made, tmp_path):
    kind, folder, path = made
    before, models = weights(networks(folder, kind)), networks(folder, kind)
    add_lora(models, path, 0.5)
    found = weights(models)
    assert set(found) == set(before)
    pipe = STOCK[kind].from_pretrained(folder, local_files_only=True, **({} if kind == "xl" else {
        "safety_checker": None, "feature_extractor": None}))  # fmt: skip
    pipe.load_lora_weights(path.parent, weight_name=FILE)
    pipe.fuse_lora(components=list(models), lora_scale=0.5)
    pipe.unload_lora_weights()
    expected = weights({name: getattr(pipe, name) for name in models})
    changed = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert any(name.startswith("text_encoder.") for name in changed) and len(changed) > 40
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    other = networks(folder, kind)
    add_lora(other, kohya(path, tmp_path / "kohya.safetensors"), 0.5)
    again = weights(other)
    assert max(float((found[name] - again[name]).abs().max()) for name in found) < 1e-6


def test_the_command_takes_it(made, tmp_path, capsys):
    kind, folder, path = made
    before = UNetPipeline.load(folder).unet
    after = UNetPipeline.load(folder, lora=path).unet
    assert {type(m) for m in after.modules()} == {type(m) for m in before.modules()}
    arguments = ["sample", "--model", str(folder), "--prompt", "a", "--steps", "1", "-n", "1", "--lora", str(path)]
    assert main([*arguments, "--lora-scale", "0.5", "--out", str(tmp_path / "o.png")]) == 0
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["lora_scale"] == 0.5
    # the default of the kind of pipeline
    assert record["guidance"] == (5.0 if kind == "xl" else 7.5)
    assert not [line for line in capsys.readouterr().err.splitlines() if line.strip()]


def test_a_bundle_says_what_went_into_its_weights(tmp_path):
    for name in ("style", "face"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    lora, adapter = tmp_path / "style.safetensors", tmp_path / "face.safetensors"
    config = ExportConfig(tmp_path, tmp_path / "out", lora=lora, lora_scale=0.5)
    # the name, no place of this machine
    record = {"file": "style.safetensors", "sha256": hashlib.sha256(b"style").hexdigest(), "scale": 0.5}
    assert additions(config) == {"additions": {"lora": record}}
    both = replace(config, ip_adapter=adapter, ip_scale=0.7)
    other = {"file": "face.safetensors", "sha256": hashlib.sha256(b"face").hexdigest(), "scale": 0.7}
    assert additions(both) == {"additions": {"ip_adapter": other, "lora": record}}
    assert additions(ExportConfig(tmp_path, tmp_path / "out")) == {}


BROKEN = {
    "another model": (lambda key, value: (key.replace("down_blocks.0", "down_blocks.7"), value), "are none of unet's"),
    "another width": (lambda key, value: (key, value.repeat(2, *[1] * (value.ndim - 1)) if "B" in key else value),
                      "does not fit this model"),
    "Flux": (lambda key, value: (key.replace("unet.", "transformer."), value), "expected a LoRA of unet, text"),
    "DoRA": (lambda key, value: (key.replace("conv1.lora_A.weight", "conv1.dora_scale"), value), "no LoRA of two"),
    "half of it": (lambda key, value: (key.replace("lora_B", "x.lora_A"), value), "two matrices for each layer"),
}  # fmt: skip


@pytest.mark.parametrize("made", ["sd"], indirect=True)
@pytest.mark.parametrize("change, said", BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_one_line(made, tmp_path, change, said):
    kind, folder, path = made
    save_file(dict(change(*item) for item in load_file(path).items()), tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=said) as raised:
        add_lora(networks(folder, kind), tmp_path / "broken.safetensors")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("made", ["sd"], indirect=True)
def test_files_that_are_no_safetensors_are_never_read(made, tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"")
    (tmp_path / "lora.safetensors").write_bytes(b"xx")
    for name, said in (("lora.bin", "is no safetensors file"), ("lora.safetensors", "does not fit")):
        with pytest.raises(UserError, match=said):
            add_lora(networks(made[1], made[0]), tmp_path / name)
