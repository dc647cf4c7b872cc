"""The trainer: one function, top to bottom. The same command continues a run, bit-exactly."""

import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import semantica
from semantica.attention import set_attention
from semantica.device import pick_device, pick_precision
from semantica.diffusion import noise_levels
from semantica.errors import UserError
from semantica.images import grid, save_png, to_uint8
from semantica.kernels import implementations
from semantica.pipeline import SemanticaPipeline
from semantica.profile import count_parameters, peak_flops, step_flops
from semantica.train import checkpoint
from semantica.train.build import alignment, build
from semantica.train.config import FREE, TrainConfig
from semantica.train.data import Pairs, bad_record, batches, open_data
from semantica.train.folders import PairData
from semantica.train.heldout import examples, held_out_batches
from semantica.train.objective import Objective, PairHead, compile_blocks, held_out_loss, take
from semantica.train.shards import ShardData
from semantica.train.state import TrainState

SAMPLE_CONDITIONS, SAMPLE_VARIATIONS, SAMPLE_STEPS = 6, 4, 20


def train(config: TrainConfig) -> Path:
    """Train or continue a run; returns the run folder.

    Raises:
        UserError: impossible options or data, or a run folder of another configuration.
        FloatingPointError: the loss or a gradient is no longer finite; checkpoints are intact.
    """
    config.check()
    device = pick_device(config.device)
    data = open_data(config.data, config.mode, config.low, config.high, config.tokens)
    config = dataclasses.replace(config, mode=data.mode)
    held = open_data(config.val, config.mode, config.low, config.high) if config.val else None
    bad = [*data.bad, *(held.bad if held else ())]
    if held is None and config.held_out:
        data, held = data.split(config.held_out, config.seed)
    unet, encoder, scheduler = build(config, device)
    repa, teacher = alignment(config, unet, encoder, device)
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
    heads = {name: module for name, module in (("head", head), ("repa", repa)) if module is not None}
    state = TrainState(config, {"unet": unet, "encoder": encoder} | heads)
    found = checkpoint.load_newest(run.out / "checkpoints", state.files, device, run.say)
    if found:
        state.load(found[0]["step"], found[1])
        run.say(f"continuing from step {state.step}")
    run.rewind(state.step)
    objective = Objective(unet, encoder, config.loss, config.scales, head, repa, teacher).train()
    if config.compile:
        compile_blocks(objective)
    averaged = Objective(state.ema["unet"], state.ema.get("encoder", encoder), config.loss, config.scales).eval()
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext
    encodings = 0 if config.tokens else config.conditions + bool(head) + (teacher is encoder)
    flops = step_flops(unet, encoder, encodings=encodings, conditions=config.conditions)
    measure = Measure(config, device, dtype, flops)
    fixed = []
    if held:
        sizes = encoder.image_size, unet.config.image_size
        once = encoder if config.tokens else None
        fixed = held_out_batches(held, config.seed, *sizes, device, config.conditions, once)

    part = config.batch // config.accumulate
    pairs = Pairs(
        data, seed=config.seed, image_size=unet.config.image_size, condition_size=encoder.image_size,
        conditions=config.conditions, global_batch=config.batch, drop=config.drop, flip=config.flip,
        crop=None if config.crop == "centre" else config.crop, target_tokens=config.repa_from_store,
    )  # fmt: skip
    workers = config.workers if config.workers is not None else max(1, min(8, (os.cpu_count() or 2) // 2))
    feed = batches(pairs, first_index=state.step * config.batch, batch=part, workers=workers, device=device)
    looks = dict(total=config.steps, initial=state.step, desc="train", unit="step", mininterval=1.0, smoothing=0.05)
    with closing(feed), tqdm(**looks) as bar:
        measure.start()
        while state.step < config.steps:
            # dropout in the network: a pure function of the step, as all other randomness
            torch.manual_seed((config.seed << 32) + state.step)
            total, aligned = torch.zeros((), device=device), torch.zeros((), device=device)
            for _ in range(config.accumulate):
                batch = measure.waiting(feed)
                for path, why in batch["bad"]:
                    run.bad_sample(path, why)
                logsnr = noise_levels(batch["u"], scheduler.schedule).to(device)
                with autocast():
                    losses = objective(
                        batch["condition"], batch["target"], batch["noise"], logsnr, batch["drop"],
                        batch.get("target_tokens"),
                    )  # fmt: skip
                denoising, *others = (a if a is None else a.mean() / config.accumulate for a in losses)
                weighted = zip((config.align, config.repa), others, strict=True)
                sum((weight * loss for weight, loss in weighted if loss is not None), denoising).backward()
                total += denoising.detach()
                aligned += 0.0 if others[1] is None else others[1].detach()
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
            if step % config.save_every == 0 or last:
                measure.check()
                checkpoint.save(run.out / "checkpoints", step, state.tensors(), {"seed": config.seed}, config.keep)
            if step % config.sample_every == 0:
                pipeline = SemanticaPipeline(averaged.unet, averaged.encoder, scheduler)
                shown = fixed[0] if fixed else examples(pairs, SAMPLE_CONDITIONS)
                # in the precision of the training: the attention backend may know no other
                with autocast():
                    run.sample(pipeline, shown, step)
            measure.start()
    run.publish(SemanticaPipeline(averaged.unet, averaged.encoder, scheduler))
    run.say(f"done: {run.out} after {state.step} steps")
    return run.out


class Measure:
    """Loss, gradient norm and speed since the last row, without a device synchronisation at each step."""

    def __init__(self, config: TrainConfig, device: torch.device, dtype: torch.dtype, flops: int):
        self.config, self.device, self.flops = config, device, flops
        self.peak, self.peak_source = peak_flops(device, dtype)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.reset()

    def reset(self) -> None:
        self.busy = self.waited = 0.0
        self.steps = 0
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.aligned: list[Tensor] = []

    def start(self) -> None:
        self.began = time.perf_counter()

    def waiting(self, feed: Iterator[dict]) -> dict:
        began = time.perf_counter()
        batch = next(feed)
        self.waited += time.perf_counter() - began
        return batch

    def step(self, loss: Tensor, norm: Tensor, aligned: Tensor | None = None) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        if aligned is not None:
            self.aligned.append(aligned)
        self.finite &= torch.isfinite(loss) & torch.isfinite(norm)
        self.steps += 1
        self.busy += time.perf_counter() - self.began

    def check(self) -> None:
        if not self.finite:
            raise FloatingPointError(
                "the loss or a gradient is not finite any more; nothing was saved since: continue from the last "
                "checkpoint with a lower --lr or with --precision fp32"
            )

    def row(self, step: int, rate: float) -> dict:
        self.check()
        images = self.steps * self.config.batch / max(self.busy, 1e-9)
        row = {
            "step": step,
            "loss": torch.stack(self.losses).mean().item(),
            "grad_norm": torch.stack(self.norms).mean().item(),
            "lr": rate,
            "images_per_s": images,
            "data_wait": self.waited / max(self.busy, 1e-9),
            "peak_memory_bytes": peak_memory(self.device),
            "mfu": images * self.flops / self.peak,
            "flops_per_image": self.flops,
            "peak_flops": self.peak,
            "peak_flops_source": self.peak_source,
        }
        if self.aligned:
            row["repa_loss"] = torch.stack(self.aligned).mean().item()
        self.reset()
        return row


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process' largest resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Run:
    """The run folder: configuration, logs, sample grids, and the pipeline at the end.

    Raises:
        UserError: the folder holds a run of another configuration, or something else.
    """

    def __init__(self, config: TrainConfig, data: PairData | ShardData):
        self.out, self.config = config.out, config
        record = {"format": checkpoint.FORMAT, "semantica": semantica.__version__, "torch": torch.__version__}
        record |= {"train": config.record(), "data_digest": data.digest()}
        path = self.out / "config.json"
        if path.exists():
            self._compare(path, record)
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists and is not a run folder: choose another --out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            aside = self.out / ".config.json.incomplete"
            aside.write_text(json.dumps(record, indent=1))
            aside.replace(path)
        except OSError as error:
            raise UserError(
                f"run folder {self.out} cannot be written ({error.strerror}): choose another --out"
            ) from error
        self.known_bad = self._known_bad()
        self.board = self._board()

    def _compare(self, path: Path, record: dict) -> None:
        try:
            old = json.loads(path.read_text())
            before, version, seen = old["train"], old["format"], old["data_digest"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} cannot be read: restore it or choose another --out") from error
        if version != record["format"]:
            raise UserError(f"{self.out} has format {version}: this version continues format {record['format']} only")
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        for name, now in record["train"].items():
            # a run made before an option existed had its default
            then = before.get(name, defaults.get(name))
            if name not in FREE and then != now:
                option = name.replace("_", "-")
                raise UserError(f"{self.out} was made with --{option} {then}, not {now}: choose another --out")
        if seen != record["data_digest"]:
            raise UserError(
                f"the pictures in {self.config.data} changed since {self.out} was made: choose another --out"
            )

    def _known_bad(self) -> set[str]:
        path = self.out / "bad_samples.jsonl"
        return {json.loads(line)["path"] for line in path.read_text().splitlines()} if path.exists() else set()

    def _board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no TensorBoard logs: install semantica-diffusion[train] for them")
            return None
        return SummaryWriter(str(self.out / "logs"))

    def say(self, line: str) -> None:
        tqdm.write(line)

    def bad_sample(self, path: str, reason: str) -> None:
        """Name a bad picture once."""
        if path in self.known_bad:
            return
        self.known_bad.add(path)
        with (self.out / "bad_samples.jsonl").open("a") as file:
            file.write(json.dumps(bad_record(path, reason)) + "\n")
        self.say(f"bad picture {path}: {reason}")

    def rewind(self, step: int) -> None:
        """Forget what was logged after the step that the run continues from."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json_step(line) <= step]
            aside = path.with_name(".metrics.jsonl.incomplete")
            aside.write_text("".join(f"{line}\n" for line in kept))
            aside.replace(path)

    def log(self, row: dict) -> None:
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(name, value, row["step"])

    def sample(self, pipeline: SemanticaPipeline, batch: dict, step: int) -> None:
        """A grid: each condition (or several), its target, its variations."""
        few = torch.arange(min(SAMPLE_CONDITIONS, len(batch["target"])))
        conditions, targets = take(batch["condition"], few), batch["target"][few]
        pictures = batch.get("shown", batch["condition"])[few]
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(self.config.seed)
        # several conditions [B, K, 3, C, C] are shown one after the other
        columns = pictures.reshape(len(pictures), -1, *pictures.shape[-3:])
        made = pipeline(
            conditions,
            num_images_per_prompt=SAMPLE_VARIATIONS,
            num_inference_steps=SAMPLE_STEPS,
            generator=generator,
            output_type="pt",
        ).images
        size = targets.shape[-1]
        shown = torch.nn.functional.interpolate(columns.flatten(0, 1), (size, size), mode="bilinear", antialias=True)
        shown = to_uint8(shown).reshape(*columns.shape[:2], size, size, 3)
        made = to_uint8(made * 2 - 1).reshape(len(targets), SAMPLE_VARIATIONS, size, size, 3)
        rows = [[*c, t, *m] for c, t, m in zip(shown, to_uint8(targets), made, strict=True)]
        (self.out / "samples").mkdir(exist_ok=True)
        save_png(grid(rows, apart=1), self.out / "samples" / f"step-{step:08d}.png")

    def publish(self, pipeline: SemanticaPipeline) -> None:
        """Write the pipeline; its index, which makes the folder usable, comes last."""
        index = self.out / "model_index.json"
        index.unlink(missing_ok=True)

        def fill(folder: Path) -> None:
            pipeline.save_pretrained(folder, safe_serialization=True)

        aside = self.out / "pipeline"
        checkpoint.write_aside(aside, fill)
        for part in sorted(aside.iterdir(), key=lambda p: p.name == index.name):
            target = self.out / part.name
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
        aside.rmdir()
        if self.board is not None:
            self.board.flush()


def json_step(line: str) -> float:
    """The step of a log line; lines cut short by a crash count as never kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
