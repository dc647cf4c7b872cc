"""`semantica doctor --model FOLDER`: what is replaced in a folder of diffusers, from its configurations alone."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, UNetMotionModel

from semantica.cli import main
from semantica.fused.published import MODELS
from semantica.fused.survey import survey


def written(folder, parts: dict, others: dict | None = None):
    """A pipeline's folder without any weights."""
    index = {"_class_name": "StableDiffusionPipeline", **(others or {})}
    for name, (kind, config) in parts.items():
        with torch.device("meta"):
            kind(**config).save_config(folder / name)
        index[name] = ["diffusers", kind.__name__]
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


OTHERS = {"text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "DDIMScheduler"],
          "safety_checker": [None, None]}  # fmt: skip


def test_stable_diffusion(tmp_path, capsys):
    public = MODELS["sd-1.5"]
    models = {"unet": (UNet2DConditionModel, public.unet), "vae": (AutoencoderKL, public.vae)}
    folder = written(tmp_path / "sd", models, OTHERS)
    counts = {(row.component, row.parts): row.count for row in survey(folder)}
    assert counts == {
        ("unet", "residual block"): 22, ("unet", "norm"): 17, ("unet", "cross-attention"): 16,
        ("unet", "self-attention"): 16, ("vae", "residual block"): 24, ("vae", "norm"): 4, ("vae", "self-attention"): 2,
    }  # fmt: skip
    assert main(["doctor", "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "cross-attention" in out and "fused on GPUs" in out and "AutoencoderKL" in out


def test_one_model_and_what_stays(tmp_path):
    config = {"norm_num_groups": 6, "block_out_channels": (24, 48), "attention_head_dim": 2, "act_fn": "gelu",
              "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 8,
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    written(tmp_path, {"unet": (UNet2DConditionModel, config)})
    found = {(row.parts, row.what) for row in survey(tmp_path / "unet")}
    assert ("residual block", "as it was: its activation is GELU, not SiLU") in found
    assert ("cross-attention", "as it was: head dim 12 is no multiple of 8 from 16 to 160") in found


def test_code_of_a_folder_is_not_run(tmp_path):
    public = {"vae": (AutoencoderKL, MODELS["sd-1.5"].vae)}
    written(tmp_path, public, {"unet": ["my_unet", "MyUNet"]})
    (tmp_path / "my_unet.py").write_text("raise SystemExit('run')")
    row = next(row for row in survey(tmp_path) if row.component == "unet")
    assert row.what == "not looked at: my_unet is code of its own"


def test_bad_folders_are_one_line(tmp_path, capsys):
    def said(folder) -> str:
        assert main(["doctor", "--model", str(folder)]) == 2
        out = capsys.readouterr()
        assert out.err.count("\n") == 1 and "Traceback" not in out.err
        return out.err

    assert "is not a folder" in said(tmp_path / "nowhere")
    assert "config.json cannot be read as JSON (FileNotFoundError)" in said(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json holds a list: expected a JSON object" in said(tmp_path)
    written(tmp_path, {"vae": (AutoencoderTiny, {})})
    assert "nothing to replace" in said(tmp_path)
    written(tmp_path, {"vae": (AutoencoderKL, MODELS["sd-1.5"].vae)})
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").touch()
    assert "vae/diffusion_pytorch_model.bin is refused: only safetensors are read" in said(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").touch()
    assert main(["doctor", "--model", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"down_block_types": ["Nothing"] * 4}))
    assert "config.json makes no AutoencoderKL: Nothing does not exist" in said(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": [], "vae": ["diffusers", 3], "other": ["x"]}))
    assert "nothing to replace" in said(tmp_path)
    assert main(["doctor", "--presets", "--model", str(tmp_path)]) == 2
    assert "--presets and --model are a table each" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_models_over_time_stay(tmp_path):
    small = {"block_out_channels": (32, 32), "cross_attention_dim": 8, "norm_num_groups": 8, "layers_per_block": 1,
             "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "num_attention_heads": 2,
             "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
             "motion_num_attention_heads": 2}  # fmt: skip
    vae = (AutoencoderKL, MODELS["sd-1.5"].vae)
    written(tmp_path, {"unet": (UNetMotionModel, small), "vae": vae})
    row = next(row for row in survey(tmp_path) if row.component == "unet")
    assert row.what.startswith("as it was: UNetMotionModel has layers over time (")
