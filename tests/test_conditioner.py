"""Two encoders, one of them from outside: saved, loaded, sampled, trained, exported; and what is refused."""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn

from semantica import (
    Conditioner,
    SemanticaPipeline,
    SemanticaScheduler,
    Stream,
    UserError,
    UViT,
    ViTEncoder,
    register_encoder,
)
from semantica.engines import load_engine
from semantica.export.config import ExportConfig
from semantica.export.write import export
from semantica.inputs import part_of, samples_in
from semantica.model.conditioner import encode, prepare
from semantica.model.encoders import ENCODERS
from semantica.train.heads import PairHead
from semantica.train.objective import Objective


@register_encoder
class Words(ModelMixin, ConfigMixin):
    """A toy text encoder: one vector for each of the first words, by their hash."""

    trainable, input_dtype = True, torch.int64

    @register_to_config
    def __init__(self, width: int = 24, length: int = 5, vocabulary: int = 97):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)

    @property
    def token_dim(self) -> int:
        return self.config.width

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.config.length,)

    def prepare(self, texts):
        rows = [[1 + zlib.crc32(word.encode()) % 96 for word in text.split()][: self.config.length] for text in texts]
        return torch.tensor([row + [0] * (self.config.length - len(row)) for row in rows])

    def examples(self, count):
        return torch.arange(count * self.config.length).view(count, -1) % self.config.vocabulary

    def forward(self, ids):
        tokens = self.mix(self.embedding(ids))
        return Stream(tokens, tokens.mean(1))


@register_encoder
class Uneven(Words):
    """Words whose streams are as long as the texts."""

    def forward(self, ids):
        stream = super().forward(ids)
        return Stream(stream.tokens, stream.pooled, (ids > 0).sum(1))


def make(words=Words, conditioning="both"):
    torch.manual_seed(0)
    pictures = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1)
    text = words()
    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=64, depth=2, heads=2, emb_dim=32,
        streams={"image": 32, "text": 24}, conditioning=conditioning,
    )  # fmt: skip
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    encoders = Conditioner({"image": pictures, "text": text})
    pipeline = SemanticaPipeline(unet.eval(), encoders.eval(), SemanticaScheduler(16, reference=16))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipe():
    return make()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    pipe.save_pretrained(folder)
    return folder


def call(pipe, inputs, **options):
    return pipe(inputs, num_inference_steps=3, output_type="pt", seed=2, **options).images


def test_each_stream_has_its_encoder(pipe):
    inputs = {"image": [picture(0), picture(1)], "text": ["a red cat", "two dogs"]}
    prepared = prepare(pipe.encoder, inputs)
    assert prepared["image"].shape == (2, 3, 16, 16) and prepared["text"].dtype == torch.int64
    streams = encode(pipe.encoder, pipe.unet.stream_names, prepared)
    for name, stream in streams.items():
        expected = pipe.encoder.encoders[name](prepared[name])
        assert torch.equal(stream.tokens, expected.tokens) and torch.equal(stream.pooled, expected.pooled)
    assert pipe.unet.condition(streams).sizes == (16, 5) and pipe.unet.null(2).sizes == (1, 1)
    both = call(pipe, inputs)
    assert both.shape == (2, 3, 16, 16)
    # either stream matters, and samples are apart
    for other in ({"image": picture(2), "text": "a red cat"}, {"image": picture(0), "text": "a green cat"}):
        assert (call(pipe, other) - both[:1]).abs().max() > 1e-4
    alone = call(pipe, {"image": picture(0), "text": "a red cat"})
    torch.testing.assert_close(alone, both[:1], rtol=0, atol=1e-5)
    # what was encoded before is taken as it is
    assert torch.equal(call(pipe, pipe.encode(inputs)), both)


def test_several_pictures_of_a_sample_and_one_text(pipe):
    made = call(pipe, {"image": [[picture(0), picture(1)], [picture(2)]], "text": ["a red cat", "two dogs"]})
    alone = call(pipe, {"image": picture(2), "text": "two dogs"}, latents=None)
    swapped = call(pipe, {"image": [[picture(1), picture(0)], [picture(2)]], "text": ["a red cat", "two dogs"]})
    torch.testing.assert_close(made, swapped, rtol=0, atol=1e-5)
    assert alone.shape == (1, 3, 16, 16)


def test_the_null_condition_stands_for_every_stream(pipe):
    streams = pipe.encode({"image": picture(0), "text": "a cat"})
    z, logsnr = torch.randn(1, 3, 16, 16), torch.zeros(1)
    with torch.no_grad():
        dropped = pipe.unet(z, logsnr, pipe.unet.condition(streams, torch.ones(1, dtype=torch.bool)))
        null = pipe.unet(z, logsnr, pipe.unet.null(1))
    torch.testing.assert_close(dropped, null, rtol=0, atol=1e-5)


def test_a_run_with_two_encoders_comes_back(pipe, saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["encoder"] == ["semantica", "Conditioner"] and index["unet"] == ["semantica", "UViT"]
    assert sorted(p.name for p in (saved / "encoder").iterdir()) == ["config.json", "image", "text"]
    again = SemanticaPipeline.from_pretrained(saved)
    again.set_progress_bar_config(disable=True)
    assert type(again.encoder.encoders["text"]) is Words
    inputs = {"image": picture(0), "text": "a red cat"}
    assert torch.equal(call(again, inputs), call(pipe, inputs))
    fast = make().accelerate(torch.float32, "none")
    torch.testing.assert_close(call(fast, inputs), call(pipe, inputs), rtol=0, atol=1e-4)


def test_one_encoder_under_two_names_is_stored_once(tmp_path):
    torch.manual_seed(0)
    encoder = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1)
    both = Conditioner({"image": encoder, "subject": encoder})
    both.save_pretrained(tmp_path / "encoder")
    assert sorted(p.name for p in (tmp_path / "encoder").iterdir()) == ["config.json", "image"]
    again = Conditioner.from_pretrained(tmp_path / "encoder")
    assert again.encoders["image"] is again.encoders["subject"] and len(again.state_dict()) == len(encoder.state_dict())


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: (e / "text" / "more.pt").write_bytes(b"x"), "more.pt is refused"),
        (lambda e: (e / "other").mkdir() or (e / "other" / "evil.py").write_text("boom"), "evil.py is refused"),
        (lambda e: edit(e / "text" / "config.json", _class_name="Popen"), "is a 'Popen': expected one of"),
        (lambda e: edit(e / "text" / "config.json", a={"auto_map": {"AutoModel": "evil.M"}}), "names code to run"),
        (lambda e: edit(e / "config.json", streams={"image": "image", "text": "../../unet"}), "no folder of a Cond"),
        (lambda e: edit(e / "config.json", streams={}), "no folder of a Conditioner"),
        (lambda e: next((e / "text").glob("*.safetensors")).unlink(), "half written"),
        (lambda e: edit(e.parent / "model_index.json", encoder=["os", "Conditioner"]), "other code is never loaded"),
    ],
)
def test_what_is_no_safe_folder_of_encoders_is_refused(saved, tmp_path, spoil, message):
    run = shutil.copytree(saved, tmp_path / "run")
    spoil(run / "encoder")
    with pytest.raises(UserError, match=message) as caught:
        SemanticaPipeline.from_pretrained(run)
    assert "\n" not in str(caught.value)


def test_a_class_that_is_not_registered_is_never_built(saved, monkeypatch):
    monkeypatch.delitem(ENCODERS, "Words")
    with pytest.raises(UserError, match="is a 'Words': expected one of ViTEncoder, PretrainedEncoder"):
        SemanticaPipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (picture(0), "condition comes alone: expected {'image': ..., 'text': ...}"),
        ({"image": picture(0)}, r"condition holds \['image'\]: expected"),
        ({"image": [picture(0), picture(1)], "text": "a cat"}, "has 2 of image, 1 of text: give as many samples"),
        ({"image": picture(0), "text": []}, "text is empty: give a text"),
        ({"image": torch.zeros(0, 3, 16, 16), "text": "a cat"}, "image is empty: give a picture"),
    ],
)
def test_wrong_inputs_are_one_line(pipe, inputs, message):
    with pytest.raises(UserError, match=message):
        call(pipe, inputs)


def test_what_is_registered_has_all_parts():
    with pytest.raises(UserError, match="encoder Linear lacks prepare, input_shape"):
        register_encoder(nn.Linear)
    with pytest.raises(UserError, match="an encoder Words is registered already"):
        register_encoder(type("Words", (Words,), {}))
    with pytest.raises(UserError, match="expected names of streams"):
        Conditioner({"../image": Words()})


def test_a_training_step_teaches_both_encoders():
    pipeline = make()
    unet, encoder = pipeline.unet.train(), pipeline.encoder.train()
    objective = Objective(unet, encoder, head=PairHead(32))
    images, noise = torch.randn(4, 3, 16, 16).clamp(-1, 1), torch.randn(4, 3, 16, 16)
    condition = {"image": images.flip(0), "text": encoder.encoders["text"].prepare(["a", "b c", "d", "e"])}
    drop = torch.tensor([True, False, False, False])
    losses, pairing, _ = objective(condition, images, noise, torch.zeros(4), drop)
    (losses.mean() + 0.1 * pairing.mean()).backward()
    for name, part in encoder.encoders.items():
        assert all(p.grad is not None and p.grad.any() for p in part.parameters()), name
    with torch.no_grad():
        without, *_ = objective(condition, images, noise, torch.zeros(4), torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(without[0], losses[0].detach(), rtol=1e-5, atol=1e-6)


def test_samples_of_inputs_are_parted(pipe):
    prepared = prepare(pipe.encoder, {"image": [[picture(0), picture(1)], picture(2)], "text": ["a", "b"]})
    last = part_of(prepared, 1, 2)
    assert samples_in(last) == 1 and last["image"].counts == (1,) and len(last["image"].values) == 1
    assert torch.equal(last["text"], prepared["text"][1:])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_bundle_takes_one_array_for_each_encoder(pipe, saved, tmp_path, precision):
    export(ExportConfig(model=saved, out=tmp_path / "bundle", precision=precision, levels=2, steps=2))
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["inputs"] == {"image": [3, 16, 16], "text": [5]} and manifest["streams"] == {"image": 16, "text": 5}
    ids = pipe.encoder.encoders["text"].prepare(["a red cat"])
    expected = call(pipe, {"image": picture(0), "text": ids})
    for backend in ("onnxruntime", "torch") if precision == "fp32" else ("torch",):
        made = call(SemanticaPipeline.from_bundle(tmp_path / "bundle", backend), {"image": picture(0), "text": ids})
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4 if precision == "fp32" else 0.1)
    bundled = SemanticaPipeline.from_bundle(tmp_path / "bundle", "torch")
    with pytest.raises(UserError, match=r"text must be an array \[1, 5\]: a bundle prepares nothing but pictures"):
        call(bundled, {"image": picture(0), "text": "a red cat"})
    with pytest.raises(UserError, match=r"text has shape \(1, 4\): this bundle takes \(1, 5\)"):
        call(bundled, {"image": picture(0), "text": ids[:, :4]})
    with pytest.raises(UserError, match="expected {'image': ..., 'text': ...}"):
        load_engine(tmp_path / "bundle", "torch").condition(torch.zeros(1, 3, 16, 16))


def test_streams_of_uneven_length_sample_but_do_not_export(tmp_path):
    pipeline = make(Uneven)
    both = call(pipeline, {"image": [picture(0), picture(1)], "text": ["a red cat", ""]})
    alone = call(pipeline, {"image": picture(0), "text": "a red cat"})
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="need tokens without lengths"):
        call(pipeline, {"image": picture(0), "text": [["a", "b"]]})
    pipeline.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be exported: a bundle's are fixed"):
        export(ExportConfig(model=tmp_path / "run", out=tmp_path / "bundle", levels=2, steps=2))
    assert not (tmp_path / "bundle").exists()
