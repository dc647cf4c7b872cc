"""Encoders: the trainable one, and the real loading code on small random DINOv2, CLIP and SigLIP towers."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from semantica import PretrainedEncoder, UserError, ViTEncoder
from semantica.model.clip import ClipTextEncoder
from semantica.model.encoders import frozen_encoder, text_encoders


def pictures(size, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize(("kind", "size", "patches"), [("dinov2", 70, 25), ("clip", 64, 16), ("siglip", 64, 16)])
def test_the_tower_sees_normalised_images_and_gives_its_own_features(tmp_path, save_tower, kind, size, patches):
    model = save_tower(tmp_path, kind)
    encoder = PretrainedEncoder.from_source(str(tmp_path), image_size=size)
    images = pictures(size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    tower = model.vision_model if kind == "clip" else model
    out = tower(pixel_values=((images + 1) / 2 - mean) / std)
    stream = encoder(images)
    assert stream.tokens.shape == (2, patches, 32) and encoder.token_dim == 32
    torch.testing.assert_close(stream.tokens, out.last_hidden_state[:, -patches:], rtol=0, atol=1e-5)
    torch.testing.assert_close(stream.pooled, out.pooler_output, rtol=0, atol=1e-5)
    everything = PretrainedEncoder.from_source(str(tmp_path), image_size=size, tokens="all")
    torch.testing.assert_close(everything(images).tokens, out.last_hidden_state, rtol=0, atol=1e-5)


def test_it_is_frozen_and_comes_back_without_its_source(tmp_path, save_tower):
    save_tower(tmp_path / "source", "dinov2")
    encoder = PretrainedEncoder.from_source(str(tmp_path / "source"), image_size=70)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training and not encoder.tower.training
    encoder.save_pretrained(tmp_path / "run")
    again = PretrainedEncoder.from_pretrained(tmp_path / "run")
    assert again.config.source == str(tmp_path / "source")
    images = pictures(70)
    assert torch.equal(encoder(images).tokens, again(images).tokens)


def test_positions_are_interpolated_once(tmp_path, save_tower):
    model = save_tower(tmp_path, "dinov2")
    encoder = PretrainedEncoder.from_source(str(tmp_path), image_size=140)
    assert encoder.tower.embeddings.position_embeddings.shape[1] == 101
    images = pictures(140)
    mean, std = encoder.pixel_mean, encoder.pixel_std
    # transformers interpolates on the fly at this size; ours must give the same
    expected = model(pixel_values=((images + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(images).tokens, expected, rtol=0, atol=1e-5)
    smaller = encoder(pictures(70))
    assert smaller.tokens.shape == (2, 100, 32)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip", "text"])
def test_a_tower_that_lacks_a_weight_is_not_drawn_at_random(tmp_path, save_tower, foreign, capfd, kind):
    if kind == "text":
        load, folder = ClipTextEncoder.from_source, foreign.write(tmp_path / "sd", "sd")
        path = folder / "text_encoder" / "model.safetensors"
    else:
        save_tower(tmp_path, kind)
        load, folder, path = PretrainedEncoder.from_source, tmp_path, tmp_path / "model.safetensors"
    whole = load_file(path)
    # of CLIP's two towers that of pictures
    name = max(name for name in whole if name.endswith(".0.mlp.fc1.weight"))
    # of another shape, and not there
    for changed, message in (({name: whole[name][:4]}, "no loadable safetensors"), ({}, "one of 1 missing weights")):
        save_file({key: value for key, value in whole.items() if key != name} | changed, path, {"format": "pt"})
        capfd.readouterr()
        with pytest.raises(UserError, match=message) as caught:
            load(str(folder))
        assert "\n" not in str(caught.value) and "REPORT" not in "".join(capfd.readouterr())


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path, save_tower):
    save_tower(tmp_path / "good", "clip")
    with pytest.raises(UserError, match="image size 96 does not fit"):
        PretrainedEncoder.from_source(str(tmp_path / "good"), image_size=96)
    with pytest.raises(UserError, match="cannot be loaded"):
        PretrainedEncoder.from_source(str(tmp_path / "nothing" / "here"))
    other = tmp_path / "bert"
    settings = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=20)
    transformers.BertModel(transformers.BertConfig(**settings)).save_pretrained(other)
    with pytest.raises(UserError, match="of type 'bert'"):
        PretrainedEncoder.from_source(str(other))
    pickled = tmp_path / "pickled"
    save_tower(pickled, "dinov2")
    weights = transformers.Dinov2Model.from_pretrained(pickled).state_dict()
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="no loadable safetensors") as caught:
        PretrainedEncoder.from_source(str(pickled))
    assert "\n" not in str(caught.value)
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "evil.Config"}}))
    (remote / "evil.py").write_text("raise SystemExit('code from a model folder ran')")
    with pytest.raises(UserError, match="cannot be loaded"):
        PretrainedEncoder.from_source(str(remote))
    with pytest.raises(UserError, match="tokens='cls'"):
        PretrainedEncoder("x", None, {"model_type": "dinov2"}, 70, tokens="cls")


def test_the_trainable_encoder_learns_from_every_parameter():
    encoder = ViTEncoder(image_size=32, patch_size=4, width=64, depth=2, heads=1)
    stream = encoder(pictures(32))
    assert stream.tokens.shape == (2, 64, 64)
    torch.testing.assert_close(stream.pooled, stream.tokens.mean(1))
    stream.tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
    with pytest.raises(UserError, match="patch_size=6"):
        ViTEncoder(image_size=30, patch_size=6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("dinov2", 70), ("clip", 64), ("siglip", 64)])
def test_the_layers_of_a_tower_compile_whole_and_as_one_graph(tmp_path, save_tower, kind, size):
    from semantica.model.compile import compile_in_place

    save_tower(tmp_path, kind)
    encoder = PretrainedEncoder.from_source(str(tmp_path), image_size=size)
    expected = encoder(pictures(size))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_in_place(encoder)
    for _ in range(2):
        torch.testing.assert_close(encoder(pictures(size)).tokens, expected.tokens, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(pictures(size)).tokens
    assert not tokens.requires_grad
    torch.testing.assert_close(tokens.float(), expected.tokens, rtol=0, atol=0.05)


def test_the_encoder_of_a_run_is_loaded_frozen_and_nothing_else_is(small_run, tmp_path):
    for source in (small_run, small_run / "encoder"):
        encoder = frozen_encoder(str(source))
        assert isinstance(encoder, ViTEncoder) and not encoder.trainable and not encoder.training
        assert not any(p.requires_grad for p in encoder.parameters()) and encoder.patches == 16
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy)
    with pytest.raises(UserError, match="has image size 16 and tokens 'patches'"):
        frozen_encoder(str(copy), 32)
    (copy / "encoder" / "more.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="more.pt is refused"):
        frozen_encoder(str(copy))
    (copy / "encoder" / "more.pt").unlink()
    weights = copy / "encoder" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:99])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        frozen_encoder(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [frozen_encoder, lambda source: text_encoders([source])])
def test_a_run_folder_that_lacks_a_weight_is_refused_and_nothing_is_drawn(small_run, tmp_path, load, capfd):
    texts = ["a red circle", "two blue squares"]
    if load is frozen_encoder:
        shutil.copytree(small_run / "encoder", tmp_path / "encoder")
        name, folder = "norm.weight", tmp_path / "encoder"
    else:
        text_encoders(["words"], texts)["text"].save_pretrained(tmp_path / "encoder" / "text")
        name, folder = "codes", tmp_path / "encoder" / "text"
    assert load(str(tmp_path))
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError, match=f"has no {name}, one of 1 missing weights: copy it whole"):
        load(str(tmp_path))
    assert "newly initialized" not in "".join(capfd.readouterr())
