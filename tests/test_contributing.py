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
from PIL import Image

HERE = Path(__file__).parent
STORED, ROOT = HERE / "stored", HERE.parent
KINDS = ("operator", "engine", "solver", "encoder", "text stream", "data source", "guider", "preset", "verb")


RUN = """
import contextlib, io, json, sys
import contributed
from semantica.cli import main

for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(arguments)
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


def python(code: str, *arguments: object, given: str = "") -> str:
    """What another Python prints that finds `contributed`: what it adds must not be here in other tests."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)], input=given, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def extended(*commands: tuple) -> list[str]:
    """What each of some commands of the extended program says, one after the other in one process."""
    lines = python(RUN, given=json.dumps([list(map(str, command)) for command in commands])).splitlines()
    said = [json.loads(line) for line in lines if line.startswith("[")]
    assert [code for code, _ in said] == [0] * len(commands), said
    return [text for _, text in said]


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), np.int16) for path in sorted(folder.glob("*.png"))])


CONDITION = STORED / "images" / "condition-0.png"
SAMPLE = ("--image", CONDITION, "--n", 2, "--steps", 4, "--seed", 3, "--device", "cpu")


def test_an_operator_an_engine_a_solver_and_a_verb(tmp_path):
    rows, (run, bundle) = tmp_path / "rows.json", (STORED / "run", STORED / "bundle")
    bench, doctor, traced, *_, counted, usage = extended(
        ("bench", "kernels", "--op", "squared_relu", "--quick", "--device", "cpu", "--json", rows),
        ("doctor",),
        ("sample", "--model", bundle, "--engine", "traced", "--solver", "euler", *SAMPLE, "--out", tmp_path / "bundle"),
        ("sample", "--model", run, "--solver", "euler", *SAMPLE, "--out", tmp_path / "run"),
        ("sample", "--model", run, "--solver", "ddim", *SAMPLE, "--out", tmp_path / "ddim"),
        ("count", "--folder", STORED / "images"),
        ("--help",),
    )
    # an operator is timed, and told of
    assert "squared_relu" in bench and re.search(r"squared_relu, cpu +plain torch", doctor)
    found = [row["extra_info"] for row in json.loads(rows.read_text())["benchmarks"]]
    assert {(row["op"], row["shape"]) for row in found} == {("squared_relu", "(64, 256)")}
    assert {row["direction"] for row in found} == {"forward", "backward"}
    forward = next(row for row in found if row["direction"] == "forward" and row["dtype"] == "float32")
    # 4 bytes a number in fp32: one read and one written
    assert forward["effective_bytes"] == 64 * 256 * 4 * 2 and forward["flops"] == 2 * 64 * 256
    # an engine and a solver sample; euler's method in these coordinates is ddim, up to how a pixel is rounded
    assert "traced engine" in traced and re.search(r"^ .* traced +", doctor, re.M)
    made = {name: pixels(tmp_path / name) for name in ("bundle", "run", "ddim")}
    assert made["run"].shape == (2, 32, 32, 3)
    assert abs(made["run"] - made["ddim"]).max() <= 1 and abs(made["bundle"] - made["run"]).max() <= 1
    assert counted == "22 pictures\n"
    assert re.search(r"^  count +count the pictures of a folder$", usage, re.M)


def test_a_source_and_a_preset(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "data.npy", pictures)
    data, run, tokens = tmp_path / "data.npy", tmp_path / "run", tmp_path / "tokens"
    common = ("--data", data, "--preset", "micro", "--batch", 4, "--workers", 0, "--device", "cpu", "--log-every", 1)
    trained, presets, _, stored = extended(
        ("train", *common, "--out", run, "--steps", 2, "--held-out", 0.3, "--eval-every", 2),
        ("doctor", "--presets"),
        ("pairs", "--tokens", data, "--encoder", run, "--out", tokens),
        ("train", *common, "--out", tmp_path / "second", "--steps", 1, "--tokens", tokens, "--encoder", run),
    )
    assert "16 pictures in an array; held out: 8 pictures in an array" in trained and "micro" in presets
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert any("held_out_loss" in row for row in rows)
    assert (tmp_path / "second" / "model_index.json").exists() and "done" in stored


TEXTS = """
import sys
import torch
from PIL import Image
import contributed
from semantica import Conditioner, SemanticaPipeline, SemanticaScheduler, UViT, ViTEncoder

torch.manual_seed(0)
streams = {"image": 32, "text": 24}
unet = UViT(image_size=16, channels=(32,), depths=(1,), width=64, depth=1, heads=2, emb_dim=32, streams=streams)
for parameter in unet.parameters():
    parameter.data += 0.05 * torch.randn_like(parameter)
pictures = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1)
encoders = Conditioner({"image": pictures, "text": contributed.Letters()})
SemanticaPipeline(unet, encoders, SemanticaScheduler(16, reference=16)).save_pretrained(sys.argv[1])
pipeline = SemanticaPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
picture = Image.open(sys.argv[2])


def made(text, **options):
    inputs = {"image": picture, "text": text}
    return pipeline(inputs, num_inference_steps=3, output_type="pt", seed=0, **options).images


one = made("a red cross")
half, averaged = made("a red cross", guidance_scale=0.5), made("a red cross", guider=contributed.Averaged())
differences = one - made("a red cross"), one - made("three blue rings"), half - averaged
print(*(difference.abs().max().item() for difference in differences))
"""


def test_an_encoder_of_texts_is_a_stream_of_its_own_and_a_guider_guides(tmp_path):
    done = python(TEXTS, tmp_path / "run", CONDITION)
    again, other_words, guided = map(float, done.split())
    # the mean of both predictions is classifier-free guidance of scale 1/2
    assert again == 0 and other_words > 1e-3 and guided < 1e-5


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
