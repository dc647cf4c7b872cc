"""The networks of public UNets from their bundles: the same bits, whatever was put into them; mistakes are one line."""

import copy
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from semantica import UserError
from semantica.cli import main
from semantica.engines import Bundle, load_engine
from semantica.engines.bundle import DECODE, MANIFEST, WEIGHTS
from semantica.export.config import ExportConfig
from semantica.export.foreign import copy_tokenizers, describe
from semantica.export.onnx import write_weights
from semantica.export.program import examples, in_precision
from semantica.export.rebuild import rebuilt, unet_of
from semantica.files import sha256
from semantica.fused.published import Adapter, adapter_weights
from semantica.model.conditioner import encode
from semantica.pipelines.bundle import BundlePipeline
from semantica.pipelines.unets import UNetPipeline

PROMPTS = ["two red bicycles", "a lighthouse"]
# one level each: what is captured is the same code
FLAT = {
    "block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",), "attention_head_dim": 2, "vae": {"block_out_channels": (16,)},
}  # fmt: skip
WITHOUT = """
import sys
from semantica.cli import main

code = main(sys.argv[1:])
assert not {"semantica.fused", "semantica.kernels", "diffusers", "transformers"} & {*sys.modules}
sys.exit(code)
"""


def without_graphs(folder, out, precision="fp32", **added):
    """The pipeline of a folder in a precision, and its bundle without what is never read here."""
    out.mkdir()
    config = ExportConfig(folder, out, precision, **added)
    pipe = UNetPipeline.load(folder, **added)
    manifest = describe(config, pipe, SimpleNamespace(sizes=pipe.unet.null(1).sizes))
    pipe.unet, pipe.encoder, pipe.vae = (in_precision(part, precision) for part in (pipe.unet, pipe.encoder, pipe.vae))
    write_weights({"unet": pipe.unet, "encoder": pipe.encoder, "vae": pipe.vae}, out / WEIGHTS)
    copy_tokenizers(config, manifest, out)
    # as it is read again
    return pipe, Bundle(out, json.loads(json.dumps(manifest | {"files": {DECODE: {}}})))


@torch.no_grad()
def computed(pipe):
    """What the three graphs of a bundle compute, of the same inputs."""
    for part in (pipe.unet, pipe.encoder, pipe.vae):
        for weight in part.parameters():
            # of weights mapped from a file, products round by where they lie in it
            weight.data = weight.data.clone()
    inputs = {name: value.to(pipe.unet.dtype) if value.is_floating_point() else value
              for name, value in examples(pipe.encoder, 2).items()}  # fmt: skip
    made = pipe.unet.condition(encode(pipe.encoder, pipe.unet.stream_names, inputs))
    z = torch.randn(2, *pipe.sample_shape, generator=torch.Generator().manual_seed(0))
    v = pipe.unet(z, torch.tensor([-3.0, 2.0]), made)
    return [*made.keys, *made.values, made.emb, v, pipe.decode(z)]


@pytest.mark.parametrize(
    "kind, precision, adapted",
    [("sd", "fp32", True), ("sd", "bf16", True), ("xl", "bf16", False), ("variations", "bf16", False)],
)
def test_networks_come_back_to_the_bit(foreign, tmp_path, kind, precision, adapted):
    folder = foreign.write(tmp_path / "model", kind)
    added = {"ip_adapter": tmp_path / "ip" / "ip.safetensors", "ip_scale": 0.6} if adapted else {}
    pipe, bundle = without_graphs(folder, tmp_path / "bundle", precision, **added)
    again = rebuilt(bundle)
    for part in ("unet", "encoder", "vae"):
        own, other = (getattr(p, part).state_dict() for p in (pipe, again))
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own), part
        kinds = ([type(m) for m in getattr(p, part).modules()] for p in (pipe, again))
        assert next(kinds) == next(kinds), part
        # what is compiled is that, and no copy
        assert in_precision(getattr(again, part), precision) is getattr(again, part)
    assert again.unet.stream_names == pipe.unet.stream_names and again.sample_shape == pipe.sample_shape
    assert all(torch.equal(a, b) for a, b in zip(computed(pipe), computed(again), strict=True))
    if adapted:
        path = added["ip_adapter"]
        record = {"file": "ip.safetensors", "sha256": sha256(path), "scale": 0.6}
        assert bundle.manifest["additions"] == {"ip_adapter": record}
        assert {scale for own in bundle.manifest["model"]["scales"] for scale in own} == {0.6}
        # of the adapter's weight nothing but the manifest tells
        bundle.manifest["model"]["scales"] = [[0.1]] * bundle.shapes["blocks"]
        assert not torch.equal(computed(pipe)[-2], computed(rebuilt(bundle))[-2])


def full_projection(seen, width):
    """An IP-Adapter that reads every token of its encoder, as those of faces that are published as "full"."""
    shapes = {"proj.0": (seen, seen), "proj.2": (width, seen), "proj.3": (width,)}
    return {f"{name}.{end}": torch.randn(shape[: 1 + (end == "weight" and len(shape) > 1)])
            for name, shape in shapes.items() for end in ("weight", "bias")}  # fmt: skip


@pytest.mark.parametrize("kind", ["ip-adapter", "ip-adapter-plus", "full"])
@pytest.mark.parametrize("projected", [False, True], ids=["", "beside a projection of the text"])
def test_every_kind_of_adapter_is_known_by_its_weights(foreign, kind, projected):
    text = {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"} if projected else {}
    unet = UNet2DConditionModel(**foreign.UNET | {k: v for k, v in FLAT.items() if k != "vae"} | text).eval()
    given = adapter_weights(unet, Adapter(4, 20, 1 if kind == "ip-adapter" else 5, heads=1, inner=16))
    if kind == "full":
        given["image_proj"] = full_projection(20, unet.config.cross_attention_dim)
    scales = [[1.0]] * (len(unet.attn_processors) // 2)
    unet._load_ip_adapter_weights([given])
    weights = unet.state_dict()
    again = unet_of(dict(unet.config), weights, scales, (12, 4))
    assert again.load_state_dict(weights) and again.config.encoder_hid_dim_type == "ip_image_proj"
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 12, 24 if projected else foreign.TEXT)
    pictures = [torch.randn(1, 1, 20) if kind == "ip-adapter" else torch.randn(1, 1, 5, 20)]
    made = [net.eval()(*inputs, added_cond_kwargs={"image_embeds": pictures}).sample for net in (unet, again)]
    assert torch.equal(*made)


@pytest.fixture(scope="module")
def adapted(foreign, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapted")
    folder = foreign.write(root / "model", "sd", **FLAT)
    return without_graphs(folder, root / "bundle", ip_adapter=root / "ip" / "ip.safetensors")[1]


def older(model):
    del model["encoder"]["settings"]


def code(model):
    model["encoder"]["settings"]["text"]["towers"][0]["auto_map"] = {"AutoModel": "evil.Model"}


def other_encoder(model):
    model["encoder"]["parts"]["text"] = "Popen"


def other_tower(model):
    model["encoder"]["settings"]["text"]["towers"][0]["class"] = "AutoModel"


def other_unet(model):
    model["unet"]["class"] = "UNet3DConditionModel"


def wider(model):
    model["unet"]["block_out_channels"] = [64]


def impossible(model):
    model["unet"]["norm_num_groups"] = 7


def unscaled(model):
    del model["scales"]


def no_width(model):
    model["encoder"]["settings"]["image"]["tower"]["hidden_size"] = None


BROKEN = {
    older: "does not describe its encoders, as those of older versions: export it again",
    code: "names code to run",
    other_encoder: "asks for other code as its encoder",
    other_tower: "asks for other code as its encoder",
    other_unet: "asks for other code than UNet2DConditionModel",
    wider: "do not fit",
    impossible: "do not fit",
    unscaled: "do not fit",
    no_width: "do not fit",
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_a_bundle_that_makes_no_network_is_one_line(adapted, change):
    manifest = copy.deepcopy(adapted.manifest)
    change(manifest["model"])
    with pytest.raises(UserError, match=BROKEN[change]) as raised:
        rebuilt(Bundle(adapted.folder, manifest))
    assert "\n" not in str(raised.value)


def test_weights_that_are_missing_are_one_line(adapted, tmp_path):
    weights = load_file(adapted.folder / WEIGHTS)
    del weights["unet.unet.conv_in.bias"]
    shutil.copytree(adapted.folder, tmp_path / "bundle")
    save_file(weights, tmp_path / "bundle" / WEIGHTS)
    with pytest.raises(UserError, match="do not fit") as raised:
        rebuilt(Bundle(tmp_path / "bundle", adapted.manifest))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_inductor_packages_run_without_the_models_code(foreign, tmp_path):
    """All three graphs, with an IP-Adapter; what is compiled of other kinds is shown above to be the same network."""
    folder, path = foreign.write(tmp_path / "model", "sd", **FLAT), tmp_path / "bundle"
    weights = tmp_path / "ip" / "ip.safetensors"
    given = ["--ip-adapter", str(weights), "--ip-scale", "0.6", "--levels", "3", "--steps", "2"]
    assert main(["export", "--model", str(folder), "--out", str(path), *given]) == 0
    assert main(["build", str(path), "--backend", "inductor"]) == 0
    (place,) = (path / "engines").iterdir()
    manifest = json.loads((place / MANIFEST).read_text())
    assert {"condition.pt2", "denoise.pt2", "decode.pt2"} == set(manifest["files"])
    row = manifest["parity"]
    assert row["finite"] and row["psnr_db"] > 100 and row["v_max_error"] < 1e-5 and row["decode_error"] < 1e-5
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    inputs = {"text": PROMPTS, "image": [picture] * 2}
    pipes = UNetPipeline.load(folder, weights, 0.6), BundlePipeline(load_engine(path, "inductor"))
    settings = dict(num_inference_steps=4, guidance_scale=4.0, seed=1, output_type="np")
    expected, actual = (np.asarray(pipe(inputs, **settings).images) for pipe in pipes)
    assert np.abs(actual - expected).max() < 1e-3 and np.abs(expected[0] - expected[1]).max() > 0.05
    picture.save(tmp_path / "picture.png")
    given = ["--prompt", *PROMPTS, "--image", str(tmp_path / "picture.png"), "--steps", "2", "-n", "1"]
    out = tmp_path / "made.png"
    command = ["sample", "--model", str(path), "--engine", "inductor", *given, "--out", str(out)]
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT, *command], capture_output=True, text=True)
    assert done.returncode == 0 and out.is_file(), done.stderr
