"""The trainer: one function, top to bottom. The same command continues a run: bit-exactly on a CPU, and on a GPU with
`--deterministic`."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from semantica.device import sent
from semantica.diffusion import noise_levels
from semantica.errors import UserError, first_line
from semantica.inputs import Prepared
from semantica.pipelines.networks import NetworkPipeline
from semantica.train.adapters import merged
from semantica.train.config import TrainConfig
from semantica.train.data.heldout import contrasted, examples
from semantica.train.graph import StepGraph
from semantica.train.objective import held_out_loss
from semantica.train.preemption import Stop
from semantica.train.processes import LostProcess, Vote, World, joined
from semantica.train.repeatable import repeatable
from semantica.train.run.folder import SAMPLE_CONDITIONS
from semantica.train.setup import Training, prepare, with_pictures
from semantica.train.sharding import gathered
from semantica.train.state import TrainState

NEVER = Stop()


def train(config: TrainConfig, stop: Stop = NEVER) -> Path:
    """Train or continue a run; returns the run folder.

    In processes that torchrun started, all of them call this with the same configuration.

    Args:
        stop: asked in each step; once it says True (on any process), the run is saved and left after that step, without
            publishing.

    Raises:
        UserError: impossible options or data, a run folder of another configuration, or one that another training
            writes into. Of several processes the first raises it, the others `SystemExit` with code 2.
        FloatingPointError: the loss or a gradient is no longer finite; checkpoints are intact.
        LostProcess: another process of the run ended or hangs, or the GPU failed.
    """
    with repeatable(config.deterministic, config.compile), joined(config) as world, device_faults(world):
        with ExitStack() as opened:
            training = prepare(config, world, opened)
            run_steps(training, stop)
            finish(training)
    return config.out


@contextmanager
def device_faults(world: World) -> Iterator[None]:
    """A GPU or machine that is full, a GPU that is gone, or a loading process that was killed, in one line. Of several
    processes the one that met it ends with a traceback: the others are within an exchange, and miss it."""
    try:
        yield
    except RuntimeError as error:
        said, again = first_line(error), "the same command continues from the newest checkpoint"
        full = {"GPU": isinstance(error, torch.OutOfMemoryError), "machine": "can't allocate memory" in said}
        for whose in (name for name, is_full in full.items() if is_full and world.size == 1):
            advice = "give more --accumulate, --checkpointing or a smaller --batch"
            raise UserError(f"the {whose}'s memory is full ({said}): {advice}") from error
        if world.size == 1 and isinstance(error, torch.AcceleratorError):
            raise LostProcess(f"the GPU failed ({said}): {again}") from error
        # torch raises it from a signal's handler, wherever the step is
        if world.size == 1 and said.startswith("DataLoader worker"):
            raise LostProcess(f"{said}: {again}; where memory was short, with fewer --workers") from error
        raise


def run_steps(t: Training, stop: Stop) -> None:
    """Train until the last step, or until all processes agreed to stop."""
    config, state, world = t.config, t.state, t.world
    intervals = (config.log_every, config.eval_every, config.save_every, config.sample_every)
    gradients = functools.partial(backward, t)
    if config.graph:
        gradients = StepGraph(gradients, state.parameters.values(), t.device)
    looks = dict(total=config.steps, initial=state.step, desc="train", unit="step", mininterval=1.0, smoothing=0.05)
    with closing(t.saver), closing(t.feed), tqdm(**looks, disable=not world.is_main) as bar:
        t.measure.start()
        while state.step < config.steps:
            # dropout in the network: a pure function of the step and of the process
            torch.manual_seed(((config.seed << 32) + state.step) ^ (world.rank << 48))
            loss, aligned = torch.zeros((), device=t.device), torch.zeros((), device=t.device)
            for part in range(config.accumulate):
                final = part == config.accumulate - 1
                batch = t.measure.waiting(t.feed)
                t.run.bad_samples(batch["bad"])
                if final:
                    election = world.vote(max(t.saver.vote, t.feed.vote, Vote.STOP if stop() else Vote.CONTINUE))
                with t.parallel.micro_batch(t.objective, final):
                    losses = gradients(*inputs(t, batch))
                loss += losses[0]
                aligned += losses[1]
            outcome = election()
            raise_failure(t, outcome)
            if outcome == Vote.STOP:
                stop.agreed()
            norm = state.update()
            t.measure.step(loss, norm, aligned if config.repa else None)
            bar.update()

            step, last = state.step, state.step == config.steps
            logs, evaluates, saves, samples = (step % every == 0 for every in intervals)
            logs, evaluates = logs or last, bool(t.held) and (evaluates or last)
            saves = saves or last or outcome == Vote.STOP
            if pause := logs or evaluates or saves or samples:
                t.measure.stop()
            if logs:
                row = t.measure.row(step, state.optimizer.param_groups[0]["lr"])
                t.run.log(row | scale(state))
                bar.set_postfix(loss=f"{row['loss']:.4f}", images_s=f"{row['images_per_s']:.0f}")
            if evaluates:
                held = held_out_loss(t.averaged, t.held, t.scheduler.schedule, t.autocast, at_once(t))
                shuffled = {"held_out_loss_shuffled": held["shuffled"]} if contrasted(t.held) else {}
                t.run.log({"step": step, "held_out_loss": held["right"], **shuffled})
            if saves:
                t.measure.check()
                # a run that goes on from here does not see these samples again
                t.run.note_bad()
                # what went wrong with the save before, one says
                with world.consensus():
                    t.saver.wait()
                t.saver.save(step, state.tensors(), {"seed": config.seed})
            if outcome == Vote.STOP and not last:
                break
            if samples:
                sample(t)
            if pause:
                t.measure.start()


def scale(state: TrainState) -> dict[str, float]:
    """The scale of the loss, for the log; nothing without one.

    Raises:
        FloatingPointError: it fell so low that what overflows is not its doing.
    """
    if state.scaler is None:
        return {}
    found = state.scaler.get_scale()
    if found < 1:
        raise FloatingPointError("gradients overflow in fp16 with any scale: give --precision fp32, or a lower --lr")
    return {"loss_scale": found}


def inputs(t: Training, batch: dict) -> tuple[Prepared | Tensor | None, ...]:
    """What the objective takes of a part of a batch, on the device."""
    logsnr = sent(noise_levels(batch["u"], t.scheduler.schedule), t.device)
    images = [t.parallel.place(batch[name]) for name in ("condition", "target", "noise")]
    return *images, logsnr, batch["drop"], batch.get("target_tokens")


def backward(t: Training, *inputs: Prepared | Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of one part of a batch are added up; its shares of the denoising loss and of REPA's, 0 without."""
    with t.autocast():
        losses = t.objective(*inputs)
    denoising, pairing, alignment = (None if each is None else each.mean() / t.config.accumulate for each in losses)
    total = denoising
    for weight, other in ((t.config.align, pairing), (t.config.repa, alignment)):
        if other is not None:
            total = total + weight * other
    (total if t.state.scaler is None else t.state.scaler.scale(total)).backward()
    return denoising.detach(), torch.zeros_like(denoising) if alignment is None else alignment.detach()


def raise_failure(t: Training, outcome: Vote) -> None:
    """End the run on all processes where one of them cannot go on."""
    if outcome == Vote.DATA_FAILED:
        with t.world.consensus():
            t.feed.check()
    if outcome == Vote.SAVE_FAILED:
        with t.world.consensus():
            t.saver.wait()


def at_once(t: Training) -> int | None:
    """Samples that figures and grids are made of at a time. A GPU is known to have room for those of a step, and a run
    that was fitted to it must not end at its first figure."""
    config = t.config
    return config.batch // config.accumulate // t.world.size if t.device.type == "cuda" else None


def sample(t: Training) -> None:
    """A grid of variations by the averaged weights, of what is held out if anything is."""
    shown = t.held[0] if t.held else None
    if shown is None:
        with t.world.consensus():
            shown = examples(t.pairs, SAMPLE_CONDITIONS)
    # in the precision of the training: the attention backend may know no other
    with t.autocast():
        pipeline = NetworkPipeline(t.averaged.unet, t.averaged.encoder, t.scheduler)
        t.run.sample(pipeline, shown, t.state.step, at_once(t))


def finish(t: Training) -> None:
    """Wait for the last checkpoint, and publish the averaged weights as a pipeline once all steps are done."""
    out, step = t.run.out, t.state.step
    with t.world.consensus():
        t.saver.wait()
    if step < t.config.steps:
        t.run.say(f"stopped: {out} is saved at step {step} of {t.config.steps}; the same command continues it")
        return
    for decay, modules in t.state.averages.items():
        # a frozen encoder has no average
        pictures = modules.get("encoder") and gathered(modules["encoder"], t.world)
        place = None if modules is t.state.ema else f"ema-{decay}"
        unet, encoder = merged(gathered(modules["unet"], t.world)), with_pictures(t.averaged.encoder, pictures)
        t.run.publish(unet, encoder, t.scheduler, place)
    t.run.say(f"done: {out} after {step} steps")
