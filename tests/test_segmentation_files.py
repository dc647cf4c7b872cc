"""Segmenters from files: the authors' weights without unpickling, and training that continues bit-exactly."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from semantica import UserError
from semantica.benchmarks.quality.small_clip import write_clip
from semantica.cli import main
from semantica.segmentation.convert import converted, ours, read_tensors
from semantica.segmentation.segmenter import Segmenter, load_segmenter
from semantica.segmentation.sizes import Sizes
from semantica.segmentation.windows import EMPTY
from semantica.train.segmentation.data import Labelled, Samples
from semantica.train.segmentation.loop import class_loss

OWN, CLIP = "sem_seg_head.predictor.transformer.", "sem_seg_head.predictor.clip_model."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_clip(folder, 0)
    return folder


def published(width=64, text=64, joint=32, layers=6, patch=4, hidden=16):
    """Weights under the authors' names: those of `Aggregator` and `CLIP` in KU-CVLAB/CAT-Seg, with small sizes."""
    shapes = {"upsample1": ((width, 8, 2, 2), 8), "upsample2": ((width, 8, 4, 4), 8)}
    weights, generator = {}, torch.Generator().manual_seed(0)

    def add(name, *shape):
        weights[name] = torch.randn(shape, generator=generator) * 0.1

    def layer(name, out, into, *kernel, bias=True):
        add(f"{name}.weight", out, into, *kernel)
        if bias:
            add(f"{name}.bias", out)

    def norm(name, size):
        add(f"{name}.weight", size)
        add(f"{name}.bias", size)

    for name, (shape, out) in shapes.items():
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", out)
    for i in range(2):
        swin, across = f"{OWN}layers.{i}.swin_block.", f"{OWN}layers.{i}.attention."
        for block in ("block_1", "block_2"):
            norm(f"{swin}{block}.norm1", hidden)
            norm(f"{swin}{block}.norm2", hidden)
            for part in "qk":
                layer(f"{swin}{block}.attn.{part}", hidden, hidden + 12)
            layer(f"{swin}{block}.attn.v", hidden, hidden)
            layer(f"{swin}{block}.attn.proj", hidden, hidden)
            layer(f"{swin}{block}.mlp.fc1", 4 * hidden, hidden)
            layer(f"{swin}{block}.mlp.fc2", hidden, 4 * hidden)
        add(f"{swin}block_2.attn_mask", 4, 9, 9)
        norm(f"{swin}guidance_norm", 12)
        for part in "qk":
            layer(f"{across}attention.{part}", hidden, hidden + 12)
        layer(f"{across}attention.v", hidden, hidden)
        layer(f"{across}MLP.0", 4 * hidden, hidden)
        layer(f"{across}MLP.2", hidden, 4 * hidden)
        norm(f"{across}norm1", hidden)
        norm(f"{across}norm2", hidden)
        add(f"{across}padding_tokens", 1, 1, hidden)
        add(f"{across}padding_guidance", 1, 1, 12)
    layer(f"{OWN}conv1", hidden, 1, 7, 7)
    layer(f"{OWN}guidance_projection.0", 12, joint, 3, 3)
    layer(f"{OWN}text_guidance_projection.0", 12, joint)
    for i, (wide, out) in enumerate(((16, 4), (16, 4)), 1):
        layer(f"{OWN}decoder_guidance_projection.{i - 1}.0", out, 8, 3, 3)
        add(f"{OWN}decoder{i}.up.weight", hidden, wide - 4, 2, 2)
        add(f"{OWN}decoder{i}.up.bias", wide - 4)
        for place in (0, 3):
            layer(f"{OWN}decoder{i}.conv.double_conv.{place}", 16, 16, 3, 3, bias=False)
            norm(f"{OWN}decoder{i}.conv.double_conv.{place + 1}", 16)
    layer(f"{OWN}head", 1, 16, 3, 3)
    for start, size in (("visual.", width), ("", text)):
        for i in range(layers):
            block = f"{CLIP}{start}transformer.resblocks.{i}."
            for part in "qkv":
                add(f"{block}attn.{part}_proj_weight", size, size)
            add(f"{block}attn.in_proj_bias", 3 * size)
            layer(f"{block}attn.out_proj", size, size)
            norm(f"{block}ln_1", size)
            norm(f"{block}ln_2", size)
            layer(f"{block}mlp.c_fc", 4 * size, size)
            layer(f"{block}mlp.c_proj", size, 4 * size)
    add(f"{CLIP}visual.class_embedding", width)
    add(f"{CLIP}visual.conv1.weight", width, 3, patch, patch)
    add(f"{CLIP}visual.positional_embedding", 1 + 8 * 8, width)
    add(f"{CLIP}visual.proj", width, joint)
    norm(f"{CLIP}visual.ln_pre", width)
    norm(f"{CLIP}visual.ln_post", width)
    add(f"{CLIP}token_embedding.weight", 900, text)
    add(f"{CLIP}positional_embedding", 24, text)
    norm(f"{CLIP}ln_final", text)
    add(f"{CLIP}text_projection", text, joint)
    add(f"{CLIP}logit_scale")
    return weights


def test_published_weights_become_a_segmenter(tmp_path, clip, capsys):
    weights = published()
    torch.save({"model": weights, "iteration": 80000}, tmp_path / "model.pth")
    given = ["--weights", tmp_path / "model.pth", "--tokenizer", clip, "--out", tmp_path / "run"]
    assert main(["convert-segmenter", *map(str, given)]) == 0, capsys.readouterr().err
    made = load_segmenter(tmp_path / "run")
    vision = made.towers.vision_model
    assert (made.grid, made.image_size, made.details, len(vision.encoder.layers)) == (24, 96, (1, 3), 6)
    # names that mean the same, by what they are for
    layer, block = vision.encoder.layers[4], f"{CLIP}visual.transformer.resblocks.4."
    assert torch.equal(layer.self_attn.k_proj.weight, weights[f"{block}attn.k_proj_weight"])
    assert torch.equal(layer.self_attn.v_proj.bias, weights[f"{block}attn.in_proj_bias"][128:])
    assert torch.equal(made.towers.text_projection.weight, weights[f"{CLIP}text_projection"].T)
    swin = made.aggregator.spatial[1].blocks[1]
    assert torch.equal(swin.attention.q.weight, weights[f"{OWN}layers.1.swin_block.block_2.attn.q.weight"])
    padding = weights[f"{OWN}layers.0.attention.padding_guidance"]
    assert torch.equal(made.aggregator.classes[0].padding_guide, padding[0, 0])
    second = weights[f"{OWN}decoder2.conv.double_conv.3.weight"]
    assert torch.equal(made.aggregator.decoder[1].conv2.weight, second)
    assert torch.equal(made.aggregator.details[1][0].weight, weights["upsample2.weight"])
    # every weight came from one of theirs, and none of theirs but the mask is left
    assert sum(map(torch.numel, made.state_dict().values())) == sum(
        tensor.numel() for name, tensor in weights.items() if not name.endswith("attn_mask")
    )
    with torch.no_grad():
        logits = made(torch.zeros(1, 3, 96, 96), made.embed(made.numbers(["red cross", "green"])))
    assert logits.shape == (1, 2, 96, 96) and logits.isfinite().all() and logits.std() > 0
    for changed, words in (
        (lambda w: w.pop(f"{OWN}head.bias"), "lacks the weight aggregator.head.bias"),
        (lambda w: w.update({f"{OWN}extra": torch.zeros(1)}), "unknown weight aggregator.extra"),
        (lambda w: w.update({f"{OWN}head.bias": torch.zeros(2)}), "aggregator.head.bias is [2], expected [1]"),
    ):
        other = dict(weights)
        changed(other)
        with pytest.raises(UserError) as said:
            converted(other, "model.pth")
        assert words in str(said.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["torch", "pickle", "hidden", "shape", "text", "none"])
def test_a_file_that_is_more_than_tensors_is_refused_and_runs_nothing(kind, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "model.pth"
    held = {
        "torch": {"model": {"a": torch.zeros(1)}, "hook": Bomb(mark)},
        "hidden": {"model": {"a": torch.zeros(1), "b": Bomb(mark)}},
        "shape": {"model": {"a": torch.zeros(1), "b": [1, 2]}},
    }
    if kind in held:
        torch.save(held[kind], path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    elif kind == "text":
        path.write_text("no checkpoint")
    with pytest.raises(UserError, match="is no file" if kind == "none" else "is refused") as said:
        read_tensors(path)
    assert not mark.exists() and "\n" not in str(said.value)


def test_a_name_has_one_place():
    names = [new for name, tensor in published().items() for new in ours(name, tensor)]
    assert len(names) == len(set(names))


def test_the_loss_is_of_each_class_by_itself():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 4), generator=generator)
    labels[0, 0] = EMPTY
    total = 0.0
    for t in range(3):
        # softplus(-x) where the class is, softplus(x) where it is not; an empty pixel is in no class
        x = logits[:, t]
        total += np.where(labels == t, np.logaddexp(0, -x.numpy()), np.logaddexp(0, x.numpy())).sum()
    assert class_loss(logits, labels).item() == pytest.approx(total / logits.numel(), rel=1e-12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six pictures of 40 x 36 whose red part is class 0, the rest class 1, a corner nothing."""
    root = tmp_path_factory.mktemp("data")
    (root / "images/a").mkdir(parents=True)
    (root / "masks/a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        red = np.zeros((36, 40), bool)
        y, x = rng.integers(2, 20, 2)
        red[y : y + 12, x : x + 14] = True
        Image.fromarray(np.where(red[..., None], (220, 30, 30), (60, 150, 70)).astype(np.uint8)).save(
            root / f"images/a/{i}.png"
        )
        mask = np.where(red, 0, 1).astype(np.uint8)
        mask[:2, :2] = EMPTY
        Image.fromarray(mask).save(root / f"masks/a/{i}.png")
    (root / "classes.json").write_text(json.dumps(["red square", "green"]))
    return root


def test_a_picture_and_its_mask_are_cut_alike(data):
    opened = Labelled.open(data)
    samples = Samples(opened, 24, 3, 0.6, True, 0, 60)
    for number in range(0, 60, 7):
        picture, labels = samples[number]
        red = (picture[0] > 0.2) & (picture[1] < 0)
        inner = labels != EMPTY
        assert (red == (labels == 0))[inner].float().mean() > 0.93
        again = Samples(opened, 24, 3, 0.6, True, number, 1)[0]
        assert torch.equal(again[0], picture) and torch.equal(again[1], labels)
    seen = {samples[n][0].numpy().tobytes() for n in range(12)}
    assert len(seen) == 12


SIZES = ["--sizes.hidden", "16", "--sizes.guidance", "16", "--sizes.window", "4", "--sizes.decoder", "16", "16",
         "--sizes.raised", "8", "8", "--sizes.projected", "4", "4", "--sizes.layers", "1"]  # fmt: skip


def train(data, clip, out, *options):
    given = ["--data", data, "--clip", clip, "--out", out, "--workers", 0, "--batch", 2, "--device", "cpu"]
    return main(["train-segmenter", *map(str, [*given, *options]), *SIZES])


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(data, clip, tmp_path, monkeypatch, capsys):
    options = ["--steps", 4, "--save-every", 2, "--rate", 1e-3, "--clip-norm", 1]
    assert train(data, clip, tmp_path / "whole", *options) == 0
    from semantica.train.segmentation import loop

    with monkeypatch.context() as patch:
        calls = iter(range(9))

        def broken(logits, labels):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return class_loss(logits, labels)

        patch.setattr(loop, "class_loss", broken)
        assert train(data, clip, tmp_path / "parts", *options) == 130
    assert not (tmp_path / "parts/config.json").exists()
    assert train(data, clip, tmp_path / "parts", *options) == 0 and "continues at step 2" in capsys.readouterr().out
    name = "diffusion_pytorch_model.safetensors"
    whole, parts = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    # only what is to be trained has changed
    fresh = Segmenter.from_clip(clip, sizes=Sizes(16, 1, 4, 4, 2, 16, (16, 16), (8, 8), (4, 4))).tune("attention")
    kept = {n for n, p in fresh.towers.named_parameters() if not p.requires_grad}
    moved = {n for n, p in fresh.towers.named_parameters() if not torch.equal(p, whole[f"towers.{n}"])}
    assert moved and not moved & kept
    capsys.readouterr()
    assert train(data, clip, tmp_path / "parts", *options[:-3], 2e-3) == 2
    assert "was begun with" in capsys.readouterr().err


def test_data_that_cannot_be_used_is_said_in_one_line(data, clip, tmp_path, capsys):
    import shutil

    def changed(name, change):
        root = shutil.copytree(data, tmp_path / name)
        change(root)
        return root

    def large(root):
        Image.fromarray(np.full((36, 40), 7, np.uint8)).save(root / "masks/a/0.png")

    def other(root):
        Image.fromarray(np.zeros((10, 10), np.uint8)).save(root / "masks/a/0.png")

    roots = (
        (changed("a", lambda root: (root / "classes.json").unlink()), "classes.json cannot be read"),
        (changed("b", lambda root: (root / "classes.json").write_text("[]")), "no list of names"),
        (changed("c", lambda root: (root / "masks/a/3.png").unlink()), "3.png has no mask"),
        (changed("d", lambda root: shutil.rmtree(root / "images")), "has no pictures"),
        (changed("e", large), "has class 7"),
        (changed("f", other), "is 10 x 10, its picture 40 x 36"),
        (changed("g", lambda root: (root / "classes.json").write_text('["a", " "]')), "has no words"),
    )
    for root, words in roots:
        assert train(root, clip, tmp_path / f"run-{root.name}", "--steps", 3) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said, said
    for options, words in ((["--steps", 0], "--steps is 0"), (["--crop", 2], "--crop is 2")):
        assert train(data, clip, tmp_path / "none", *options) == 2
        assert words in capsys.readouterr().err
    assert train(data, tmp_path / "nowhere", tmp_path / "none", "--steps", 1) == 2
    assert "no folder, nor on the hub" in capsys.readouterr().err
