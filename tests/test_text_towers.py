"""Text towers of the T5 family and several towers side by side: numbers, tokens, files, training, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from semantica import UserError
from semantica.cli import main
from semantica.inputs import text_names
from semantica.model.encoders import loaded, text_encoders
from semantica.model.t5 import T5TextEncoder
from semantica.pieces import PieceTokenizer
from semantica.pipelines.networks import NetworkPipeline
from semantica.train.build import begin_with, build
from semantica.train.config import TrainConfig
from semantica.train.data.pairs import Drops, Pairs

PIECES = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁ring", "▁on", "▁green", "▁two", "s", "▁noise", "▁picture"]
SMALL = ["--patch-size", "4", "--channels", "16", "--depths", "1", "--width", "32", "--depth", "1", "--heads", "2"]


def t5(folder, kind="t5"):
    """A small random T5 encoder with its tokenizer, as transformers writes them; and the tower."""
    import transformers

    torch.manual_seed(0)
    name = {"t5": "T5", "umt5": "UMT5"}[kind]
    options = dict(vocab_size=300, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    config = getattr(transformers, f"{name}Config")(**options)
    tower = getattr(transformers, f"{name}EncoderModel")(config).eval()
    tower.save_pretrained(folder)
    scores = [(piece, -float(i)) for i, piece in enumerate(PIECES)]
    model = Tokenizer(models.Unigram(scores, unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.save(str(folder / "tokenizer.json"))
    return tower


def byt5(folder):
    tower = t5(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    return tower


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_tokens_are_those_of_transformers(tmp_path, kind):
    tower = t5(tmp_path / "t5", kind)
    texts = ["a red ring on green", "two rings"]
    encoder = text_encoders([str(tmp_path / "t5")], texts)["text"]
    assert isinstance(encoder, T5TextEncoder) and encoder.input_shape == (6,) and encoder.token_dim == 24
    numbers = encoder.prepare(texts)
    assert numbers.tolist() == [[3, 4, 5, 6, 7, 1], [8, 5, 9, 1, 0, 0]]
    stream = encoder(numbers)
    assert stream.lengths.tolist() == [6, 4] and not stream.tokens.requires_grad
    for i, count in enumerate((6, 4)):
        alone = tower(numbers[i : i + 1, :count]).last_hidden_state[0]
        torch.testing.assert_close(stream.tokens[i, :count], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(stream.pooled[i], alone.mean(0), rtol=0, atol=1e-5)
    assert encoder.tokenizer.tokens_of(texts[0], "red ring") == (1, 2)
    # kept whole
    encoder.save_pretrained(tmp_path / "kept")
    shutil.rmtree(tmp_path / "t5")
    again = loaded(T5TextEncoder, tmp_path / "kept", "kept")
    assert torch.equal(again(again.prepare(texts)).tokens, stream.tokens)


def test_bytes_are_those_of_transformers(tmp_path):
    from transformers import ByT5Tokenizer

    byt5(tmp_path)
    own, text = PieceTokenizer(tmp_path, 12), "é: 2 rings"
    expected = ByT5Tokenizer()(text).input_ids
    assert own([text])[0].tolist() == expected + [0] * (12 - len(expected)) and own.highest == 258
    assert own.tokens_of(text, "2") == (4,)
    assert text_encoders([str(tmp_path)], [text])["text"].input_shape == (12,)


def test_long_texts_are_cut_counted_and_said_once(tmp_path, caplog):
    t5(tmp_path)
    tokenizer = PieceTokenizer(tmp_path, 3)
    assert tokenizer.cut(["a red", "a red ring", "two"]) == 1 and tokenizer.room == 2
    for _ in range(2):
        assert tokenizer(["a red ring on"]).tolist() == [[3, 4, 1]]
        assert tokenizer.quiet(["a red ring"]).tolist() == [[3, 4, 1]]
    assert [r.message for r in caplog.records] == ["a prompt has 4 tokens, 2 are read; left out: ' ring on'"]


@pytest.mark.parametrize(("broken", "message"), [
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing, or none of a tokenizer: write it with"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
    (lambda f: (f / "model.safetensors").write_bytes(b"1"), "has no loadable safetensors"),
    (lambda f: (f / "pytorch_model.bin").write_bytes(b"1"), "is refused: only safetensors and JSON"),
])  # fmt: skip
def test_broken_towers_are_one_line(tmp_path, broken, message):
    t5(tmp_path)
    broken(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        text_encoders([str(tmp_path)], ["a red ring"])
    assert "\n" not in str(caught.value)


def test_each_tower_is_dropped_by_itself_too(photos, tmp_path):
    from semantica.train.data.open import open_data

    data = open_data(photos)
    towers = dict.fromkeys(text_names(2), lambda texts: None)
    options = dict(seed=3, image_size=8, global_batch=8, tokenizers=towers, drop=0.1, drop_each=Drops(0.2, 0.3, 0.1))
    drop = np.stack([Pairs(data, **options)._dropped(i) for i in range(4000)])
    assert drop.shape == (4000, 3)
    image, first, second = drop.T
    alone = np.stack([Pairs(data, **options, conditions=0)._dropped(i) for i in range(4000)])
    assert alone.shape == (4000, 2)
    # all together, or pictures; or texts, or one of them; and one of them alone
    rates = ((image, 0.1 + 0.9 * 0.2), (first, 0.1 + 0.9 * (0.3 + 0.7 * 0.1)), (first & ~second, 0.9 * 0.7 * 0.1 * 0.9))
    # texts that condition alone are lost with all, or by themselves
    for share, rate in (*rates, (alone[:, 1], 0.1 + 0.9 * 0.1)):
        assert abs(share.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(share))


@pytest.fixture(scope="module")
def web(photos, tmp_path_factory):
    root = shutil.copytree(photos, tmp_path_factory.mktemp("texts") / "web")
    files = sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.png"))
    rows = [{"file": file, "text": "a red picture" if i % 2 else "two rings on green"} for i, file in enumerate(files)]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(web, out, *options):
    common = ["--batch", "4", "--log-every", "1", "--save-every", "1", "--workers", "0", "--device", "cpu", "--warmup",
              "0", "--precision", "fp32", "--held-out", "0", "--conditioning", "both", "--lr", "0.01"]  # fmt: skip
    return main(["train", "--data", str(web), "--out", str(out), *common, *SMALL, *map(str, options)])


def test_a_run_on_two_towers_gets_pictures_with_adapters(web, tmp_path, capsys):
    for name, write in (("t5", t5), ("bytes", byt5)):
        write(tmp_path / name)
    towers = ("--text-encoder", tmp_path / "t5", tmp_path / "bytes")
    assert run(web, tmp_path / "texts", "--steps", 3, "--condition-on", "text", *towers) == 0
    said = capsys.readouterr().out
    assert "text: T5TextEncoder, at most 5 tokens of a text" in said and "text_2: T5TextEncoder, at most 18" in said
    old = NetworkPipeline.load(tmp_path / "texts")
    assert old.inputs == ("text", "text_2")
    # as training has it: convolutions of another layout round in another way
    old.unet.to(memory_format=torch.channels_last)
    assert main(["sample", "--model", str(tmp_path / "texts"), "--prompt", "two red rings", "--steps", "1", "-n", "1",
                 "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0  # fmt: skip
    capsys.readouterr()

    # pictures beside both towers, which a run folder names together: nothing changes before the first step
    sizes = dict(patch_size=4, channels=(16,), depths=(1,), width=32, depth=1, heads=2)
    grown = dict(data=str(web), out=tmp_path, condition_on="both", text_encoder=(str(tmp_path / "texts"),))
    grown |= sizes | {"conditioning": "both"}
    unet, encoder, scheduler = build(TrainConfig(**grown), torch.device("cpu"), texts=["a red picture"])
    assert begin_with(str(tmp_path / "texts"), unet, encoder) == ("image",)
    prompt, options = ["a red picture"], dict(num_inference_steps=2, seed=1, output_type="pt", guidance_scale=2.0)
    picture = torch.rand(1, 3, encoder.encoders["image"].image_size, encoder.encoders["image"].image_size)
    given = {"image": picture, "text": prompt, "text_2": prompt}
    begun = NetworkPipeline(unet.eval(), encoder.eval(), scheduler)(given, **options).images
    assert torch.equal(begun, old(prompt=prompt, **options).images)

    adapted = ("--condition-on", "both", "--text-encoder", tmp_path / "texts", "--init", tmp_path / "texts",
               "--lora", 2, "--encoder-lr", 1e-2)  # fmt: skip
    assert run(web, tmp_path / "both", "--steps", 2, *adapted) == 0
    said = capsys.readouterr().out
    assert "and begins with nothing of image" in said and "of the denoiser's are trained" in said
    after, before = (load_file(next((tmp_path / n / "unet").glob("*.safetensors"))) for n in ("both", "texts"))
    assert not any("lora" in key for key in after)
    for key in ("conv_in.weight", "transformer_blocks.0.mlp.0.weight", "null_tokens.text"):
        assert torch.equal(after[key], before[key]), key
    key = "transformer_blocks.0.cross.to_kv.{}.weight"
    assert not torch.equal(after[key.format(1)], before[key.format(0)]) and after[key.format(0)][32:].any()
    # stopped after a step and continued, the same
    assert run(web, tmp_path / "parted", "--steps", 1, *adapted) == 0
    assert run(web, tmp_path / "parted", "--steps", 2, *adapted) == 0
    parted = load_file(next((tmp_path / "parted" / "unet").glob("*.safetensors")))
    assert all(torch.equal(parted[key], value) for key, value in after.items())
    capsys.readouterr()
    for options, message in (
        (("--image", web / "g0" / "0.png", "--prompt", "a red ring", "--guider", "streams"), ""),
        (("--prompt", "a red ring", "--guider", "streams"), "leads pictures and texts, here is text and text_2"),
        (("--prompt", " "), "text ' ' is empty: give words, or no text at all"),
        (("--prompt", "a", "--streams-image", 2), "--streams-image says nothing to --guider cfg"),
    ):
        options = ["--model", tmp_path / "both", "--steps", 1, "-n", 1, "--device", "cpu", *options]
        code = main(["sample", *map(str, options), "--out", str(tmp_path / "b.png")])
        assert code == (2 if message else 0) and message in capsys.readouterr().err
    assert main(["export", "--model", str(tmp_path / "both"), "--out", str(tmp_path / "bundle")]) == 2
    assert "cannot be exported: a bundle's are fixed" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (("--lora", 2), "--lora is 2: give a rank, and the run that it adapts as --init"),
    (("--encoder-lr", 0), "--encoder-lr is 0.0: give a positive number"),
    (("--encoder-lr", 1e-4, "--condition-on", "text"), "trains the encoder of pictures: leave out --condition-on text"),
    (("--text-encoder", "nowhere/at-all", "--condition-on", "text"), "nowhere/at-all is neither a folder nor"),
    (("--drop-tower", 2), "--drop-tower is 2.0: give 0 to 1"),
])  # fmt: skip
def test_options_of_no_use_are_one_line(web, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(web, tmp_path / "run", "--steps", 1, *options) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and not (tmp_path / "run").exists()
