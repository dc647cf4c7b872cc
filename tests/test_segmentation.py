"""Open-vocabulary segmentation: its mathematics against plain references, windows, files, and what is refused."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from semantica import UserError
from semantica.benchmarks.quality.small_clip import write_clip
from semantica.cli import main
from semantica.segmentation.aggregator import ABSENT, cost_volume
from semantica.segmentation.layers import (
    ClassAggregation,
    GuidedConv,
    SwinBlock,
    linear_attention,
    shift_mask,
)
from semantica.segmentation.segmenter import Segmenter, load_segmenter
from semantica.segmentation.sizes import Sizes
from semantica.segmentation.windows import Windows, locate, probabilities, segment, squeezed, starts

SMALL = Sizes(hidden=16, guidance=16, window=4, decoder=(16, 16), raised=(8, 8), projected=(4, 4), padding=6)
NAMES = ["red cross", "blue ring", "green", "two pink squares", "black triangle"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An untrained CLIP of 32 pixels with a tokenizer."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_clip(folder, 0)
    return folder


@pytest.fixture(scope="module")
def segmenter(clip):
    torch.manual_seed(0)
    made = Segmenter.from_clip(clip, templates=("a {}", "a photo of a {}"), sizes=SMALL)
    with torch.no_grad():
        # fresh padding is zero, and would look like any other constant
        for p in made.aggregator.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return made.eval()


@pytest.fixture(scope="module")
def folder(segmenter, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "run"
    segmenter.save_pretrained(out)
    return out


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)
    return Image.fromarray(pixels).resize((52, 36), Image.Resampling.BICUBIC)


def classes(segmenter, names):
    with torch.no_grad():
        return segmenter.embed(segmenter.numbers(names))


def test_the_cost_volume_is_the_cosine_of_every_place_and_class():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 7, 3, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 5, 2, 7, generator=generator, dtype=torch.float64)
    made = cost_volume(image, text).numpy()
    a, b = image.numpy(), text.numpy()[0]
    plain = np.einsum("bchw,tpc->btphw", a, b)
    lengths = np.sqrt((a**2).sum(1))[:, None, None] * np.sqrt((b**2).sum(-1))[None, :, :, None, None]
    np.testing.assert_allclose(made, plain / lengths, atol=1e-14)
    assert np.abs(made).max() <= 1 and made.shape == (2, 5, 2, 3, 4)


def test_linear_attention_is_its_explicit_form():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    counts = torch.tensor([1.0, 1, 1, 1, 3], dtype=torch.float64)
    # every key as often as it counts, and weights of all pairs
    rows = torch.tensor([0, 1, 2, 3, 4, 4, 4])
    weights = torch.einsum("nld,nsd->nls", F.elu(q) + 1, F.elu(k[:, rows]) + 1)
    explicit = (weights / weights.sum(-1, keepdim=True)) @ v[:, rows]
    torch.testing.assert_close(linear_attention(q, k, v, counts, eps=0), explicit, rtol=1e-12, atol=1e-13)


def test_padding_is_as_many_copies_of_one_token_as_there_is_room_for():
    torch.manual_seed(0)
    block = ClassAggregation(8, 6, 2, 2, 12).double()
    for p in block.parameters():
        p.data.normal_(0, 0.3)
    x, guide = torch.randn(2, 5, 4, 4, 8).double(), torch.randn(2, 5, 6).double()
    made = block(x, guide)
    # the same maps with seven classes of padding written out, none counted: pooled padding is what is learned
    maps = torch.cat([x, block.padding_token.expand(2, 7, 4, 4, 8)], 1)
    guides = torch.cat([guide, block.padding_guide.expand(2, 7, 6)], 1)
    block.padding = 0
    torch.testing.assert_close(block(maps, guides)[:, :5], made, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(block(x, guide), made, atol=1e-4)


def test_shifted_windows_see_what_lay_side_by_side():
    height, width, side, shift = 8, 12, 4, 2
    mask = shift_mask(height, width, side, shift)
    number = 0
    for top in range(0, height, side):
        for left in range(0, width, side):
            # the place that each token of the window had before rolling
            places = [((y + shift), (x + shift)) for y in range(top, top + side) for x in range(left, left + side)]
            for i, (y, x) in enumerate(places):
                for j, (v, u) in enumerate(places):
                    # neither or both of them came round the border
                    together = (y >= height) == (v >= height) and (x >= width) == (u >= width)
                    assert mask[number, i, j] == together
            number += 1
    assert number == len(mask) == 6


def test_a_swin_block_is_attention_over_masked_pairs_of_all_places():
    torch.manual_seed(0)
    block = SwinBlock(8, 6, 2, 4, 2).double()
    x, guide = torch.randn(1, 3, 8, 8, 8).double(), torch.randn(1, 1, 8, 8, 6).double()
    made = block(x, guide)
    y, xs = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")

    def part(place):
        # which of the windows that begin two places before the border
        return (place + 2) // 4

    window = (part(y) * 10 + part(xs)).flatten()
    pairs = window[:, None] == window
    for t in range(3):
        flat, g = x[0, t].reshape(64, 8), guide[0, 0].reshape(64, 6)
        normed, attention = block.norm1(flat), block.attention
        both = torch.cat([normed, g], -1)
        q, k = (F.linear(both, layer.weight, layer.bias) for layer in (attention.q, attention.k))
        heads = [w.reshape(64, 2, 4).transpose(0, 1) for w in (q, k, attention.v(normed))]
        scores = (heads[0] @ heads[1].mT / 2).masked_fill(~pairs, -torch.inf).softmax(-1) @ heads[2]
        out = flat + attention.proj(scores.transpose(0, 1).reshape(64, 8))
        out = out + block.mlp(block.norm2(out))
        torch.testing.assert_close(made[0, t].reshape(64, 8), out, rtol=1e-10, atol=1e-11)


def test_guidance_is_convolved_once_for_all_classes():
    torch.manual_seed(0)
    layer = GuidedConv(3, 2, 4).double()
    x, guide = torch.randn(6, 3, 5, 5).double(), torch.randn(2, 2, 5, 5).double()
    whole = torch.cat([x, guide.repeat_interleave(3, 0)], 1)
    plain = F.conv2d(whole, layer.weight, padding=1)
    torch.testing.assert_close(layer(x, guide), plain, rtol=1e-12, atol=1e-13)


def test_the_order_of_classes_changes_nothing_else(segmenter, photo):
    pixels, order = squeezed(photo, 32, 32), [3, 0, 4, 2, 1]
    with torch.no_grad():
        made = segmenter(pixels, classes(segmenter, NAMES))
        turned = segmenter(pixels, classes(segmenter, [NAMES[i] for i in order]))
    torch.testing.assert_close(turned, made[:, order], rtol=1e-5, atol=1e-5)
    assert made.shape == (1, 5, 32, 32) and made.std(1).min() > 0


def test_any_number_of_classes(segmenter, photo):
    pixels = squeezed(photo, 32, 32)
    many = [f"{colour} {shape}" for colour in ("red", "blue", "pink") for shape in ("cross", "ring", "square")]
    with torch.no_grad():
        for count in (1, 6, 9):
            made = segmenter(pixels, classes(segmenter, many[:count]))
            assert made.shape == (1, count, 32, 32)
        # nine are more than six: the likest six are looked at, the same as if they alone had been asked for
        seen, text = segmenter.dense(pixels), classes(segmenter, many)
        best = cost_volume(seen.tokens, text[None])[0].flatten(1).amax(1).topk(6).indices.sort().values
        alone = segmenter(pixels, text[best])
    torch.testing.assert_close(made[:, best], alone, rtol=1e-5, atol=1e-5)
    left = [i for i in range(9) if i not in best.tolist()]
    assert (made[:, left] == ABSENT).all()


def test_dense_tokens_take_their_own_value_in_the_last_layer(segmenter, photo):
    pixels = squeezed(photo, 32, 32)
    with torch.no_grad():
        made = segmenter.dense(pixels)
        out = segmenter.towers.vision_model((pixels + 1) / 2 / 0.5 - 1, output_hidden_states=True)
        before, last = out.hidden_states[-2], segmenter.towers.vision_model.encoder.layers[-1]
        # attention that sees nothing but itself, beside the class token
        value = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(before))) + before[:, :1]
        value = value + last.mlp(last.layer_norm2(value))
        tokens = segmenter.towers.visual_projection(segmenter.towers.vision_model.post_layernorm(value))
    torch.testing.assert_close(made.tokens[0].flatten(1).T, tokens[0, 1:], rtol=1e-5, atol=1e-6)
    for number, inner in zip(segmenter.details, made.inner, strict=True):
        torch.testing.assert_close(inner[0].flatten(1).T, out.hidden_states[number + 1][0, 1:], rtol=1e-5, atol=1e-6)


def test_only_queries_and_values_of_clip_are_trained(segmenter, photo):
    segmenter.tune("attention")
    try:
        logits = segmenter(squeezed(photo, 32, 32), segmenter.embed(segmenter.numbers(NAMES)))
        logits.square().mean().backward()
        moved = {name for name, p in segmenter.towers.named_parameters() if p.grad is not None and p.grad.any()}
        last = "vision_model.encoder.layers.3.self_attn.q_proj.weight"
        expected = {
            f"{tower}_model.encoder.layers.{i}.self_attn.{part}_proj.weight"
            for tower in ("vision", "text") for i in range(4) for part in "qv"
        } - {last}  # fmt: skip
        assert moved == expected == {n for n, p in segmenter.towers.named_parameters() if p.requires_grad}
        assert all(p.grad is not None for p in segmenter.aggregator.parameters())
    finally:
        segmenter.zero_grad(set_to_none=True)
        segmenter.tune("none")


def test_one_window_is_the_whole(segmenter, photo):
    text, square = classes(segmenter, NAMES), photo.crop((0, 0, 36, 36))
    whole = probabilities(segmenter, square, text)
    torch.testing.assert_close(probabilities(segmenter, square, text, Windows(1)), whole, rtol=1e-6, atol=1e-7)
    # several windows: by hand, one at a time
    made = probabilities(segmenter, photo, text, Windows(1.5, 0.25), batch=2)
    height, width = 48, round(48 * 52 / 36)
    assert made.shape == (5, height, width)
    pixels, total, cover = squeezed(photo, width, height), torch.zeros(5, height, width), torch.zeros(height, width)
    for y in starts(height, 32, 0.25):
        for x in starts(width, 32, 0.25):
            with torch.no_grad():
                total[:, y : y + 32, x : x + 32] += segmenter(pixels[..., y : y + 32, x : x + 32], text)[0].sigmoid()
            cover[y : y + 32, x : x + 32] += 1
    whole = F.interpolate(probabilities(segmenter, photo, text)[None], (height, width), mode="bilinear")[0]
    torch.testing.assert_close(made, (total / cover + whole) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(32, 32, 0.3), (33, 32, 0.3), (640, 384, 1 / 3), (97, 32, 0)]
)
def test_windows_cover_a_line(length, window, overlap):
    made = starts(length, window, overlap)
    assert made[0] == 0 and made[-1] == length - window
    assert all(b - a <= window * (1 - overlap) + 1 for a, b in zip(made, made[1:], strict=False))
    assert (length, made) != (640, made) or made == [0, 256]


def test_a_pixel_belongs_to_its_likeliest_class(segmenter, photo):
    owner = segment(segmenter, photo, NAMES)
    likely = probabilities(segmenter, photo, classes(segmenter, NAMES))
    large = F.interpolate(likely[None], (36, 52), mode="bilinear")[0]
    assert owner.shape == (36, 52) and (owner == large.argmax(0).numpy()).all()
    middle = float(large.amax(0).median())
    kept = segment(segmenter, photo, NAMES, threshold=middle)
    assert ((kept < 0) == (large.amax(0) < middle).numpy()).all() and 0.3 < (kept < 0).mean() < 0.7
    found = locate(segmenter, photo, "red cross", threshold=float(large[0].min()))
    assert found.shape == (36, 52) and found.dtype == bool
    with pytest.raises(UserError, match="'red cross' is nowhere in the picture"):
        locate(segmenter, photo, "red cross", threshold=1.0)


def test_a_saved_segmenter_is_the_same(segmenter, folder, photo):
    again, weights = load_segmenter(folder), segmenter.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    made, before = (probabilities(one, photo, classes(one, NAMES)) for one in (again, segmenter))
    torch.testing.assert_close(made, before, rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in again.parameters())


def test_the_verb_writes_masks_legend_and_overlay(folder, photo, tmp_path, capsys):
    photo.save(tmp_path / "photo.png")
    given = ["segment", "--model", folder, "--image", tmp_path / "photo.png", "--classes", ", ".join(NAMES)]
    out, shown = tmp_path / "masks.png", tmp_path / "over.png"
    assert main([*map(str, given), "--out", str(out), "--overlay", str(shown), "--windows"]) == 0
    said = capsys.readouterr().out
    mask, legend = Image.open(out), json.loads((tmp_path / "masks.json").read_text())
    numbers = np.array(mask)
    assert mask.mode == "P" and numbers.shape == (36, 52) and legend["empty"] == 255
    for row in legend["classes"]:
        assert row["share"] == pytest.approx((numbers == row["number"]).mean(), abs=1e-6)
        assert mask.getpalette()[3 * row["number"] :][:3] == row["colour"]
        assert row["name"] == NAMES[row["number"]] and row["name"] in said
    assert Image.open(shown).width % 52 == 0 and Image.open(shown).height > 36 * 10


def test_what_cannot_be_segmented_is_said_in_one_line(folder, photo, tmp_path, capsys):
    path = tmp_path / "photo.png"
    photo.save(path)
    base = {"--model": folder, "--image": path, "--classes": "red cross, green", "--out": tmp_path / "m.png"}
    for changed, words in (
        ({"--classes": ""}, "--classes is empty"),
        ({"--classes": "a,,b"}, "as a name"),
        ({"--classes": "a, b,a"}, "'a' twice"),
        ({"--classes": "red cross, \u2003"}, "has '' as a name"),
        ({"--image": tmp_path / "none.png"}, "none.png"),
        ({"--model": tmp_path / "none"}, "is not a folder"),
        ({"--model": tmp_path}, "is no segmenter"),
        ({"--out": path}, "is --image too"),
        ({"--out": tmp_path / "m.jpg"}, "ends in .png"),
        ({"--threshold": 2}, "--threshold 2"),
        ({"--scale": 0.5, "--windows": None}, "scale 0.5"),
    ):
        given = [part for item in (base | changed).items() for part in item if part is not None]
        assert main(["segment", *map(str, given)]) == 2, changed
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said and said.startswith("semantica: "), said
        assert not (tmp_path / "m.png").exists()


def test_a_folder_that_could_run_code_is_refused(folder, tmp_path, clip):
    import shutil

    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / "extra.bin").write_bytes(b"")
    with pytest.raises(UserError, match="extra.bin is refused"):
        load_segmenter(bad)
    (bad / "extra.bin").unlink()
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "clip": {**config["clip"], "auto_map": {"x": "y"}}}))
    with pytest.raises(UserError, match="remote code is never loaded"):
        load_segmenter(bad)
    for sizes, words in ((Sizes(window=3), "no multiple of windows of 3"), (Sizes(window=4, hidden=18), "hidden 18")):
        with pytest.raises(UserError, match=words):
            Segmenter.from_clip(clip, sizes=sizes)
    for names, words in (([], "there are no classes"), (["green", " \u2003"], "has no words that CLIP's tokenizer")):
        with pytest.raises(UserError, match=words):
            load_segmenter(folder).numbers(names)
