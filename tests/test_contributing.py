"""What CONTRIBUTING.md promises: each thing is added through one public call, and all that reads its table takes it.

`contributed.py` adds one of each in a single file outside the package; here each is used as a user would.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
STORED, ROOT = HERE / "stored", HERE.parent
KINDS = ("operator", "engine", "solver", "encoder", "text stream", "data source", "guider", "preset", "verb")


@pytest.fixture(scope="module")
def extended():
    """A function that runs a verb of the extended command; returns what it printed."""

    def run(*arguments: object, code: int = 0) -> str:
        command = [sys.executable, "-P", str(HERE / "contributed.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), np.int16) for path in sorted(folder.glob("*.png"))])


CONDITION = STORED / "images" / "condition-0.png"
SAMPLE = ("--image", CONDITION, "--n", 2, "--steps", 4, "--seed", 3, "--device", "cpu")


def test_an_operator_is_timed_and_shown(extended, tmp_path):
    rows = tmp_path / "rows.json"
    shown = extended("bench", "kernels", "--op", "squared_relu", "--quick", "--device", "cpu", "--json", rows)
    assert "squared_relu" in shown
    found = [row["extra_info"] for row in json.loads(rows.read_text())["benchmarks"]]
    assert {row["op"] for row in found} == {"squared_relu"}
    assert {row["shape"] for row in found} == {"(64, 256)"}
    assert {row["direction"] for row in found} == {"forward", "backward"}
    # 4 bytes a number in fp32: one read and one written
    forward = next(row for row in found if row["direction"] == "forward" and row["dtype"] == "float32")
    assert forward["effective_bytes"] == 64 * 256 * 4 * 2 and forward["flops"] == 2 * 64 * 256
    assert re.search(r"squared_relu, cpu +plain torch", extended("doctor"))


def test_an_engine_and_a_solver_sample(extended, tmp_path):
    shown = extended("sample", "--model", STORED / "bundle", "--engine", "traced", "--solver", "euler", *SAMPLE,
                     "--out", tmp_path / "bundle")  # fmt: skip
    assert "traced engine" in shown
    extended("sample", "--model", STORED / "run", "--solver", "euler", *SAMPLE, "--out", tmp_path / "run")
    extended("sample", "--model", STORED / "run", "--solver", "ddim", *SAMPLE, "--out", tmp_path / "ddim")
    made = {name: pixels(tmp_path / name) for name in ("bundle", "run", "ddim")}
    assert made["run"].shape == (2, 32, 32, 3)
    # euler's method in these coordinates is ddim; pixels that lie at a border between levels may round either way
    assert abs(made["run"] - made["ddim"]).max() <= 1 and abs(made["bundle"] - made["run"]).max() <= 1
    doctor = extended("doctor")
    assert re.search(r"traced +", doctor)
    assert "'--engine nothing' is invalid" in extended(
        "sample", "--model", STORED / "run", "--engine", "nothing", *SAMPLE, code=2
    ).replace("argument --engine: invalid choice 'nothing'", "'--engine nothing' is invalid")


def test_a_source_a_preset_and_a_verb(extended, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "data.npy", pictures)
    shown = extended(
        "train", "--data", tmp_path / "data.npy", "--out", tmp_path / "run", "--preset", "micro", "--steps", 2,
        "--batch", 4, "--held-out", 0.3, "--workers", 0, "--device", "cpu", "--log-every", 1, "--eval-every", 2,
    )  # fmt: skip
    assert "16 pictures in an array; held out: 8 pictures in an array" in shown
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert any("held_out_loss" in row for row in rows)
    assert "micro" in extended("doctor", "--presets")
    # tokens of the source, and training on them
    extended("pairs", "--tokens", tmp_path / "data.npy", "--encoder", tmp_path / "run", "--out", tmp_path / "tokens")
    options = ("--tokens", tmp_path / "tokens", "--encoder", tmp_path / "run", "--preset", "micro", "--workers", 0)
    extended("train", "--data", tmp_path / "data.npy", "--out", tmp_path / "second", "--steps", 1, "--batch", 4,
             "--device", "cpu", *options)  # fmt: skip
    assert (tmp_path / "second" / "model_index.json").exists()

    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    assert "1 pictures" in extended("count", "--folder", tmp_path)
    assert re.search(r"^  count +count the pictures of a folder$", extended("--help"), re.M)


def test_an_encoder_of_texts_is_a_stream_of_its_own(tmp_path):
    import torch

    contributed = load()
    from semantica import Conditioner, SemanticaPipeline, SemanticaScheduler, UViT, ViTEncoder

    torch.manual_seed(0)
    streams = {"image": 32, "text": 24}
    unet = UViT(image_size=16, channels=(32,), depths=(1,), width=64, depth=1, heads=2, emb_dim=32, streams=streams)
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pictures = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1)
    encoders = Conditioner({"image": pictures, "text": contributed.Letters()})
    pipeline = SemanticaPipeline(unet, encoders, SemanticaScheduler(16, reference=16))
    pipeline.save_pretrained(tmp_path / "run")
    again = SemanticaPipeline.from_pretrained(tmp_path / "run")
    again.set_progress_bar_config(disable=True)
    picture = Image.open(CONDITION)

    def made(text: str, **options):
        inputs = {"image": picture, "text": text}
        return again(inputs, num_inference_steps=3, output_type="pt", seed=0, **options).images

    assert torch.equal(made("a red cross"), made("a red cross"))
    assert (made("a red cross") - made("three blue rings")).abs().max() > 1e-3
    # a guider of one's own: half the scale of classifier-free guidance, by another way
    half, averaged = made("a red cross", guidance_scale=0.5), made("a red cross", guider=contributed.Averaged())
    assert (half - averaged).abs().max() < 1e-5


def load():
    import importlib

    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module("contributed")
    finally:
        sys.path.remove(str(HERE))


def test_the_guide_names_every_kind_and_at_most_two_files():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| (?:an? )?([a-z ]+) \| (.+?) \|", guide, re.M))
    assert set(KINDS) <= set(rows)
    for kind in KINDS:
        files = re.findall(r"`([a-z_/]+(?:\.py|/))`", rows[kind])
        assert 1 <= len(files) <= 2, (kind, files)
        for name in files:
            assert (ROOT / name).exists() or "NAME" in name, name


def test_the_extension_reads_public_names_only():
    tree = ast.parse((HERE / "contributed.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert not [name for name in names if name.startswith("_")]
