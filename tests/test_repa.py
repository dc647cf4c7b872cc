"""Representation alignment: its equation, where its gradient goes, and that a run without it is as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from semantica import SemanticaPipeline, UserError, UViT
from semantica.cli import main
from semantica.condition import Stream
from semantica.model.cost import encoding_cost
from semantica.model.encoders import frozen_encoder
from semantica.train.build import build
from semantica.train.config import TrainConfig
from semantica.train.heads import RepaHead, aligned_depth, patch_tokens, resampled
from semantica.train.loop import train
from semantica.train.objective import Objective
from semantica.train.run import checkpoint
from semantica.train.setup import sample_flops

SIDE = 32


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a random DINOv2 of four patches and pictures of five groups."""
    import transformers

    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    tower = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIDE, patch_size=8
    )
    transformers.Dinov2Model(tower).save_pretrained(home / "dino")
    rng = np.random.default_rng(0)
    for group in range(5):
        (home / "photos" / f"g{group}").mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(home / "photos" / f"g{group}" / f"{i}.png")
    return home


def config(home: Path, out: Path, **changes) -> TrainConfig:
    options = dict(
        data=str(home / "photos"), out=out, steps=3, batch=4, warmup=2, precision="fp32", held_out=0.0, log_every=1,
        save_every=2, workers=0, device="cpu", encoder=str(home / "dino"), encoder_size=SIDE, image_size=32,
    )  # fmt: skip
    return TrainConfig(**options | changes)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def newest(out: Path) -> Path:
    return checkpoint.folders(out / "checkpoints")[-1]


def small_unet() -> UViT:
    torch.manual_seed(1)
    unet = UViT(
        image_size=16, patch_size=2, channels=(32,), depths=(1,), width=64, depth=4, heads=2, emb_dim=32,
        streams={"image": 24},
    )  # fmt: skip
    with torch.no_grad():
        # layers that start as zeros would hide what comes before them
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return unet


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, Stream]:
    g = torch.Generator().manual_seed(2)
    tokens = torch.randn(batch, 5, 24, generator=g)
    return torch.randn(batch, 3, 16, 16, generator=g), torch.randn(batch, generator=g), Stream(tokens, tokens.mean(1))


def test_the_loss_is_the_negative_mean_cosine_of_projected_states():
    torch.manual_seed(0)
    head = RepaHead(width=12, token_dim=7, depth=1)
    hidden, tokens = torch.randn(3, 16, 12), torch.randn(3, 16, 7) * 5
    wide = {name: value.double().numpy() for name, value in head.state_dict().items()}
    x = hidden.double().numpy()
    for layer in (0, 2, 4):
        x = x @ wide[f"project.{layer}.weight"].T + wide[f"project.{layer}.bias"]
        if layer < 4:
            x = x / (1 + np.exp(-x))
    y = tokens.double().numpy()
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    actual = head(hidden, tokens)
    np.testing.assert_allclose(actual.detach(), -cosine.mean(1), rtol=0, atol=1e-6)
    assert actual.shape == (3,) and [m.out_features for m in head.project if hasattr(m, "weight")] == [24, 24, 7]
    # how long a token is does not matter
    torch.testing.assert_close(head(hidden, tokens * torch.rand(3, 16, 1).add(0.1)), actual)


@pytest.mark.parametrize(("side", "wanted"), [(4, 2), (16, 8), (5, 3), (2, 4), (3, 3)])
def test_token_grids_are_resampled_by_the_triangle_filter(side, wanted):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, side * side, 6, generator=g)
    step = side / wanted
    reach = max(step, 1.0)
    centres, places = (np.arange(wanted)[:, None] + 0.5) * step, np.arange(side) + 0.5
    weights = np.clip(1 - np.abs(places - centres) / reach, 0, None)
    weights /= weights.sum(1, keepdims=True)
    grid = tokens.double().numpy().reshape(2, side, side, 6)
    expected = np.einsum("yi,xj,bijc->byxc", weights, weights, grid).reshape(2, wanted * wanted, 6)
    np.testing.assert_allclose(resampled(tokens, wanted * wanted), expected, rtol=0, atol=1e-5)
    if side == wanted:
        assert resampled(tokens, side * side) is tokens


def test_the_paper_s_share_of_the_blocks():
    assert [aligned_depth(depth) for depth in (28, 3, 10, 14, 24)] == [8, 1, 3, 4, 7]
    assert aligned_depth(10, 5) == 5
    for blocks in (0, 11):
        with pytest.raises(UserError, match=f"--repa-depth {blocks} is not one of the 10"):
            aligned_depth(10, blocks)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_hidden_states_are_those_after_the_block_and_change_nothing(depth):
    unet = small_unet()
    z, logsnr, stream = inputs()
    condition = unet.condition({"image": stream})
    seen = []
    with unet.transformer_blocks[depth - 1].register_forward_hook(lambda *a: seen.append(a[2])):
        plain = unet(z, logsnr, condition)
    v, states = unet(z, logsnr, condition, depth)
    assert torch.equal(v, plain) and torch.equal(states, seen[0]) and states.shape == (3, 16, 64)


def test_the_gradient_ends_at_the_chosen_block():
    unet = small_unet()
    z, logsnr, stream = inputs()
    head = RepaHead(64, 24, 2)
    _, states = unet(z, logsnr, unet.condition({"image": stream}), head.depth)
    head(states, torch.randn(3, 16, 24)).mean().backward()
    reached = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    blocks = {name.split(".")[1] for name in reached if name.startswith("transformer_blocks")}
    assert blocks == {"0", "1"} and not [n for n in reached if n.startswith(("up_", "norm_out", "conv_out"))]
    before = [n for n, _ in unet.named_parameters() if n.startswith(("conv_in", "down_", "transformer_blocks.0.attn"))]
    assert before and all(unet.get_parameter(name).grad.any() for name in before if "norm_k" not in name)
    assert all(parameter.grad.any() for parameter in head.parameters())


def test_the_target_s_tokens_are_of_the_clean_target_without_gradient(home):
    teacher = frozen_encoder(str(home / "dino"), SIDE, "all")
    target = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    larger = torch.nn.functional.interpolate(target, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
    tokens = patch_tokens(teacher, target.requires_grad_())
    # the class token comes first and is no patch
    torch.testing.assert_close(tokens, teacher(larger).tokens[:, 1:], rtol=0, atol=1e-5)
    assert tokens.shape == (2, 16, 32) and not tokens.requires_grad
    unet, head = small_unet(), RepaHead(64, 32, 1)
    objective = Objective(unet, teacher, repa=head, repa_encoder=teacher)
    z, logsnr, stream = inputs(2)
    options = dict(condition=stream, target=target.detach(), noise=z, logsnr=logsnr)
    drop = torch.zeros(2, dtype=torch.bool)
    losses, pairing, aligned = objective(**options, drop=drop)
    stored = objective(**options, drop=drop, target_tokens=teacher(larger).tokens.half())
    torch.testing.assert_close(stored[2], aligned, rtol=0, atol=1e-3)
    assert pairing is None and aligned.shape == (2,) and torch.equal(stored[0], losses)
    plain = Objective(unet, teacher)(**options, drop=drop)
    assert torch.equal(plain[0], losses) and plain[1:] == (None, None)


def test_the_projector_is_trained_and_kept_but_not_published(home, tmp_path):
    out = tmp_path / "run"
    train(config(home, out, repa=0.5, steps=4, flip=False, lr=1e-3))
    files = {p.name for p in newest(out).iterdir()}
    assert files == {
        f"{n}.safetensors" for n in ("unet", "ema_unet", "optimizer", "repa", "ema_repa")
    } | {"state.json"}  # fmt: skip
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"checkpoints", "unet", "encoder", "scheduler", "logs"}
    pipeline = SemanticaPipeline.from_pretrained(out)
    assert not [name for name in pipeline.unet.state_dict() if "repa" in name or "project" in name]
    aligned = [row["repa_loss"] for row in rows(out)]
    assert aligned[-1] < aligned[0] and abs(aligned[0]) < 0.3
    train(config(home, tmp_path / "plain", steps=4, flip=False, lr=1e-3))
    plain = rows(tmp_path / "plain")
    # the same start, and another way from there
    assert plain[0]["loss"] == rows(out)[0]["loss"] and plain[3]["loss"] != rows(out)[3]["loss"]
    assert "repa_loss" not in plain[0] and not (newest(tmp_path / "plain") / "repa.safetensors").exists()
    # continued from step 2, it is the same run
    other = tmp_path / "parts"
    train(config(home, other, repa=0.5, steps=2, flip=False, lr=1e-3))
    train(config(home, other, repa=0.5, steps=4, flip=False, lr=1e-3))
    for name in ("unet", "repa", "optimizer"):
        a, b = (load_file(newest(folder) / f"{name}.safetensors") for folder in (out, other))
        assert all(torch.equal(a[key], value) for key, value in b.items())
    with pytest.raises(UserError, match="made with --repa 0.5, not 0.25"):
        train(config(home, other, repa=0.25, steps=5, flip=False, lr=1e-3))


def test_one_step_descends_the_weighted_sum(home, tmp_path):
    """The gradient norm of the first step against autograd on the weighted sum of both losses."""
    from semantica.diffusion import noise_levels
    from semantica.train.build import alignment, build
    from semantica.train.data.open import open_data
    from semantica.train.data.pairs import Pairs

    settings = config(home, tmp_path / "run", repa=0.5, steps=1, drop=0.0)
    train(settings)
    unet, encoder, scheduler = build(settings, torch.device("cpu"))
    head, teacher = alignment(settings, unet, encoder, torch.device("cpu"))
    assert teacher is encoder
    data = open_data(settings.data)
    pairs = Pairs(data, seed=0, image_size=32, condition_size=SIDE, global_batch=4, drop=0.0)
    batch = pairs.batch(range(4))
    logsnr = noise_levels(batch["u"], scheduler.schedule)
    objective = Objective(unet, encoder, repa=head, repa_encoder=teacher)
    losses, _, aligned = objective(batch["condition"], batch["target"], batch["noise"], logsnr, batch["drop"])
    (losses.mean() + 0.5 * aligned.mean()).backward()
    norm = sum(p.grad.square().sum() for p in objective.parameters() if p.grad is not None).sqrt().item()
    (row,) = rows(tmp_path / "run")
    np.testing.assert_allclose([row["grad_norm"], row["loss"]], [norm, losses.mean().item()], rtol=1e-5)
    np.testing.assert_allclose(row["repa_loss"], aligned.mean().item(), rtol=1e-4)


def test_stored_tokens_of_the_target_are_read_at_its_stored_view(home, tmp_path):
    tokens = tmp_path / "tokens"
    options = ["--encoder", str(home / "dino"), "--encoder-size", str(SIDE), "--precision", "fp32", "--processes", "1"]
    assert main(["pairs", "--tokens", str(home / "photos"), "--out", str(tokens), *options]) == 0
    with pytest.raises(UserError, match="give --crop centre too"):
        train(config(home, tmp_path / "no", repa=0.5, tokens=str(tokens)))
    for name, where in (("live", None), ("stored", str(tokens))):
        train(config(home, tmp_path / name, repa=0.5, tokens=where, crop="centre"))
    live, stored = ([(row["loss"], row["repa_loss"]) for row in rows(tmp_path / name)] for name in ("live", "stored"))
    # targets are mirrored at random, and so are their tokens
    np.testing.assert_allclose(stored, live, rtol=0, atol=2e-3)
    assert np.ptp([aligned for _, aligned in live]) > 0.02


@pytest.mark.slow
def test_an_encoder_that_is_trained_along_is_helped_by_a_frozen_one(home, small_run, tmp_path):
    vit = dict(encoder="vit", encoder_size=None)
    for teacher in (str(home / "dino"), str(small_run)):
        out = tmp_path / Path(teacher).name
        train(config(home, out, repa=0.5, repa_encoder=teacher, repa_depth=2, steps=1, **vit))
        kept = SemanticaPipeline.from_pretrained(out).encoder
        assert type(kept).__name__ == "ViTEncoder" and (newest(out) / "ema_encoder.safetensors").exists()
        projector = load_file(newest(out) / "repa.safetensors")
        assert projector["project.4.weight"].shape[0] == frozen_encoder(teacher).token_dim


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(repa=-1.0), "--repa is -1.0"),
        (dict(repa=float("nan")), "--repa is nan"),
        (dict(repa_encoder="x"), "--repa is 0.0"),
        (dict(repa_depth=1), "--repa is 0.0"),
        (dict(repa=0.5, repa_depth=4), "--repa-depth 4 is not one of the 3"),
        (dict(repa=0.5, encoder="vit", encoder_size=None), "--repa aligns to a frozen encoder"),
        (dict(repa=0.5, repa_encoder="/no/such/encoder"), "encoder '/no/such/encoder' cannot be loaded"),
    ],
)
def test_impossible_options_write_nothing(home, tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        train(config(home, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_operations_of_a_step_have_those_of_every_encoder_that_runs(home, tmp_path):
    """One that only the loss asks is as much work as one that conditions too."""
    unet, encoder, _ = build(config(home, tmp_path), torch.device("cpu"))
    other = frozen_encoder(str(home / "dino"), 2 * SIDE)
    base = sample_flops(config(home, tmp_path), unet, encoder, None, None)
    once, larger = encoding_cost(encoder)[0], encoding_cost(other)[0]
    assert larger > 2 * once > 0
    assert sample_flops(config(home, tmp_path), unet, encoder, None, encoder) == base + once
    assert sample_flops(config(home, tmp_path), unet, encoder, None, other) == base + larger
    assert sample_flops(config(home, tmp_path, tokens="kept"), unet, encoder, None, other) == base - once + larger
