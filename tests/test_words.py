"""Words as tokens: vocabularies, codes, what is refused; texts beside pictures; and the same samples in any process."""

import json
import shutil

import numpy as np
import pytest
import torch

from semantica import Stream, UserError, UViT, WordEncoder
from semantica.model.conditioner import Conditioner
from semantica.train.data.captions import read_captions
from semantica.train.data.loading import batches
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Drops, Pairs
from semantica.words import WordTokenizer, split_words

TEXTS = ["Two red crosses, on green.", "a ring", "don\u2019t blink-182"]


@pytest.fixture(scope="module")
def words():
    return WordTokenizer.learn(TEXTS)


def write(root, rows):
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def web(photos, tmp_path_factory):
    """The pictures of `photos`, each with one text, and one in two with a second."""
    root = shutil.copytree(photos, tmp_path_factory.mktemp("web") / "web")
    rows = []
    for path in sorted(root.glob("*/*.png")):
        file, group, place = f"{path.parent.name}/{path.name}", path.parent.name[1:], int(path.stem)
        rows.append({"file": file, "text": f"group {group} picture {place}"})
        rows += [{"file": file, "text": f"picture {place} of {group}"}] * (place % 2)
    write(root, rows)
    return root


def test_texts_become_words_and_words_numbers(words):
    assert split_words(TEXTS[0]) == ["two", "red", "crosses", "on", "green"]
    assert split_words(TEXTS[2]) == ["don't", "blink-182"]
    assert words.vocabulary == ("a", "blink-182", "crosses", "don't", "green", "on", "red", "ring", "two")
    assert words.length == 5 and words == WordTokenizer.learn(reversed(TEXTS))
    assert words(["A ring!", "two red crosses"]).tolist() == [[1, 8, 0, 0, 0], [9, 7, 3, 0, 0]]
    # held-out texts: what is unknown is left out
    assert words.lenient(["a blue ring", "", "a a a a a a"]).tolist() == [[1, 8, 0, 0, 0], [0] * 5, [1] * 5]
    assert words.unknown(["a blue ring", "bold"]) == ["blue", "bold"]


def test_words_are_found_in_prompts(words):
    assert words.tokens_of("a red ring on a ring", "RING") == (2, 5)
    assert words.tokens_of("two red crosses on red crosses", "red crosses") == (1, 2, 4, 5)
    for word in ("rin", "crosses two", ""):
        with pytest.raises(UserError, match=r"is not in the prompt 'two red crosses': choose among two, red, crosses"):
            words.tokens_of("two red crosses", word)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two red crossses", "word 'crossses' is not among the 9 of this model: close to it are crosses"),
        ("a zebra", "word 'zebra' is not among the 9 of this model: it knows a, blink-182, crosses, .*, ..."),
        (" ?", "text ' \\?' has no words"),
        ("a a a a a a", "has 6 words: this model takes at most 5"),
        (7, "a prompt is a int: give text"),
    ],
)
def test_prompts_that_a_model_cannot_read_are_one_line(words, text, message):
    with pytest.raises(UserError, match=message) as caught:
        words([text])
    assert "\n" not in str(caught.value)


def test_what_has_no_or_too_many_words_is_not_learned():
    for texts, message in (
        ([], "there is no text"), (["a ring", "..."], "text '...' has no words"), (["a " * 300], "has 300 words")
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            WordTokenizer.learn(texts)
    with pytest.raises(UserError, match="give at least one word"):
        WordEncoder((), 4)


def test_codes_are_signs_of_the_word_alone(words, tmp_path):
    encoder, other = WordEncoder.learn(TEXTS), WordEncoder(("ring", "zebra"), 3)
    assert torch.equal(encoder.codes[8], other.codes[1]) and not encoder.codes[0].any()
    codes = WordEncoder(tuple(f"w{i}" for i in range(300)), 2).codes[1:].double()
    assert codes.abs().unique().tolist() == [1]
    cosines = (codes @ codes.T / 256)[~torch.eye(300, dtype=torch.bool)]
    # 44850 pairs: the root mean square is 1 / 16 within 2 %, the mean 0
    assert abs(cosines.square().mean().sqrt() * 16 - 1) < 0.02 and abs(cosines.mean()) < 1e-3
    numbers = encoder.prepare(["a ring", "two red crosses on green"])
    stream = encoder(numbers)
    assert stream.tokens.shape == (2, 5, 256) and stream.lengths.tolist() == [2, 5]
    torch.testing.assert_close(stream.pooled[0], stream.tokens[0, :2].mean(0))
    # the same word in another place has another token
    assert not torch.equal(*encoder(encoder.prepare(["a a"])).tokens[0, :2])
    encoder.save_pretrained(tmp_path)
    again = WordEncoder.from_pretrained(tmp_path)
    assert again.tokenizer == words and torch.equal(again(numbers).tokens, stream.tokens)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    unet = UViT(
        image_size=16, channels=(32,), depths=(1,), width=64, depth=2, heads=2, emb_dim=32,
        streams={"image": 32, "text": 256}, conditioning="both",
    )  # fmt: skip
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return unet.double().eval()


def pictures(count=2):
    tokens = torch.randn(count, 4, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Stream(tokens, tokens.mean(1))


def texts(*given):
    encoder = WordEncoder.learn(TEXTS)
    return encoder(encoder.prepare(list(given))).map(lambda a: a.double() if a.is_floating_point() else a)


@torch.no_grad()
def v(net, streams, drop=None):
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return net(z, torch.zeros(2, dtype=torch.float64), net.condition(streams, drop))


def test_padding_is_not_looked_at(net):
    text = texts("a ring", "red crosses")
    cut = Stream(text.tokens[:, :2], text.pooled)
    torch.testing.assert_close(v(net, {"image": pictures(), "text": text}), v(net, {"image": pictures(), "text": cut}))


def test_each_stream_has_a_null_of_its_own(net):
    image, text = pictures(), texts("a ring", "two red crosses on green")
    both, none = {"image": image, "text": text}, torch.zeros(2, 2, dtype=torch.bool)
    whole = v(net, both)
    assert torch.equal(v(net, both, none), whole)
    for place, name in enumerate(("image", "text")):
        drop = none.clone()
        drop[:, place] = True
        alone = v(net, {**both, name: None})
        torch.testing.assert_close(v(net, both, drop), alone)
        assert (alone - whole).abs().max() > 1e-3
        # one sample's null leaves the other as it is
        drop[1] = False
        mixed = v(net, both, drop)
        torch.testing.assert_close(mixed[0], alone[0])
        torch.testing.assert_close(mixed[1], whole[1])
    torch.testing.assert_close(v(net, both, ~none), v(net, both, torch.ones(2, dtype=torch.bool)))
    with torch.no_grad():
        null = net(torch.zeros(2, 3, 16, 16).double(), torch.zeros(2).double(), net.null(2))
        dropped = net(torch.zeros(2, 3, 16, 16).double(), torch.zeros(2).double(), net.condition(both, ~none))
    torch.testing.assert_close(dropped, null)
    with pytest.raises(UserError, match="all of image, text are absent"):
        net.condition({"image": None, "text": None})


def test_captions_are_read_and_kept_with_their_pictures(web):
    data = open_data(web, captions=True)
    assert data.describe().endswith("24 pictures in 6 groups, 36 texts")
    assert data.captions.texts["g0/1.png"] == ("group 0 picture 1", "picture 1 of 0")
    training, held = data.split(0.3, 0)
    assert set(training.captions.texts) == set(training.sizes) and set(held.captions.texts) == set(held.sizes)
    # other texts are other data, and without them it is what it was
    plain = open_data(web)
    assert plain.captions is None
    assert len({plain.digest(), data.digest()}) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda rows: rows[1:],
            r"1 of 24 pictures have no text in .*captions.jsonl, the first is 'g0/0.png': add theirs",
        ),
        (lambda rows: [*rows, {"file": "g9/0.png", "text": "x"}], "line 37: there is no picture 'g9/0.png' in"),
        (lambda rows: [*rows, {"file": "g0/0.png", "text": " "}], "line 37: the text of 'g0/0.png' is empty"),
        (lambda rows: [*rows, {"file": "g0/0.png"}], "line 37 lacks a file or a text"),
        (lambda rows: [*rows, ["g0/0.png", "x"]], "line 37 lacks a file or a text"),
        (
            lambda rows: [*rows, {"file": "g0/0.png", "text": "x\ud83d"}],
            "line 37: .* 'g0/0.png' holds half a character",
        ),
        (lambda rows: [*rows, {"file": "g0/0.png", "text": "x" * 10_001}], "has 10001 characters; at most 10000"),
    ],
)
def test_texts_that_do_not_fit_their_pictures_are_one_line(web, tmp_path, spoil, message):
    root = shutil.copytree(web, tmp_path / "web")
    write(root, spoil([json.loads(line) for line in (web / "captions.jsonl").read_text().splitlines()]))
    with pytest.raises(UserError, match=message) as caught:
        open_data(root, captions=True)
    assert "\n" not in str(caught.value)
    long = json.dumps({"file": "a" * 999, "text": "x"})
    for line, said in (("{", " is no JSON"), ("[" * 100_000, " is no JSON"), (long, ": there is no picture")):
        (root / "captions.jsonl").write_text(line)
        with pytest.raises(UserError, match=f"line 1{said}"):
            open_data(root, captions=True)
    (root / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + (web / "captions.jsonl").read_bytes())
    assert open_data(root, captions=True).captions == open_data(web, captions=True).captions
    (root / "captions.jsonl").unlink()
    with pytest.raises(UserError, match="captions.jsonl does not exist: write a line"):
        read_captions(root, [])


def options(data, **given):
    return dict(seed=3, image_size=8, global_batch=8, tokenizers={"text": WordTokenizer.learn(data.captions)}) | given


def test_a_text_is_drawn_for_each_sample_alike_in_every_process(web):
    data = open_data(web, captions=True)
    pairs = Pairs(data, **options(data))
    items = [pairs[i] for i in range(48)]
    drawn: dict[str, set[str]] = {}
    for index, item in enumerate(items):
        ref = data.draw(3, index).target.ref
        assert item["caption"] in data.captions.texts[ref]
        assert item["text"].tolist() == pairs.tokenizers["text"]([item["caption"]])[0].tolist()
        drawn.setdefault(ref, set()).add(item["caption"])
    # two epochs: some picture with two texts has shown both
    assert max(map(len, drawn.values())) == 2 and min(map(len, drawn.values())) == 1
    for workers in (0, 2):
        loader = batches(pairs, first_index=8, batch=8, workers=workers)
        batch = next(loader)
        loader.close()
        assert batch["condition"]["text"].tolist() == [item["text"].tolist() for item in items[8:16]]
        assert batch["condition"]["image"].shape == (8, 3, 8, 8) and batch["drop"].shape == (8, 2)
    # texts change nothing else of a sample
    plain, alone = (
        Pairs(open_data(web), seed=3, image_size=8, global_batch=8),
        Pairs(data, **options(data, conditions=0)),
    )
    for index in range(8):
        for name in ("target", "u", "condition"):
            assert np.array_equal(items[index][name], plain[index][name]), name
        assert np.array_equal(alone[index]["target"], plain[index]["target"]) and "condition" not in alone[index]
        assert alone[index]["drop"] == plain[index]["drop"] and len(alone[index]["flips"]) == 1


def test_each_stream_is_dropped_apart_and_all_together(web):
    data, count = open_data(web, captions=True), 4000
    found = [Pairs(data, **options(data, drop=0.1, drop_each=Drops(0.2, 0.3)))._dropped(i) for i in range(count)]
    drop = np.array(found)
    whole = np.array([Pairs(data, seed=3, image_size=8, global_batch=8, drop=0.1)._dropped(i) for i in range(count)])
    # all together exactly where one condition would have been dropped
    assert drop[whole].all()
    image, text = drop[~whole].T
    # four standard deviations of a share of 3600
    for share, rate in ((image, 0.2), (text, 0.3), (image & text, 0.06), (whole, 0.1)):
        assert abs(share.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(share))
    assert np.array_equal(drop[5], Pairs(data, **options(data, drop=0.1, drop_each=Drops(0.2, 0.3)))[5]["drop"])
    with pytest.raises(UserError, match="condition dropout 1.5 is out of range"):
        Pairs(data, **options(data, drop_each=Drops(text=1.5)))


def test_an_encoder_of_texts_stands_in_a_conditioner(tmp_path):
    encoder = Conditioner({"text": WordEncoder.learn(TEXTS)})
    encoder.save_pretrained(tmp_path / "encoder")
    again = Conditioner.from_pretrained(tmp_path / "encoder").encoders["text"]
    assert again.tokenizer.vocabulary[0] == "a" and not encoder.trainable
