"""Other arithmetic in training: fp16 with a scaled loss, float8, and blocks that keep their products."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from semantica import UserError, UViT
from semantica.model.float8 import check_float8, to_float8
from semantica.model.recompute import is_product, keeping_products
from semantica.train.build import build
from semantica.train.config import TrainConfig
from semantica.train.loop import scale, train
from semantica.train.objective import Objective
from semantica.train.processes import World
from semantica.train.run import checkpoint
from semantica.train.run.measure import Measure
from semantica.train.state import TrainState


def config(photos, out, **changes) -> TrainConfig:
    options = dict(
        data=str(photos), out=out, steps=2, batch=2, warmup=0, precision="fp16", held_out=0.0, log_every=1,
        save_every=1, sample_every=100, workers=0, device="cpu", align=0.1,
    )  # fmt: skip
    return TrainConfig(**{**options, **changes})


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def newest(out: Path) -> Path:
    return checkpoint.folders(out / "checkpoints")[-1]


@pytest.mark.slow
def test_fp16_trains_close_to_fp32_and_continues_to_the_same_bits(photos, tmp_path):
    """With the scale of the loss and what it waits for in the checkpoint."""
    for name, changes in (("fp16", {}), ("fp32", dict(precision="fp32")), ("parts", dict(steps=1))):
        train(config(photos, tmp_path / name, **changes))
    train(config(photos, tmp_path / "parts"))
    half, whole = rows(tmp_path / "fp16"), rows(tmp_path / "fp32")
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in whole], rel=2e-2)
    assert [row["grad_norm"] for row in half] == pytest.approx([row["grad_norm"] for row in whole], rel=5e-2)
    assert half[-1]["loss_scale"] == 2.0**16 and "loss_scale" not in whole[0]
    a, b = ({p.name: load_file(p) for p in newest(tmp_path / n).glob("*.safetensors")} for n in ("fp16", "parts"))
    assert a.keys() == b.keys() and {k: v.item() for k, v in a["scaler.safetensors"].items()} == {
        "scale": 2.0**16,
        "steps": 2.0,
    }
    assert all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name])


def test_a_step_that_overflows_changes_the_scale_alone(photos, tmp_path):
    module = torch.nn.Linear(3, 2)
    settings = config(photos, tmp_path)
    state = TrainState(settings, {"unet": module}, torch.amp.GradScaler("cpu", init_scale=4.0))
    before = {key: value.clone() for key, value in state.tensors().items()}
    state.scaler.scale(module(torch.full((1, 3), torch.inf)).sum()).backward()
    assert not state.update().isfinite() and scale(state) == {"loss_scale": 2.0}
    after = state.tensors()
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.startswith("scaler"))
    state.scaler.scale(module(torch.ones(1, 3)).sum()).backward()
    # gradients of ones: what the update sees is without the scale
    assert state.update().item() == pytest.approx(8**0.5) and not torch.equal(module.weight, before["unet/weight"])
    again = TrainState(settings, {"unet": torch.nn.Linear(3, 2)}, torch.amp.GradScaler("cpu"))
    again.resumed(2, state.tensors())
    assert again.step == 2 and again.scaler.state_dict() == state.scaler.state_dict()
    measure = Measure(settings, torch.device("cpu"), torch.float16, 1, World())
    measure.start()
    for _ in range(2):
        state.scaler.scale(module(torch.full((1, 3), torch.inf)).sum()).backward()
        measure.step(torch.ones(()), state.update())
    # the log is JSON, which has no NaN
    assert measure.row(4, 0.1)["grad_norm"] is None
    with pytest.raises(FloatingPointError, match="overflow in fp16 with any scale"):
        scale(state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(parallel="fsdp"), "--precision fp16 is for processes that hold all weights"),
        (dict(float8=True, precision="bf16"), "--float8 is slower than bf16 unless compiled"),
        (dict(float8=True, compile=True), "goes with bf16"),
        (dict(float8=True, compile=True, precision="bf16", parallel="hsdp"), "leave out --parallel hsdp"),
        (dict(checkpointing_keeps="products"), "--checkpointing-keeps is nothing without --checkpointing"),
        (dict(checkpointing_keeps="products", checkpointing=True, compile=True), "give --compile-scope network too"),
        (dict(compile=True, compile_scope="network", parallel="fsdp"), "--compile-scope network is for processes that"),
    ],
)
def test_what_does_not_go_together_is_one_line(photos, tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        config(photos, tmp_path, **changes).check()
    assert "\n" not in str(caught.value)


def test_float8_is_for_cards_that_have_it(photos, tmp_path, monkeypatch):
    settings = config(photos, tmp_path / "run", float8=True, compile=True, precision="bf16")
    with pytest.raises(UserError, match="--float8 needs a GPU of compute capability 8.9 or newer, not cpu"):
        train(settings)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--float8 needs torchao: pip install"):
        check_float8(torch.device("cuda"))


def test_float8_rounds_the_transformers_products_and_nothing_else():
    """Emulated: the products of rounded numbers, in the same parameters, with gradients for them."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    unet = UViT(image_size=16, channels=(32,), depths=(1,), width=64, depth=2, heads=2, streams={"image": 16})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    names, parameters = list(unet.state_dict()), [*unet.parameters()]
    block = unet.transformer_blocks[0].mlp[0]
    x = torch.randn(4, 16, 64)
    exact = block(x)
    made = to_float8(unet, emulate=True)
    kinds = ("attn.to_qkv", "attn.to_out", "cross.to_q", "cross.to_out", "mlp.0", "mlp.3")
    assert {*made} == {f"transformer_blocks.{i}.{kind}" for i in range(2) for kind in kinds}
    assert list(unet.state_dict()) == names and all(a is b for a, b in zip(unet.parameters(), parameters, strict=True))
    rounded = unet.transformer_blocks[0].mlp[0](x)
    # E4M3 has three bits after the leading one: each factor is off by at most 2^-4 of itself
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-3 < error < 2**-4
    rounded.sum().backward()
    assert parameters[names.index("transformer_blocks.0.mlp.0.weight")].grad.isfinite().all()


class Products(TorchDispatchMode):
    """How often products, convolutions and attention are computed."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += is_product(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_kept_products_are_not_computed_again_and_gradients_are_the_same_bits(photos, tmp_path):
    settings = config(photos, tmp_path, precision="fp32")
    unet, encoder, _ = build(settings, torch.device("cpu"))
    objective = Objective(unet, encoder)
    g = torch.Generator().manual_seed(0)
    images, logsnr = [torch.randn(4, 3, 32, 32, generator=g) for _ in range(3)], torch.randn(4, generator=g)
    counts, found = [], []
    for function in ("none", None, keeping_products):
        for module in (unet, encoder) if function != "none" else ():
            module.enable_gradient_checkpointing(function)
        losses, *_ = objective(*images, logsnr, torch.zeros(4, dtype=torch.bool))
        with Products() as seen:
            losses.mean().backward()
        counts.append(seen.count)
        found.append([p.grad.clone() for p in objective.parameters() if p.grad is not None])
        objective.zero_grad()
    whole, again, kept = counts
    # 14 blocks with two convolutions, or six products and attention, and more
    assert kept == whole and again - whole > 50
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("aten::addmm", True),
        ("aten::convolution", True),
        ("aten::_scaled_dot_product_cudnn_attention", True),
        ("semantica::cross_attention", True),
        ("semantica::group_norm", False),
        ("semantica::cross_attention_backward", False),
        ("aten::convolution_backward", False),
        ("aten::mul", False),
    ],
)
def test_what_is_worth_keeping(name, product):
    assert is_product(name) == product
