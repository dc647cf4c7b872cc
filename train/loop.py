"""The trainer: one function, top to bottom. The same command continues a run, bit-exactly."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from semantica.device import pick_device, pick_precision
from semantica.diffusion import noise_levels
from semantica.errors import UserError
from semantica.kernels import implementations
from semantica.memory import keep_freed_memory
from semantica.model.attention import set_attention
from semantica.model.cost import count_parameters, step_flops
from semantica.pipelines.variations import SemanticaPipeline
from semantica.train.build import alignment, build
from semantica.train.config import TrainConfig
from semantica.train.data.heldout import examples, held_out_batches
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Pairs, batches
from semantica.train.objective import Objective, PairHead, compile_in_place, held_out_loss
from semantica.train.processes import LostProcess, Ranks, Word, facts, first_line, local_device, lost, start
from semantica.train.run import checkpoint
from semantica.train.run.folder import SAMPLE_CONDITIONS, Measure, Run
from semantica.train.state import TrainState


def never() -> bool:
    return False


def train(config: TrainConfig, stop: Callable[[], bool] = never) -> Path:
    """Train or continue a run; returns the run folder.

    In processes that torchrun started, all of them call this with the same configuration.

    Args:
        stop: asked in each step; once it says True (on any process), the run is saved and left after that step, without
            publishing.

    Raises:
        UserError: impossible options or data, or a run folder of another configuration. Of several processes the first
            raises it, the others `SystemExit` with code 2.
        FloatingPointError: the loss or a gradient is no longer finite; checkpoints are intact.
        LostProcess: another process of the run ended or hangs.
    """
    ranks = start(config)
    try:
        out = run_together(config, ranks, stop)
    except (UserError, FloatingPointError, SystemExit) as error:
        # all processes agreed on it: none is within an exchange
        ranks.close()
        if isinstance(error, FloatingPointError) and not ranks.lead:
            raise SystemExit(1) from error
        raise
    except (RuntimeError, checkpoint.CheckpointException) as error:
        if ranks.world == 1 or not lost(error):
            raise
        if not ranks.lead:
            raise SystemExit(1) from error
        raise LostProcess(
            f"another of the {ranks.world} processes ended, or did not answer within {config.timeout:g} s "
            f"({first_line(error)}): the same command continues from the newest complete checkpoint"
        ) from error
    ranks.close()
    return out


def run_together(config: TrainConfig, ranks: Ranks, stop: Callable[[], bool]) -> Path:
    """`train` in a process that has joined the others."""
    ranks.settle(lambda: config.check(ranks.world))
    ranks.same(facts(config, ranks))
    device = ranks.settle(lambda: pick_device(local_device(config.device, ranks)))
    if device.type == "cpu":
        keep_freed_memory()
    data = ranks.settle(lambda: open_data(config.data, config.mode, config.low, config.high, config.tokens))
    config = dataclasses.replace(config, mode=data.mode)
    held = ranks.settle(lambda: open_data(config.val, config.mode, config.low, config.high) if config.val else None)
    bad = [*data.bad, *(held.bad if held else ())]
    if held is None and config.held_out:
        data, held = ranks.settle(lambda: data.split(config.held_out, config.seed))
    ranks.same({"the pictures in --data": data.digest(), "those held out": held and held.digest()})
    # to be split, a model is made on the host: no device has to hold it whole
    unet, encoder, scheduler = ranks.settle(lambda: build(config, torch.device("cpu") if ranks.splits else device))
    repa, teacher = ranks.settle(lambda: alignment(config, unet, encoder, device))
    dtype = pick_precision(config.precision, device)
    backend, reason = ranks.settle(
        lambda: set_attention(torch.nn.ModuleList([unet, encoder]), config.attention, device, dtype)
    )

    run = Run(config, data, ranks)
    for path, why in bad if ranks.lead else ():
        run.bad_sample(path, why)
    run.say(f"device {device}, {str(dtype).removeprefix('torch.')}; attention: {backend} ({reason})")
    if ranks.mode:
        run.say(f"{ranks.world} processes, {ranks.mode}")
    for name, devices in implementations().items():
        implementation, why = devices[device.type]
        run.say(f"operator {name}: {implementation} ({why})")
    run.say(f"{data.describe()}; held out: {held.describe() if held else 'nothing'}; {len(bad)} bad")
    run.say(
        f"denoiser {count_parameters(unet) / 1e6:.1f} M parameters, encoder {count_parameters(encoder) / 1e6:.1f} M"
    )

    head = PairHead(encoder.token_dim, across=ranks.world > 1).to(device) if config.align else None
    heads = {name: module for name, module in (("head", head), ("repa", repa)) if module is not None}
    encodings = 0 if config.tokens else config.conditions + bool(head) + (teacher is encoder)
    flops = step_flops(unet, encoder, encodings=encodings, conditions=config.conditions)
    if not encoder.trainable and not config.tokens:
        # frozen, it stays whole: it has neither gradients nor moments, and to gather it would cost every step
        encoder.to(device)
    modules = {"unet": unet, "encoder": encoder} | heads
    kinds = {name: type(module) for name, module in modules.items()}
    state = TrainState(config, modules, ranks.shard(dtype, device))
    objective = Objective(unet, encoder, config.loss, config.scales, head, repa, teacher).train()
    if config.compile:
        compile_in_place(objective, config.compile_scope)
    if config.checkpointing:
        for module in (unet, encoder) if encoder.trainable else (unet,):
            module.enable_gradient_checkpointing()
    saver = checkpoint.Saver(run.out / "checkpoints", ranks, config.keep, device)
    ranks.ask_lead(lambda: checkpoint.tidy(saver.root))
    found = checkpoint.load_newest(saver.root, ranks, run.say)
    if found:
        record, reader = found
        checkpoint.load(reader, state.prepare(reader.metadata.state_dict_metadata.keys()), ranks.saving)
        state.step = record["step"]
        run.say(f"continuing from step {state.step}")
    run.rewind(state.step)
    averaged = Objective(state.ema["unet"], state.ema.get("encoder", encoder), config.loss, config.scales).eval()
    call = ranks.wrap(objective, device)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext
    measure = Measure(config, device, dtype, flops, ranks)
    fixed = []
    if held:
        sizes = encoder.image_size, unet.config.image_size
        once = encoder if config.tokens else None
        fixed = ranks.settle(lambda: held_out_batches(held, config.seed, *sizes, device, config.conditions, once))

    pairs = Pairs(
        data, seed=config.seed, image_size=unet.config.image_size, condition_size=encoder.image_size,
        conditions=config.conditions, global_batch=config.batch, drop=config.drop, flip=config.flip,
        crop=None if config.crop == "centre" else config.crop, target_tokens=config.repa_from_store,
    )  # fmt: skip
    share = (os.cpu_count() or 2) // 2 // ranks.local_world
    feed = Feed(
        batches(
            pairs, first_index=state.step * config.batch, batch=config.batch // config.accumulate, device=device,
            workers=config.workers if config.workers is not None else max(1, min(8, share)),
            part=(ranks.rank, ranks.world),
        ),
        ranks,
    )  # fmt: skip
    looks = dict(total=config.steps, initial=state.step, desc="train", unit="step", mininterval=1.0, smoothing=0.05)
    with closing(saver), closing(feed), tqdm(**looks, disable=not ranks.lead) as bar:
        measure.start()
        while state.step < config.steps:
            # dropout in the network: a pure function of the step and of the process
            torch.manual_seed(((config.seed << 32) + state.step) ^ (ranks.rank << 48))
            total, aligned = torch.zeros((), device=device), torch.zeros((), device=device)
            for part in range(config.accumulate):
                final = part == config.accumulate - 1
                batch = measure.waiting(feed)
                for path, why in batch["bad"]:
                    run.bad_sample(path, why)
                if final:
                    word = Word.SAVE_FAILED if saver.failed else Word.STOP if stop() else Word.GO
                    ranks.say_word(max(word, feed.word))
                logsnr = noise_levels(batch["u"], scheduler.schedule).to(device)
                images = [ranks.place(batch[name]) for name in ("condition", "target", "noise")]
                with ranks.reducing(call, final):
                    with autocast():
                        losses = call(*images, logsnr, batch["drop"], batch.get("target_tokens"))
                    denoising, *others = (a if a is None else a.mean() / config.accumulate for a in losses)
                    weighted = zip((config.align, config.repa), others, strict=True)
                    sum((weight * loss for weight, loss in weighted if loss is not None), denoising).backward()
                total += denoising.detach()
                aligned += 0.0 if others[1] is None else others[1].detach()
            word = ranks.hear_word()
            if word == Word.BROKEN:
                ranks.settle(feed.fail)
            if word == Word.SAVE_FAILED:
                ranks.settle(saver.wait)
            norm = state.update()
            measure.step(total, norm, aligned if config.repa else None)
            bar.update()
            step, last = state.step, state.step == config.steps
            if step % config.log_every == 0 or last:
                row = measure.row(step, state.optimizer.param_groups[0]["lr"])
                run.log(row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", images_s=f"{row['images_per_s']:.0f}")
            if fixed and (step % config.eval_every == 0 or last):
                losses = held_out_loss(averaged, fixed, scheduler.schedule, autocast)
                run.log({"step": step, "held_out_loss": losses["right"], "held_out_loss_shuffled": losses["shuffled"]})
            if step % config.save_every == 0 or last or word == Word.STOP:
                measure.check()
                # what went wrong with the save before, one says
                ranks.settle(saver.wait)
                saver.save(step, state.tensors(), {"seed": config.seed})
            if word == Word.STOP and not last:
                break
            if step % config.sample_every == 0:
                pipeline = SemanticaPipeline(averaged.unet, averaged.encoder, scheduler)
                shown = fixed[0] if fixed else ranks.settle(lambda: examples(pairs, SAMPLE_CONDITIONS))
                # in the precision of the training: the attention backend may know no other
                with autocast():
                    run.sample(pipeline, shown, step)
            measure.start()
    ranks.settle(saver.wait)
    if state.step < config.steps:
        run.say(f"stopped: {run.out} is saved at step {state.step} of {config.steps}; the same command continues it")
        return run.out
    whole = ranks.whole(averaged.unet, kinds["unet"]), ranks.whole(averaged.encoder, kinds["encoder"])
    run.publish(functools.partial(SemanticaPipeline, *whole, scheduler))
    run.say(f"done: {run.out} after {state.step} steps")
    return run.out


class Feed:
    """Batches for a step that all processes must end together, also where the data of one of them fails.

    Raises:
        UserError: in `fail`, or for the first batch, on all processes.
    """

    def __init__(self, batches: Iterator[dict], ranks: Ranks):
        self.batches, self.word = batches, Word.GO
        self.batch, self.held = ranks.settle(functools.partial(next, batches)), True
        self.error: UserError | None = None

    def __next__(self) -> dict:
        if self.held or self.error:
            # once broken, the last batch again: its gradients are never used
            self.held = False
            return self.batch
        try:
            self.batch = next(self.batches)
        except UserError as error:
            self.error, self.word = error, Word.BROKEN
        return self.batch

    def fail(self) -> None:
        if self.error:
            raise self.error

    def close(self) -> None:
        self.batches.close()
