"""The trainer: one function, top to bottom. The same command continues a run, bit-exactly."""

import dataclasses
import functools
import os
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from semantica.attention import set_attention
from semantica.device import pick_device, pick_precision
from semantica.diffusion import noise_levels
from semantica.kernels import implementations
from semantica.pipeline import SemanticaPipeline
from semantica.profile import count_parameters, step_flops
from semantica.train import checkpoint
from semantica.train.build import build
from semantica.train.config import TrainConfig
from semantica.train.data import Pairs, batches, collate, open_data
from semantica.train.heldout import held_out_batches
from semantica.train.objective import Objective, PairHead, compile_blocks, held_out_loss
from semantica.train.run import SAMPLE_CONDITIONS, Measure, Run
from semantica.train.state import TrainState


def train(config: TrainConfig) -> Path:
    """Train or continue a run; returns the run folder.

    Raises:
        UserError: impossible options or data, or a run folder of another configuration.
        FloatingPointError: the loss or a gradient is no longer finite; checkpoints are intact.
    """
    config.check()
    device = pick_device(config.device)
    data = open_data(config.data, config.mode, config.low, config.high)
    config = dataclasses.replace(config, mode=data.mode)
    held = open_data(config.val, config.mode, config.low, config.high) if config.val else None
    bad = [*data.bad, *(held.bad if held else ())]
    if held is None and config.held_out:
        data, held = data.split(config.held_out, config.seed)
    unet, encoder, scheduler = build(config, device)
    dtype = pick_precision(config.precision, device)
    backend, reason = set_attention(torch.nn.ModuleList([unet, encoder]), config.attention, device, dtype)

    run = Run(config, data)
    for path, why in bad:
        run.bad_sample(path, why)
    run.say(f"device {device}, {str(dtype).removeprefix('torch.')}; attention: {backend} ({reason})")
    for name, devices in implementations().items():
        implementation, why = devices[device.type]
        run.say(f"operator {name}: {implementation} ({why})")
    run.say(f"{data.describe()}; held out: {held.describe() if held else 'nothing'}; {len(bad)} bad")
    run.say(
        f"denoiser {count_parameters(unet) / 1e6:.1f} M parameters, encoder {count_parameters(encoder) / 1e6:.1f} M"
    )

    head = PairHead(encoder.token_dim).to(device) if config.align else None
    state = TrainState(config, {"unet": unet, "encoder": encoder} | ({"head": head} if head else {}))
    found = checkpoint.load_newest(run.out / "checkpoints", state.files, device, run.say)
    if found:
        state.load(found[0]["step"], found[1])
        run.say(f"continuing from step {state.step}")
    run.rewind(state.step)
    objective = Objective(unet, encoder, config.loss, config.scales, head).train()
    if config.compile:
        compile_blocks(objective)
    averaged = Objective(state.ema["unet"], state.ema.get("encoder", encoder), config.loss, config.scales).eval()
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext
    flops = step_flops(unet, encoder, encodings=config.conditions + bool(head), conditions=config.conditions)
    measure = Measure(config, device, dtype, flops)
    fixed = []
    if held:
        sizes = encoder.image_size, unet.config.image_size
        fixed = held_out_batches(held, config.seed, *sizes, device, config.conditions)

    part = config.batch // config.accumulate
    pairs = Pairs(
        data, seed=config.seed, image_size=unet.config.image_size, condition_size=encoder.image_size,
        conditions=config.conditions, global_batch=config.batch, drop=config.drop, flip=config.flip, crop=config.crop,
    )  # fmt: skip
    workers = config.workers if config.workers is not None else max(1, min(8, (os.cpu_count() or 2) // 2))
    feed = batches(pairs, first_index=state.step * config.batch, batch=part, workers=workers, device=device)
    looks = dict(total=config.steps, initial=state.step, desc="train", unit="step", mininterval=1.0, smoothing=0.05)
    with closing(feed), tqdm(**looks) as bar:
        measure.start()
        while state.step < config.steps:
            # dropout in the network: a pure function of the step, as all other randomness
            torch.manual_seed((config.seed << 32) + state.step)
            total = torch.zeros((), device=device)
            for _ in range(config.accumulate):
                batch = measure.waiting(feed)
                for path, why in batch["bad"]:
                    run.bad_sample(path, why)
                logsnr = noise_levels(batch["u"], scheduler.schedule).to(device)
                with autocast():
                    losses = objective(batch["condition"], batch["target"], batch["noise"], logsnr, batch["drop"])
                denoising, pairing = (a if a is None else a.mean() / config.accumulate for a in losses)
                (denoising if pairing is None else denoising + config.align * pairing).backward()
                total += denoising.detach()
            norm = state.update()
            measure.step(total, norm)
            bar.update()
            step, last = state.step, state.step == config.steps
            if step % config.log_every == 0 or last:
                row = measure.row(step, state.optimizer.param_groups[0]["lr"])
                run.log(row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", images_s=f"{row['images_per_s']:.0f}")
            if fixed and (step % config.eval_every == 0 or last):
                losses = held_out_loss(averaged, fixed, scheduler.schedule, autocast)
                run.log({"step": step, "held_out_loss": losses["right"], "held_out_loss_shuffled": losses["shuffled"]})
            if step % config.save_every == 0 or last:
                measure.check()
                checkpoint.save(run.out / "checkpoints", step, state.tensors(), {"seed": config.seed}, config.keep)
            if step % config.sample_every == 0:
                pipeline = SemanticaPipeline(averaged.unet, averaged.encoder, scheduler)
                shown = fixed[0] if fixed else collate([pairs[i] for i in range(SAMPLE_CONDITIONS)])
                # in the precision of the training: the attention backend may know no other
                with autocast():
                    run.sample(pipeline, shown, step)
            measure.start()
    run.publish(SemanticaPipeline(averaged.unet, averaged.encoder, scheduler))
    run.say(f"done: {run.out} after {state.step} steps")
    return run.out
