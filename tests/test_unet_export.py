"""Bundles of diffusers' pipelines: through the gate, and sampled where torch cannot be imported."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from semantica import UserError
from semantica.cli import main
from semantica.engines import load_engine, open_bundle
from semantica.engines.bundle import MANIFEST
from semantica.export import gate
from semantica.export.builders.tensorrt import BUILDER
from semantica.export.config import ExportConfig
from semantica.export.gate import Gate
from semantica.export.program import Captured
from semantica.files import entries
from semantica.fused.conditioned import PreparedAttnProcessor
from semantica.pipelines.bundle import BundlePipeline
from semantica.pipelines.unets import UNetPipeline

FEW = ["--levels", "3", "--steps", "2"]
PROMPTS = ["two red bicycles", "a lighthouse"]
# one level each: what is captured is the same code
FLAT = {
    "block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",), "attention_head_dim": 2,
}  # fmt: skip
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "diffusers"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
from semantica.cli import main

sys.exit(main(sys.argv[1:]))
"""


def exported(folder, out, *options: str):
    assert main(["export", "--model", str(folder), "--out", str(out), *FEW, *options]) == 0
    return out


def without_torch(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def images(folder, bundle, inputs, ip=(None, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """Of the folder in torch, and of the bundle in ONNX Runtime, from the same noise."""
    pipes = UNetPipeline.load(folder, *ip), BundlePipeline(load_engine(bundle))
    made = [pipe(inputs, num_inference_steps=4, guidance_scale=4.0, seed=1, output_type="np").images for pipe in pipes]
    return tuple(np.asarray(array) for array in made)


@pytest.fixture(scope="module")
def made(foreign, tmp_path_factory):
    root = tmp_path_factory.mktemp("unets")
    folder = foreign.write(root / "model", "sd", vae={"block_out_channels": (16,)}, **FLAT)
    return folder, exported(folder, root / "bundle")


def test_a_bundle_gives_the_folders_images_without_torch(made, tmp_path):
    folder, path = made
    expected, actual = images(folder, path, PROMPTS)
    assert actual.shape == expected.shape == (2, 8, 8, 3) and np.abs(actual - expected).max() < 1e-3
    assert np.abs(actual[0] - actual[1]).max() > 0.05
    same = ["--prompt", *PROMPTS, "--steps", "2", "-n", "1", "--guidance", "4"]
    without_torch("sample", "--model", str(path), *same, "--out", str(tmp_path / "bundle.png"))
    assert main(["sample", "--model", str(folder), *same, "--out", str(tmp_path / "folder.png")]) == 0
    pair = [np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("bundle", "folder")]
    assert np.abs(pair[0] - pair[1]).max() <= 1


def test_graphs_hold_the_keys_and_nothing_is_projected_again(made):
    folder, path = made
    bundle = open_bundle(path)
    for name in ("condition.onnx", "denoise.onnx", "decode.onnx"):
        onnx.checker.check_model(str(path / name), full_check=True)
    unet = UNetPipeline.load(folder).unet.unet
    crossings = [m for m in unet.modules() if isinstance(getattr(m, "processor", None), PreparedAttnProcessor)]
    denoise = onnx.load(path / "denoise.onnx", load_external_data=False)
    keys = [value.name for value in denoise.graph.input if value.name.startswith("k.")]
    assert len(keys) == len(crossings) == bundle.shapes["blocks"]
    assert bundle.manifest["attention"] == [[attn.heads, attn.inner_dim // attn.heads] for attn in crossings]
    # projections of the text are in the condition's graph only
    weights = {tensor.name for tensor in denoise.graph.initializer}
    assert weights and not [name for name in weights if "attn2.to_k" in name or "attn2.to_v" in name]
    counts = bundle.manifest["graphs"]["denoise.onnx"]["nodes"]
    assert counts["GroupNormalization"] == sum(isinstance(m, torch.nn.GroupNorm) for m in unet.modules())
    rows = bundle.manifest["parity"]
    assert set(rows) == {"onnxruntime", "native"} and all(row["decode_error"] < 2e-5 for row in rows.values())
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "decode.onnx"} <= set(bundle.manifest["files"])


def test_a_bundle_that_was_changed_or_is_asked_for_more_is_one_line(made, tmp_path):
    _, path = made
    pipe = BundlePipeline(load_engine(path))
    with pytest.raises(UserError, match="a prompt is a int: give text"):
        pipe([3])
    with pytest.raises(UserError, match="in torch, sample the folder that it came from"):
        load_engine(path, "torch")
    with pytest.raises(UserError, match="latents has shape"):
        pipe.decode(np.zeros((1, 4, 2, 2), np.float32))
    manifest = json.loads((path / MANIFEST).read_text())
    for change, message in (
        ({"attention": [[2]]}, "impossible heads"),
        ({"tokenizers": {"text": ["elsewhere"]}}, "tokenizers that are not there"),
        ({"decode": 0}, "a decoder of no size"),
    ):
        broken = tmp_path / message.split()[0] / "bundle"
        broken.mkdir(parents=True)
        (broken / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=message):
            open_bundle(broken)
    # what a tokenizer would read without a hash
    shutil.copytree(path, tmp_path / "more")
    (tmp_path / "more/tokenizer/special_tokens_map.json").write_text('{"pad_token": "a"}')
    with pytest.raises(UserError, match="special_tokens_map.json has no hash"):
        open_bundle(tmp_path / "more")
    del manifest["files"]["tokenizer/vocab.json"]
    (tmp_path / "more/tokenizer/special_tokens_map.json").unlink()
    (tmp_path / "more" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="vocab.json has no hash"):
        open_bundle(tmp_path / "more")


def test_a_twin_that_fails_half_way_is_gone(tmp_path):
    gate = Gate.__new__(Gate)
    gate.folder, gate.problem = tmp_path / "bundle", None
    with pytest.raises(FileNotFoundError):
        gate.files(Captured("bf16", *(None,) * 4, (), ()))
    assert not list(tmp_path.iterdir())


def test_a_scale_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ip-scale is nothing without --ip-adapter"):
        ExportConfig(tmp_path, tmp_path / "out", ip_scale=0.5).check()


def test_a_faulty_decoder_is_refused(made):
    folder, path = made
    pipe, engine = UNetPipeline.load(folder), load_engine(path)
    latents = torch.randn(1, *pipe.sample_shape, generator=torch.Generator().manual_seed(0))
    assert gate.decoded(engine, pipe.decode, latents, "fp32") < 2e-5
    pipe.vae.decoder.conv_out.bias.data += 0.1
    with pytest.raises(gate.ArtifactError, match="decode_error .* the decoder differs"):
        gate.decoded(engine, pipe.decode, latents, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("kind, precision, bound", [("xl", "fp16", 0.05), ("variations", "fp32", 1e-3)])
def test_other_pipelines(foreign, tmp_path, kind, precision, bound):
    folder = foreign.write(tmp_path / "model", kind)
    path = exported(folder, tmp_path / "bundle", "--precision", precision)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    expected, actual = images(folder, path, [picture] if kind == "variations" else PROMPTS)
    assert np.abs(actual - expected).max() < bound
    assert open_bundle(path).manifest["files"] == entries(path, open_bundle(path).manifest["files"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_ip_adapter_goes_into_the_graphs(foreign, tmp_path, precision):
    folder = foreign.write(tmp_path / "model", "sd")
    weights = tmp_path / "ip" / "ip.safetensors"
    given = ["--ip-adapter", str(weights), "--ip-scale", "0.6", "--precision", precision]
    path = exported(folder, tmp_path / "bundle", *given)
    assert open_bundle(path).manifest["streams"] == {"text": 12, "image": 4}
    assert "program" in open_bundle(path).manifest["parity"]
    if precision == "fp16":
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
        inputs = {"text": PROMPTS, "image": [picture] * 2}
        expected, actual = images(folder, path, inputs, (weights, 0.6))
        assert np.abs(actual - expected).max() < 0.05
        other, _ = images(folder, path, inputs, (weights, 0.0))
        assert np.abs(other - expected).max() > 10 * np.abs(actual - expected).max()


def test_tensorrt_refuses_what_it_would_build_without_a_decoder(made):
    with pytest.raises(UserError, match="is of a diffusers pipeline, which tensorrt does not build so far"):
        BUILDER.check(open_bundle(made[1]))
