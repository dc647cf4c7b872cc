"""Backbones of timm: small random ones against timm's own features and its own transform."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from semantica import PretrainedEncoder, UserError
from semantica.model import timm_backbones
from semantica.model.encoders import frozen_encoder

try:
    import timm
    from timm.data import create_transform, resolve_data_config
    from timm.models import save_for_hf
# without torchvision's compiled part it is a RuntimeError
except (ImportError, RuntimeError) as error:
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

# plain, with a distilled token, with registers, with rotary positions; residual, depthwise, with a last 1 x 1
# convolution, whose pooled vector is wider than the map; channels last, in windows
SMALL = {
    "vit_tiny_patch16_224": dict(img_size=64, embed_dim=32, depth=2, num_heads=2),
    "deit_tiny_distilled_patch16_224": dict(img_size=64, embed_dim=32, depth=2, num_heads=2),
    "vit_small_patch14_reg4_dinov2": dict(img_size=70, embed_dim=32, depth=2, num_heads=2),
    "vit_small_patch16_dinov3": dict(img_size=64, embed_dim=128, depth=2, num_heads=2),
    "resnet18": dict(channels=(8, 8, 16, 16)),
    "tf_efficientnet_lite0": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "swin_tiny_patch4_window7_224": dict(img_size=64, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)),
}
TOKENS = {"vit_small_patch14_reg4_dinov2": 25, "swin_tiny_patch4_window7_224": 64}


def random_backbone(name, folder, **options):
    torch.manual_seed(0)
    settings = {**SMALL[name], **options}
    model = timm.create_model(name, num_classes=7, **settings).eval()
    save_for_hf(model, folder, model_args=settings, safe_serialization=True)
    return model


@pytest.mark.parametrize("name", SMALL)
def test_what_it_sees_and_gives_is_what_timm_does(name, tmp_path):
    model = random_backbone(name, tmp_path / "source")
    encoder = PretrainedEncoder.from_source(str(tmp_path / "source"))
    prepared = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    size = SMALL[name].get("img_size", 224)
    transform = create_transform(**{**prepared, "input_size": (3, size, size)}, is_training=False)
    rng = np.random.default_rng(0)
    sizes = ((300, 300), (301, 190), (97, 410))
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    wanted, images = torch.stack([transform(picture) for picture in pictures]), encoder.prepare(pictures)
    pixels = ((images + 1) / 2 - encoder.pixel_mean) / encoder.pixel_std
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-6)
    with torch.no_grad():
        features = model.forward_features(wanted)
        pooled = model.forward_head(features, pre_logits=True)
    if features.ndim == 4:
        features = features.flatten(1, 2) if name.startswith("swin") else features.flatten(2).transpose(1, 2)
    stream = encoder(images)
    assert stream.tokens.shape[1] == encoder.patches == TOKENS.get(name, 49 if size == 224 else 16)
    tokens = features[:, features.shape[1] - encoder.patches :]
    pooled = pooled if pooled.shape[1] == tokens.shape[2] else tokens.mean(1)
    torch.testing.assert_close(stream.tokens, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stream.pooled, pooled, rtol=1e-5, atol=1e-5)
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    again = frozen_encoder(str(tmp_path / "run"))
    again.tower.load_state_dict({key: value.clone() for key, value in again.tower.state_dict().items()}, assign=True)
    other = again(images)
    assert torch.equal(other.tokens, stream.tokens) and torch.equal(other.pooled, stream.pooled)
    assert again.sight == encoder.sight


def test_another_size_is_baked_into_positions_and_shows_the_same_share(tmp_path):
    model = random_backbone("vit_tiny_patch16_224", tmp_path)
    encoder = PretrainedEncoder.from_source(str(tmp_path), image_size=96)
    assert encoder.sight[:2] == (96, 106) and encoder.patches == 36
    model.set_input_size(img_size=(96, 96))
    images = torch.zeros(1, 3, 96, 96)
    with torch.no_grad():
        tokens = model.forward_features((images + 0.5 - encoder.pixel_mean) / encoder.pixel_std)[:, 1:]
    torch.testing.assert_close(encoder(images).tokens, tokens, rtol=0, atol=1e-5)


def test_hostile_and_unfit_folders_are_refused_in_one_line(tmp_path):
    random_backbone("resnet18", tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    before, whole, lines = json.loads(config.read_text()), load_file(weights), {}

    def refused(why):
        with pytest.raises(UserError) as caught:
            PretrainedEncoder.from_source(str(tmp_path))
        lines[why] = str(caught.value)

    for values, why in (
        ({"architecture": "no_such_network"}, "does not know"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "has the argument checkpoint_path"),
        ({"model_args": {"pretrained": True}}, "has the argument pretrained"),
        ({"model_args": {"no_such": 1}}, "makes no resnet18"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "code to run (auto_map)"),
        ({"pretrained_cfg": {"input_size": [1, 32, 32]}}, "no square pictures of three channels"),
        ({"pretrained_cfg": {"std": [0.5, 0.5]}}, "three each, above 0"),
    ):
        config.write_text(json.dumps(before | values))
        refused(why)
    config.write_text(json.dumps(before))
    save_file({name: value for name, value in whole.items() if name != "conv1.weight"}, weights)
    refused("has no conv1.weight, one of 1 missing weights")
    save_file(whole | {"conv1.weight": whole["conv1.weight"][:4]}, weights)
    refused("conv1.weight is of shape")
    weights.write_bytes(weights.read_bytes()[:99])
    refused("no loadable safetensors weights")
    torch.save(whole, tmp_path / "pytorch_model.bin")
    weights.unlink()
    refused("it holds no model.safetensors")
    for why, line in lines.items():
        assert why in line and "\n" not in line


def test_the_names_that_are_refused_are_those_of_timms_factory():
    import inspect

    factory = set(inspect.signature(timm.create_model).parameters) - {"kwargs"}
    assert factory <= timm_backbones.REFUSED
