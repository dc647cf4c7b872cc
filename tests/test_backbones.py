"""Backbones of transformers: small random ones of every family, and their preprocessing against the library's own."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from semantica import PretrainedEncoder, UserError
from semantica.model.backbones import FAMILIES
from semantica.model.encoders import frozen_encoder
from semantica.model.preprocessing import settings_of
from semantica.sight import Sight, sight_in

SIDE = 64
PLAIN = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VIT = dict(PLAIN, patch_size=16, image_size=SIDE)
STAGES = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
HEADS = dict(STAGES, num_attention_heads=[1, 1, 1, 1])
SWIN = dict(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=SIDE)
# settings of a small network of each type that is not a plain transformer
SMALL = {
    "bit": dict(STAGES, embedding_size=8, num_groups=4),
    "convnext": STAGES,
    "convnextv2": STAGES,
    "dinov3_convnext": STAGES,
    "dinov3_vit": dict(VIT, num_register_tokens=4),
    "efficientnet": dict(image_size=SIDE, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320),
    "focalnet": dict(embed_dim=8, depths=[1, 1, 1, 1], image_size=SIDE),
    "hiera": dict(embed_dim=8, image_size=[SIDE, SIDE], depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
    "levit": dict(hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
                  image_size=2 * SIDE),
    "mobilenet_v1": dict(depth_multiplier=0.25),
    "mobilenet_v2": dict(depth_multiplier=0.35),
    "mobilevit": dict(hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 32], num_attention_heads=2),
    "mobilevitv2": dict(width_multiplier=0.25),
    "poolformer": STAGES,
    "pvt": dict(HEADS, image_size=SIDE),
    "pvt_v2": dict(HEADS, image_size=SIDE),
    "regnet": dict(STAGES, embedding_size=8, groups_width=8),
    "resnet": dict(STAGES, embedding_size=8, layer_type="basic"),
    "segformer": HEADS,
    "swiftformer": dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=SIDE),
    "swin": SWIN,
    "swinv2": SWIN,
}  # fmt: skip
# tokens of 64 pixels a side, where there are not 16
TOKENS = {**dict.fromkeys(SMALL, 4), "dinov3_vit": 16, "swin": 64, "swinv2": 64}


def random_backbone(kind, folder, settings=None, **options):
    torch.manual_seed(0)
    family = FAMILIES[kind]
    config = getattr(transformers, f"{family.name}Config")(**{**SMALL.get(kind, VIT), **options})
    model = getattr(transformers, f"{family.name}Model")(config).eval()
    model.save_pretrained(folder)
    if settings is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def seen_by(encoder, pictures):
    """What the backbone itself is given."""
    given = []
    hook = encoder.tower.register_forward_pre_hook(
        lambda module, args, named: given.append(named["pixel_values"]), with_kwargs=True
    )
    encoder(encoder.prepare(pictures))
    hook.remove()
    return given[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_and_pooled_vector_are_those_of_the_library(kind, tmp_path):
    model = random_backbone(kind, tmp_path / "source", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]})
    size = getattr(model.config, "image_size", SIDE) if FAMILIES[kind].sizes == "fixed" else SIDE
    encoder = PretrainedEncoder.from_source(
        str(tmp_path / "source"), image_size=size if isinstance(size, int) else size[0]
    )
    images = (
        torch.rand(2, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    with torch.no_grad():
        out = model(pixel_values=((images + 1) / 2 - mean) / std)
    features = out.last_hidden_state
    tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    stream = encoder(images)
    assert encoder.patches == stream.tokens.shape[1] == TOKENS.get(kind, 16)
    assert stream.tokens.shape[2] == stream.pooled.shape[1] == encoder.token_dim
    torch.testing.assert_close(stream.tokens, tokens[:, tokens.shape[1] - encoder.patches :], rtol=0, atol=1e-5)
    pooled = getattr(out, "pooler_output", None)
    if pooled is None:
        pooled = tokens[:, 0] if tokens.shape[1] > encoder.patches else tokens.mean(1)
    torch.testing.assert_close(stream.pooled, pooled.flatten(1), rtol=0, atol=1e-5)
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    again = frozen_encoder(str(tmp_path / "run"))
    # weights that are mapped from a file are not aligned, and sums round by that
    again.tower.load_state_dict({name: value.clone() for name, value in again.tower.state_dict().items()}, assign=True)
    other = again(images)
    assert torch.equal(other.tokens, stream.tokens) and torch.equal(other.pooled, stream.pooled)
    assert again.sight == encoder.sight and (again.patches, again.token_dim) == (encoder.patches, encoder.token_dim)


PROCESSORS = {
    "BitImageProcessorPil": dict(size={"shortest_edge": 74}, crop_size={"height": 64, "width": 64}),
    "CLIPImageProcessorPil": dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, resample=2),
    "ConvNextImageProcessorPil": dict(size={"shortest_edge": 64}, crop_pct=0.875),
    "EfficientNetImageProcessorPil": dict(size={"height": 64, "width": 64}, rescale_offset=True,
                                          rescale_factor=1 / 127.5, include_top=True),
    "LevitImageProcessorPil": dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    "MobileViTImageProcessorPil": dict(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64},
                                       do_normalize=False),
    "PoolFormerImageProcessorPil": dict(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    "SiglipImageProcessorPil": dict(size={"height": 64, "width": 64}, resample=3),
    "ViTImageProcessorPil": dict(size={"height": 64, "width": 64}, resample=1),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_that_of_the_library(name, tmp_path):
    processor = getattr(transformers, name)(**PROCESSORS[name])
    random_backbone("resnet", tmp_path, processor.to_dict())
    encoder = PretrainedEncoder.from_source(str(tmp_path))
    assert encoder.image_size == 64
    rng = np.random.default_rng(0)
    # a processor that squashes sees another part of what is no square
    sizes = [(90, 90)] if "height" in PROCESSORS[name]["size"] else [(90, 90), (101, 150), (133, 70), (60, 91)]
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    wanted = torch.stack([torch.as_tensor(processor(p, return_tensors="np")["pixel_values"][0]) for p in pictures])
    torch.testing.assert_close(seen_by(encoder, pictures), wanted.float(), rtol=1e-5, atol=2e-5)


def test_what_is_seen_at_another_size_is_the_same_share(tmp_path):
    settings = dict(size={"shortest_edge": 256}, crop_size=224, resample=3)
    random_backbone("resnet", tmp_path, settings)
    assert PretrainedEncoder.from_source(str(tmp_path)).sight == Sight(224, 256, "bicubic")
    assert PretrainedEncoder.from_source(str(tmp_path), image_size=112).sight == Sight(112, 128, "bicubic")


def test_long_pictures_are_seen_without_resizing_what_is_cropped_away():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 400, 3), dtype=np.uint8))
    whole = picture.resize((720, 72), Image.Resampling.BICUBIC).crop((328, 4, 392, 68))
    seen = Sight(64, 72, "bicubic").see(picture)
    assert np.abs(seen.astype(int) - np.array(whole).astype(int)).max() <= 1
    # 256 x 256,000,000 pixels if it were resized whole
    assert Sight(64, 64, "bicubic").see(Image.new("RGB", (4_000_000, 1))).shape == (64, 64, 3)


def test_no_picture_is_enlarged_to_be_cut_away():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (50, 50, 3), dtype=np.uint8))
    whole = picture.resize((640, 640), Image.Resampling.BILINEAR).crop((312, 312, 328, 328))
    seen = Sight(16, 640, "bilinear").see(picture)
    assert np.abs(seen.astype(int) - np.array(whole).astype(int)).max() <= 1
    # 120 GB if it were resized whole
    assert Sight(16, 200_000, "bilinear").see(picture).shape == (16, 16, 3)


def test_how_pictures_are_prepared_is_not_guessed_where_the_hub_cannot_be_asked(monkeypatch, tmp_path):
    """A repository without the file is another thing than one that is out of reach."""
    name, commit = "nobody/tower", "0" * 40

    def unreachable(*given, **named):
        raise LocalEntryNotFoundError("out of reach")

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^whether encoder 'nobody/tower' has a preprocessor_config.json is not known"):
        settings_of(name, commit)
    for file in ("preprocessor_config.json", "processor_config.json"):
        gone = tmp_path / "models--nobody--tower" / ".no_exist" / commit / file
        gone.parent.mkdir(parents=True, exist_ok=True)
        gone.touch()
    assert settings_of(name, commit) == {}


@pytest.mark.parametrize(
    "said", [{"size": 32}, {"size": 64, "resize": 32, "interpolation": "bicubic"}, {"side": 64}, 3,
             {"size": 64, "resize": "72", "interpolation": "bicubic"}, {"size": 64, "resize": 72, "interpolation": "x"}]
)  # fmt: skip
def test_what_a_bundle_says_of_sight_is_checked(said):
    with pytest.raises(UserError, match="of how image is seen: export it again"):
        sight_in({"sight": {"image": said}}, "image", 64)


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2_with_registers"])
def test_positions_are_interpolated_once(kind, tmp_path):
    model = random_backbone(kind, tmp_path)
    encoder = PretrainedEncoder.from_source(str(tmp_path), image_size=96)
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = ((images + 1) / 2 - encoder.pixel_mean) / encoder.pixel_std
    options = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = model(pixel_values=pixels, **options).last_hidden_state[:, -36:]
    torch.testing.assert_close(encoder(images).tokens, expected, rtol=0, atol=1e-5)


def test_a_classifier_without_a_pooler_gives_its_class_token(tmp_path):
    model = random_backbone("vit", tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith("pooler.")}
    save_file(kept, path, {"format": "pt"})
    encoder = PretrainedEncoder.from_source(str(tmp_path))
    images = torch.zeros(1, 3, SIDE, SIDE)
    with torch.no_grad():
        out = model(pixel_values=(images + 0.5 - encoder.pixel_mean) / encoder.pixel_std)
    torch.testing.assert_close(encoder(images).pooled, out.last_hidden_state[:, 0], rtol=0, atol=1e-5)


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_hostile_and_unfit_folders_are_refused_in_one_line(tmp_path):
    random_backbone("vit", tmp_path, {})
    settings, config, weights = (
        tmp_path / name for name in ("preprocessor_config.json", "config.json", "model.safetensors")
    )
    lines = {}

    def refused(why, **options):
        with pytest.raises(UserError) as caught:
            PretrainedEncoder.from_source(str(tmp_path), **options)
        lines[why] = str(caught.value)

    refused("use a multiple of 16", image_size=72)
    for said, why in (
        ({"image_std": [0.5, 0, 0.5]}, "three each, above 0"),
        ({"size": {"height": 64, "width": 32}}, "is no square"),
        ({"size": 32, "crop_size": 64}, "cuts 64 pixels out of 32"),
        ({"resample": 9}, "cannot be read: KeyError"),
    ):
        settings.write_text(json.dumps(said))
        refused(why)
    for said in ("{", "[]"):
        settings.write_text(said)
        refused("cannot be read: It looks like" if said == "{" else "cannot be read: it is a list")
    settings.write_text("{}")
    before = config.read_text()
    changed(config, auto_map={"AutoModel": "evil.Model"})
    refused("code to run (auto_map)")
    config.write_text(before)
    changed(config, model_type="detr")
    refused("of type 'detr'")
    config.write_text(before)
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    refused("no loadable safetensors")
    for why, line in lines.items():
        assert why in line and "\n" not in line
