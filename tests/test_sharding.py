"""What is put around a network: recomputed blocks, and FSDP2 with its memory formats and types."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from semantica.condition import Stream
from semantica.model.layers import GroupNormAct
from semantica.train.build import build
from semantica.train.config import TrainConfig
from semantica.train.loop import train
from semantica.train.objective import Objective
from semantica.train.processes import World
from semantica.train.run import checkpoint
from semantica.train.sharding import parallelize

FILES = ("unet", "encoder", "head", "ema_unet", "ema_encoder", "ema_head", "optimizer")


def config(photos, out, **changes) -> TrainConfig:
    options = dict(
        data=str(photos), out=out, steps=3, batch=8, accumulate=2, warmup=0, lr=1e-4, align=0.05, precision="fp32",
        held_out=0.2, log_every=1, save_every=3, sample_every=100, workers=0, device="cpu",
    )  # fmt: skip
    return TrainConfig(**{**options, **changes})


def newest(out: Path) -> Path:
    return checkpoint.folders(out / "checkpoints")[-1]


def test_checkpointed_blocks_train_to_the_same_bits(photos, tmp_path):
    """With dropout too: what is computed again draws the same masks."""
    for name, changes in (("kept", {}), ("again", dict(checkpointing=True))):
        train(config(photos, tmp_path / name, conditioning="both", **changes))
    for name in FILES:
        a, b = (load_file(newest(tmp_path / n) / f"{name}.safetensors") for n in ("kept", "again"))
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_checkpointed_blocks_keep_less_for_the_backward_pass(photos, tmp_path):
    """Bytes that one forward pass leaves for the backward pass, weights aside; gradients are the same bits."""
    unet, encoder, _ = build(config(photos, tmp_path), torch.device("cpu"))
    objective = Objective(unet, encoder)
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    g = torch.Generator().manual_seed(0)
    images, logsnr = [torch.randn(4, 3, 32, 32, generator=g) for _ in range(3)], torch.randn(4, generator=g)
    found = []
    for again in (False, True):
        for module in (unet, encoder) if again else ():
            module.enable_gradient_checkpointing()
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses, *_ = objective(*images, logsnr, torch.zeros(4, dtype=torch.bool))
        losses.mean().backward()
        gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
        objective.zero_grad()
        found.append((sum(n for place, n in kept.items() if place not in weights), gradients))
    (whole, expected), (least, actual) = found
    assert len(expected) > 100 and all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert whole > 3 * least, (whole, least)


def test_sharded_networks_keep_channels_last_and_the_fused_operators(photos, tmp_path):
    """In bf16: what the norms see, and what runs; weights are fp32 again, and gradients fp32, after the step."""
    settings = config(photos, tmp_path)
    unet, encoder, _ = build(settings, torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = World("fsdp")
        parallel = parallelize(world, torch.device("cpu"), torch.bfloat16)
        for module in (unet, encoder):
            parallel.shard(module)
        seen = []
        norms = [m for m in unet.modules() if isinstance(m, GroupNormAct)]
        for norm in norms:
            norm.register_forward_pre_hook(
                lambda m, x: seen.append(
                    (x[0].is_contiguous(memory_format=torch.channels_last), x[0].dtype, m.weight.dtype)
                )
            )
        g = torch.Generator().manual_seed(0)
        images = [parallel.place(torch.randn(2, 3, 32, 32, generator=g)) for _ in range(3)]
        with torch.autocast("cpu", torch.bfloat16), profile(activities=[ProfilerActivity.CPU]) as found:
            losses, *_ = Objective(unet, encoder)(*images, torch.randn(2), torch.zeros(2, dtype=torch.bool))
            losses.mean().backward()
        assert seen == [(True, torch.bfloat16, torch.bfloat16)] * len(norms)
        counts = {event.key: event.count for event in found.key_averages()}
        assert counts["semantica::group_norm"] == len(norms)
        assert counts["semantica::cross_attention"] == len(unet.transformer_blocks)
        for parameter in unet.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
        world.close()
    finally:
        dist.destroy_process_group()


def test_ddp_leaves_a_frozen_encoder_elsewhere_alone(photos, tmp_path):
    """That of stored tokens stays on the CPU while a GPU trains; here its weights are on "meta" while the CPU does."""
    unet, encoder, _ = build(config(photos, tmp_path), torch.device("cpu"))
    objective = Objective(unet, encoder.requires_grad_(False).to("meta"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = World("ddp")
        wrapped = parallelize(world, torch.device("cpu"), torch.float32).wrap(objective)
        g = torch.Generator().manual_seed(0)
        tokens = Stream(
            torch.randn(2, 4, encoder.token_dim, generator=g), torch.randn(2, encoder.token_dim, generator=g)
        )
        images = [torch.randn(2, 3, 32, 32, generator=g) for _ in range(2)]
        losses, *_ = wrapped(tokens, *images, torch.zeros(2), torch.zeros(2, dtype=torch.bool))
        losses.mean().backward()
        assert unet.conv_in.weight.grad.isfinite().all()
        world.close()
    finally:
        dist.destroy_process_group()
