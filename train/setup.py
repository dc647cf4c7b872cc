"""What a run is made of, from its configuration: `prepare`, in small steps that return what they made."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from semantica.device import pick_device, pick_precision
from semantica.errors import UserError
from semantica.inputs import SINGLE, is_text
from semantica.kernels import implementations
from semantica.model.attention import set_attention
from semantica.model.compile import compile_in_place
from semantica.model.conditioner import Conditioner, encoders_of
from semantica.model.cost import count_parameters, encoding_cost, step_flops
from semantica.model.encoders import weights_sha256
from semantica.model.float8 import check_float8, to_float8
from semantica.model.image_encoder import preparation_of, sight_of
from semantica.model.recompute import keeping_products
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.train.build import adapted, alignment, begin_with, build
from semantica.train.config import TrainConfig
from semantica.train.data.folders import RECONSTRUCT
from semantica.train.data.heldout import contrasted, held_out_batches
from semantica.train.data.loading import batches, require_room, worker_bytes
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Drops, Pairs
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
from semantica.words import WordTokenizer, listed


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


def prepare(config: TrainConfig, world: World, opened: ExitStack) -> Training:
    """A new run, or one that continues from its newest whole checkpoint. Raises as `semantica.train.loop.train`.

    opened: closes the run, which holds its folder, also where preparing fails.
    """
    with world.consensus():
        config.check(world.size)
    world.require_same(identity(config, world))
    with world.consensus():
        device = run_device(config, world)
        if config.graph and device.type != "cuda":
            raise UserError(f"--graph records what a GPU does, and the device is {device}: leave it out")
        if config.float8:
            check_float8(device)
        data, held, bad, alone = open_sets(config)
    config = dataclasses.replace(config, mode=data.mode)
    world.require_same({"the pictures in --data": data.digest(), "those held out": held and held.digest()})

    dtype = pick_precision(config.precision, device)
    # "auto" is each machine's own: sums of another type, or in a group that some never join, would not end the run
    arithmetic = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    world.require_same({"the arithmetic of a step": arithmetic}, "give all the same --precision and --device")
    parallel = parallelize(world, device, dtype)
    lines: list[str] = []
    # as the first process sees them: its weights replace those that a run begins with
    goes_on = world.from_main(lambda: bool(checkpoint.folders(config.out / "checkpoints")))
    with world.consensus():
        unet, encoder, scheduler = build(config, parallel.built_on, parallel.building, data.captions or ())
        # of the encoders only that of pictures may be trained along, or stay where it is
        pictures = encoders_of(encoder).get(SINGLE)
        if config.init and not goes_on and not unet.conv_in.weight.is_meta:
            new = begin_with(config.init, unet, encoder)
            added = f", and begins with nothing of {', '.join(new)}" if new else ""
            lines.append(f"begins with the weights of {config.init}{added}")
        if config.lora:
            adapted(config, unet)
        repa, teacher = alignment(config, unet, encoder, device)
        known = frozen(config, encoder, teacher)
        weights = {name: "+".join(map(weights_sha256, these)) for name, these in known.items()}
        seen = {name: preparation_of(one.config) for name, (one, *_) in known.items() if hasattr(one, "image_size")}
        networks = nn.ModuleList([unet, encoder])
        attention = set_attention(
            networks, config.attention, device, dtype, compiled=config.compile, deterministic=config.deterministic
        )
    world.require_same({f"the weights of --{name.replace('_', '-')}": sha for name, sha in weights.items()})
    world.require_same({f"how pictures are prepared for --{n.replace('_', '-')}": said for n, said in seen.items()})
    run = opened.enter_context(closing(Run(config, data.digest(), world, weights, seen)))
    run.bad_samples(bad if world.is_main else ())
    run.say(f"device {device}, {str(dtype).removeprefix('torch.')}; attention: {attention[0]} ({attention[1]})")
    run.say(*described(world, device), *lines)
    run.say(f"{data.describe()}; held out: {held.describe() if held else 'nothing'}; {len(bad)} bad")
    if alone:
        run.say(f"{len(alone)} groups of one picture are left out, the first is {alone[0]!r}; {RECONSTRUCT}")
    run.say(f"denoiser {millions(unet)} parameters, encoder {millions(encoder)}{trained_share(config, unet)}")
    if config.texts:
        run.say(*described_texts(encoder, data, held))

    head = PairHead(pictures.token_dim, across=world.size > 1).to(device) if config.align else None
    flops = sample_flops(config, unet, encoder, head, teacher)
    for part in encoders_of(encoder).values():
        if not part.trainable and not (config.tokens and part is pictures):
            # frozen, it stays whole: it has neither gradients nor moments, and to gather it would cost every step
            part.to(device)
    modules = {"unet": unet, "encoder": pictures, "head": head, "repa": repa}
    modules = {name: module for name, module in modules.items() if module is not None}
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    state = TrainState(config, modules, scaler, parallel.copies)
    objective = compiled(config, Objective(unet, encoder, config.loss, config.scales, head, repa, teacher).train())
    saver = checkpoint.Saver(run.out / "checkpoints", world, config.keep, device)
    resume(state, saver.root, world, run.say)
    run.rewind(state.step)

    tokenizers = {n: part.tokenizer for n, part in encoders_of(encoder).items() if is_text(n)}
    shown = {
        "image_size": unet.config.image_size, "condition_size": pictures and pictures.image_size,
        "sight": pictures and sight_of(pictures), "conditions": config.pictures, "tokenizers": tokenizers,
    }  # fmt: skip
    fixed = []
    if held:
        once = pictures if config.tokens else None
        with world.consensus():
            fixed = held_out_batches(held, config.seed, **shown, device=device, encoder=once)
        for batch in fixed:
            run.bad_samples(batch["bad"])
        if fixed and not contrasted(fixed):
            run.say("one group is held out: no held_out_loss_shuffled, which takes conditions of another")
    pairs = Pairs(
        data, seed=config.seed, **shown, global_batch=config.batch, drop=config.drop,
        flip=config.flip, crop=None if config.crop == "centre" else config.crop, target_tokens=config.repa_from_store,
        drop_each=Drops(config.drop_picture, config.drop_text, config.drop_tower),
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
        averaged=Objective(
            state.ema["unet"], with_pictures(encoder, state.ema.get("encoder")), config.loss, config.scales
        ).eval(),
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


def open_sets(config: TrainConfig) -> tuple[Source, Source | None, list[tuple[str, str]], list[str]]:
    """Sources to train on and, or None, of held-out figures; (name, reason) of what is bad in them; groups left out."""
    data = open_data(config.data, config.mode, config.low, config.high, config.tokens, config.texts)
    if config.val:
        held = open_data(config.val, data.mode, config.low, config.high, captions=config.texts)
        return data, held, [*data.bad, *held.bad], [*data.alone, *held.alone]
    left = [*data.bad], [*data.alone]
    return (*(data.split(config.held_out, config.seed) if config.held_out else (data, None)), *left)


def frozen(config: TrainConfig, encoder: nn.Module, teacher: nn.Module | None) -> dict[str, list[nn.Module]]:
    """The frozen encoders that run, by the option that names them: no checkpoint has them, and what a hub or a folder
    has under a name may change. Stored tokens know the one that made them."""
    parts = encoders_of(encoder)
    pictures = None if config.tokens else parts.get(SINGLE)
    named = {"encoder": pictures}
    if teacher is not None and teacher is not parts.get(SINGLE):
        named["repa_encoder"] = teacher
    known = {name: [part] for name, part in named.items() if part is not None and not part.trainable}
    texts = [part for name, part in parts.items() if is_text(name)]
    return known | ({"text_encoder": texts} if texts else {})


def described(world: World, device: torch.device) -> list[str]:
    """How several processes share the work, and which implementation each operator uses and why."""
    lines = [f"{world.size} processes, {world.mode}"] if world.mode else []
    for name, devices in implementations().items():
        implementation, why = devices[device.type]
        lines.append(f"operator {name}: {implementation} ({why})")
    return lines


def described_texts(encoder: Conditioner, data: Source, held: Source | None) -> list[str]:
    """What the encoders of texts know, which words of held-out texts they do not, and how many texts they cut."""
    lines = []
    for name, part in encoder.encoders.items():
        tokenizer = getattr(part, "tokenizer", None)
        if isinstance(tokenizer, WordTokenizer):
            lines.append(f"{name}: {len(tokenizer.vocabulary)} words, at most {tokenizer.length} in a text")
            unknown = tokenizer.unknown(held.captions) if held else []
            if unknown:
                lines.append(
                    f"{len(unknown)} words of held-out texts are in no training text, left out there: {listed(unknown)}"
                )
        elif tokenizer is not None:
            texts = [*data.captions, *(held.captions if held else ())]
            cut = tokenizer.cut(texts)
            shortened = f"; {cut} of {len(texts)} texts have more and are cut" if cut else ""
            lines.append(f"{name}: {type(part).__name__}, at most {tokenizer.room} tokens of a text{shortened}")
    return lines


def with_pictures(encoder: nn.Module, pictures: nn.Module | None) -> nn.Module:
    """An encoder with another one of pictures in its place, such as an average; as it is where there is none."""
    if pictures is None:
        return encoder
    return Conditioner({**encoder.encoders, SINGLE: pictures}) if isinstance(encoder, Conditioner) else pictures


def sample_flops(
    config: TrainConfig, unet: nn.Module, encoder: nn.Module, head: nn.Module | None, teacher: nn.Module | None
) -> int:
    """Operations of one sample in a training step, those of all encoders that run in it included."""
    shared = teacher is not None and teacher is encoders_of(encoder).get(SINGLE)
    encodings = 0 if config.tokens else config.pictures + (head is not None) + shared
    apart = 0 if teacher is None or shared else encoding_cost(teacher)[0]
    return step_flops(unet, encoder, encodings=encodings, conditions=config.pictures) + apart


def millions(module: nn.Module) -> str:
    return f"{count_parameters(module) / 1e6:.1f} M"


def trained_share(config: TrainConfig, unet: nn.Module) -> str:
    """With LoRAs, how much of the denoiser is trained."""
    count = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return f"; {count / 1e6:.2f} M of the denoiser's are trained" if config.lora else ""


def compiled(config: TrainConfig, objective: Objective) -> Objective:
    """The objective, its blocks in float8, compiled and checkpointed in place where that was asked for."""
    if config.float8:
        # after the averages were copied: those are evaluated and published as they are
        to_float8(objective.unet)
    if config.compile:
        compile_in_place(objective, config.compile_scope)
    trained = [objective.unet, *(part for part in encoders_of(objective.encoder).values() if part.trainable)]
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
    size = batch // world.size
    workers, why = choose(pairs, first, size, config.workers, demand, world.local_size, device.type)
    # of all processes here, before any of them takes its part: what one sees free the others are about to take
    shares = world.on_this_machine([workers, workers * worker_bytes(pairs, size)])
    with world.consensus():
        require_room(*map(sum, zip(*shares)))
    say(why)
    return batches(pairs, first_index=first, batch=batch, device=device, workers=workers, part=(world.rank, world.size))
