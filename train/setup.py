"""What a run is made of, from its configuration: `prepare`, in small steps that return what they made."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from semantica.device import pick_device, pick_precision
from semantica.errors import UserError
from semantica.kernels import implementations
from semantica.model.attention import set_attention
from semantica.model.compile import compile_in_place
from semantica.model.cost import count_parameters, step_flops
from semantica.model.float8 import check_float8, to_float8
from semantica.model.recompute import keeping_products
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.train.build import alignment, begin_with, build
from semantica.train.config import TrainConfig
from semantica.train.data.heldout import held_out_batches
from semantica.train.data.loading import batches
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Pairs
from semantica.train.data.source import Source
from semantica.train.data.workers import BEST_MFU, choose
from semantica.train.heads import PairHead
from semantica.train.objective import Objective
from semantica.train.processes import Vote, World, identity, local_device
from semantica.train.run import checkpoint
from semantica.train.run.folder import Run
from semantica.train.run.measure import Measure
from semantica.train.sharding import Whole, parallelize
from semantica.train.state import TrainState


class Feed:
    """Batches for steps that all processes must end together, also where the data of one of them fails.

    Raises:
        UserError: in `check`, or for the first batch, on all processes.
    """

    def __init__(self, batches: Iterator[dict], world: World):
        self.batches, self.error = batches, None
        with world.consensus():
            self.batch = next(batches)
        self.fresh = True

    def __next__(self) -> dict:
        if self.fresh or self.error:
            # after an error the last batch again: its gradients are never used
            self.fresh = False
            return self.batch
        try:
            self.batch = next(self.batches)
        except UserError as error:
            self.error = error
        return self.batch

    @property
    def vote(self) -> Vote:
        return Vote.DATA_FAILED if self.error else Vote.CONTINUE

    def check(self) -> None:
        """Raises what went wrong."""
        if self.error:
            raise self.error

    def close(self) -> None:
        self.batches.close()


@dataclass(frozen=True)
class Training:
    """A run that is ready for its next step.

    objective: as training calls it, wrapped for several processes. averaged: the same of the averaged weights.
    held: batches for held-out figures; empty where nothing is held out.
    """

    config: TrainConfig
    world: World
    parallel: Whole
    device: torch.device
    autocast: Callable
    scheduler: SemanticaScheduler
    state: TrainState
    objective: nn.Module
    averaged: Objective
    pairs: Pairs
    feed: Feed
    held: list[dict]
    run: Run
    saver: checkpoint.Saver
    measure: Measure


def prepare(config: TrainConfig, world: World) -> Training:
    """A new run, or one that continues from its newest whole checkpoint. Raises as `semantica.train.loop.train`."""
    with world.consensus():
        config.check(world.size)
    world.require_same(identity(config, world))
    with world.consensus():
        device = run_device(config, world)
        if config.graph and device.type != "cuda":
            raise UserError(f"--graph records what a GPU does, and the device is {device}: leave it out")
        if config.float8:
            check_float8(device)
        data, held, bad = open_sets(config)
    config = dataclasses.replace(config, mode=data.mode)
    world.require_same({"the pictures in --data": data.digest(), "those held out": held and held.digest()})

    dtype = pick_precision(config.precision, device)
    parallel = parallelize(world, device, dtype)
    with world.consensus():
        unet, encoder, scheduler = build(config, parallel.built_on, parallel.building)
        # where the run continues, its own weights replace these anyway
        begins = config.init and not checkpoint.folders(config.out / "checkpoints")
        if begins and not unet.conv_in.weight.is_meta:
            begin_with(config.init, unet, encoder)
        repa, teacher = alignment(config, unet, encoder, device)
        networks = nn.ModuleList([unet, encoder])
        attention = set_attention(
            networks, config.attention, device, dtype, compiled=config.compile, deterministic=config.deterministic
        )
    run = Run(config, data.digest(), world)
    run.bad_samples(bad if world.is_main else ())
    run.say(f"device {device}, {str(dtype).removeprefix('torch.')}; attention: {attention[0]} ({attention[1]})")
    run.say(*described(world, device))
    run.say(f"{data.describe()}; held out: {held.describe() if held else 'nothing'}; {len(bad)} bad")
    run.say(f"denoiser {millions(unet)} parameters, encoder {millions(encoder)}")

    head = PairHead(encoder.token_dim, across=world.size > 1).to(device) if config.align else None
    encodings = 0 if config.tokens else config.conditions + (head is not None) + (teacher is encoder)
    flops = step_flops(unet, encoder, encodings=encodings, conditions=config.conditions)
    if not encoder.trainable and not config.tokens:
        # frozen, it stays whole: it has neither gradients nor moments, and to gather it would cost every step
        encoder.to(device)
    modules = {"unet": unet, "encoder": encoder, "head": head, "repa": repa}
    modules = {name: module for name, module in modules.items() if module is not None}
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    state = TrainState(config, modules, scaler, parallel.copies)
    objective = compiled(config, Objective(unet, encoder, config.loss, config.scales, head, repa, teacher).train())
    saver = checkpoint.Saver(run.out / "checkpoints", world, config.keep, device)
    resume(state, saver.root, world, run.say)
    run.rewind(state.step)

    sizes = {"image_size": unet.config.image_size, "condition_size": encoder.image_size}
    fixed = []
    if held:
        once = encoder if config.tokens else None
        with world.consensus():
            fixed = held_out_batches(
                held, config.seed, **sizes, device=device, conditions=config.conditions, encoder=once
            )
    pairs = Pairs(
        data, seed=config.seed, **sizes, conditions=config.conditions, global_batch=config.batch, drop=config.drop,
        flip=config.flip, crop=None if config.crop == "centre" else config.crop, target_tokens=config.repa_from_store,
    )  # fmt: skip
    measure = Measure(config, device, dtype, flops, world)
    if measure.peak is None:
        run.say(f"no MFU: {measure.peak_source}")
    return Training(
        config=config,
        world=world,
        parallel=parallel,
        device=device,
        autocast=functools.partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext,
        scheduler=scheduler,
        state=state,
        objective=parallel.wrap(objective),
        averaged=Objective(state.ema["unet"], state.ema.get("encoder", encoder), config.loss, config.scales).eval(),
        pairs=pairs,
        feed=Feed(loaded(config, pairs, state.step, device, world, measure, run.say), world),
        held=fixed,
        run=run,
        saver=saver,
        measure=measure,
    )


def run_device(config: TrainConfig, world: World) -> torch.device:
    """This process' device. A GPU is the current one from now on: kernels are launched there, wherever tensors are."""
    device = pick_device(local_device(config.device, world))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def open_sets(config: TrainConfig) -> tuple[Source, Source | None, list[tuple[str, str]]]:
    """Sources to train on and, or None, of held-out figures; (name, reason) of what is bad in them."""
    data = open_data(config.data, config.mode, config.low, config.high, config.tokens)
    if config.val:
        held = open_data(config.val, data.mode, config.low, config.high)
        return data, held, [*data.bad, *held.bad]
    bad = [*data.bad]
    return (*(data.split(config.held_out, config.seed) if config.held_out else (data, None)), bad)


def described(world: World, device: torch.device) -> list[str]:
    """How several processes share the work, and which implementation each operator uses and why."""
    lines = [f"{world.size} processes, {world.mode}"] if world.mode else []
    for name, devices in implementations().items():
        implementation, why = devices[device.type]
        lines.append(f"operator {name}: {implementation} ({why})")
    return lines


def millions(module: nn.Module) -> str:
    return f"{count_parameters(module) / 1e6:.1f} M"


def compiled(config: TrainConfig, objective: Objective) -> Objective:
    """The objective, its blocks in float8, compiled and checkpointed in place where that was asked for."""
    if config.float8:
        # after the averages were copied: those are evaluated and published as they are
        to_float8(objective.unet)
    if config.compile:
        compile_in_place(objective, config.compile_scope)
    trained = (objective.unet, objective.encoder) if objective.encoder.trainable else (objective.unet,)
    for module in trained if config.checkpointing else ():
        module.enable_gradient_checkpointing(keeping_products if config.checkpointing_keeps == "products" else None)
    return objective


def resume(state: TrainState, root: Path, world: World, say: Callable[[str], None]) -> None:
    """Fill a state from the newest whole checkpoint, if there is one."""
    world.from_main(lambda: checkpoint.tidy(root))
    found = checkpoint.load_newest(root, world, say)
    if found:
        record, reader = found
        tensors = state.prepare(reader.metadata.state_dict_metadata.keys())
        checkpoint.load(reader, tensors, world.saving)
        state.resumed(record["step"], tensors)
        say(f"continuing from step {state.step}")


def loaded(
    config: TrainConfig, pairs: Pairs, step: int, device: torch.device, world: World, measure: Measure, say: Callable
) -> Iterator[dict]:
    """This process' parts of the batches from a step on."""
    batch, first = config.batch // config.accumulate, step * config.batch
    demand = None if measure.peak is None else BEST_MFU * measure.peak / world.size / max(1, measure.flops)
    workers, why = choose(pairs, first, batch // world.size, config.workers, demand, world.local_size, device.type)
    say(why)
    return batches(pairs, first_index=first, batch=batch, device=device, workers=workers, part=(world.rank, world.size))
