"""`semantica train-segmenter`: the loop, its checkpoint and its log; the same command continues a run, bit-exactly."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from semantica.device import pick_device
from semantica.errors import UserError
from semantica.files import read_json, write_json, written
from semantica.segmentation.segmenter import Segmenter
from semantica.segmentation.windows import EMPTY
from semantica.train.segmentation.config import TrainSegmenterConfig
from semantica.train.segmentation.data import Labelled, Samples, batch_of

OPTIONS, LOG, CHECKPOINT = "options.json", "log.jsonl", "checkpoint.safetensors"
# options that may change when a run is continued: they change no weight
FREE = {"out", "workers", "log_every", "save_every", "device"}


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each class by itself, over all pixels (Cho et al., arXiv 2303.11797, section 4.2).

    Args:
        logits: `[B, T, h, w]`, enlarged to the labels. labels: int64 `[B, H, W]`; `EMPTY` is in none of the classes.
    """
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    empty = labels == EMPTY
    goal = F.one_hot(labels.masked_fill(empty, 0), logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, (goal * ~empty[..., None]).permute(0, 3, 1, 2))


def groups(segmenter: Segmenter, config: TrainSegmenterConfig) -> list[dict]:
    """What AdamW is told: the aggregator, and CLIP at its own rate; norms and biases do not decay."""
    made = []
    for part, rate in ((segmenter.aggregator, config.rate), (segmenter.towers, config.rate * config.clip_rate)):
        trained = [p for p in part.parameters() if p.requires_grad]
        for decay, wanted in ((config.decay, True), (0.0, False)):
            some = [p for p in trained if (p.ndim > 1) == wanted]
            made += [{"params": some, "lr": rate, "weight_decay": decay}] if some else []
    return made


def rate_at(step: int, config: TrainSegmenterConfig) -> float:
    """The learning rate of a step, as a share of the highest: it rises linearly, then falls as a cosine to 0."""
    rising = min(1.0, (step + 1) / (config.warmup + 1))
    return rising * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def trained(segmenter: Segmenter) -> dict[str, nn.Parameter]:
    return {name: p for name, p in segmenter.named_parameters() if p.requires_grad}


def save(path: Path, step: int, segmenter: Segmenter, optimizer: torch.optim.Optimizer) -> None:
    """All that changes while training, in one file of safetensors."""
    tensors = {"step": torch.tensor(step)}
    for name, p in trained(segmenter).items():
        tensors[f"weight.{name}"] = p.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    with written(path) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside)


def resume(path: Path, segmenter: Segmenter, optimizer: torch.optim.Optimizer) -> int:
    """Undoes `save`; returns the next step. Raises `UserError` for a file that is broken or of another run."""
    try:
        tensors = load_file(path)
        step = int(tensors["step"])
        for name, p in trained(segmenter).items():
            p.data.copy_(tensors[f"weight.{name}"])
            optimizer.state[p] = {
                key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else p.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    except Exception as error:
        raise UserError(f"{path} cannot be read: remove it to begin again") from error
    return step


def begun(config: TrainSegmenterConfig) -> None:
    """The run's folder with its options. Raises `UserError` where it holds a run with others, or something else."""
    given = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    if (config.out / OPTIONS).is_file():
        before = read_json(config.out / OPTIONS)
        for name in sorted({*given, *before} - FREE):
            if before.get(name) != given.get(name):
                raise UserError(
                    f"{config.out} was begun with {name} {before.get(name)!r}, not {given.get(name)!r}: give the same, "
                    "or another --out"
                )
    elif config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"{config.out} exists and is no run of a segmenter: give another folder")
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / OPTIONS, given)


def batches(config: TrainSegmenterConfig, data: Labelled, size: int, step: int) -> Iterator[list[Tensor]]:
    """Those of the steps that are left. Raises `UserError` for a picture or mask that cannot be used."""
    left = (config.steps - step) * config.batch
    samples = Samples(data, size, config.seed, config.crop, config.flip, step * config.batch, left)
    for batch in DataLoader(samples, config.batch, num_workers=config.workers, collate_fn=batch_of):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def train_segmenter(config: TrainSegmenterConfig) -> None:
    """Train, log and save.

    Raises:
        UserError: data, CLIP or options cannot be used, or the folder holds another run.
        FloatingPointError: the loss is finite no more; the last checkpoint stays.
    """
    data, device = Labelled.open(config.check().data), pick_device(config.device)
    torch.manual_seed(config.seed)
    segmenter = Segmenter.from_clip(config.clip, config.image_size, config.template, config.sizes)
    numbers = segmenter.numbers(data.classes).to(device)
    begun(config)
    segmenter.to(device).train().tune(config.tune)
    optimizer = torch.optim.AdamW(groups(segmenter, config))
    highest = [group["lr"] for group in optimizer.param_groups]
    path, step = config.out / CHECKPOINT, 0
    if path.is_file():
        step = resume(path, segmenter, optimizer)
        print(f"continues at step {step} of {config.steps}")
    ours, clips = (sum(p.numel() for p in part.parameters() if p.requires_grad) / 1e6
                   for part in (segmenter.aggregator, segmenter.towers))  # fmt: skip
    print(f"{len(data.files)} pictures, {len(data.classes)} classes; trained: {ours:.2f} M weights of the aggregator, "
          f"{clips:.2f} M of CLIP")  # fmt: skip
    losses, began = [], time.perf_counter()
    for pictures, labels in batches(config, data, segmenter.image_size, step):
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * rate_at(step, config)
        loss = class_loss(segmenter(pictures.to(device), segmenter.embed(numbers)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained(segmenter).values(), config.clip_norm)
        optimizer.step()
        step += 1
        losses.append(loss.detach())
        kept = step % config.save_every == 0 or step == config.steps
        if kept or step % config.log_every == 0:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} after {step} steps: give a lower --rate")
            speed = len(losses) / (time.perf_counter() - began)
            with (config.out / LOG).open("a") as log:
                log.write(json.dumps({"step": step, "loss": mean, "steps_per_second": round(speed, 3)}) + "\n")
            print(f"step {step:6d}  loss {mean:.4f}  {speed:.2f} steps/s", flush=True)
            losses, began = [], time.perf_counter()
        if kept:
            save(path, step, segmenter, optimizer)
    segmenter.save_pretrained(config.out)
    print(f'{config.out}: semantica segment --model {config.out} --image FILE --classes "..."')
