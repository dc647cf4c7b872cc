"""`semantica bench train --sustained`: the trainer's loader and step together for some seconds, and each of them alone.

A race of single steps reads batches that were made while others had their turn. Here nothing that was made ahead
counts: the queue is emptied before the clock starts, which then runs for longer than a full one could last.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.store import environment
from semantica.benchmarks.harness.table import Column
from semantica.benchmarks.training.worker import Trainer
from semantica.model.cost import peak_flops
from semantica.train.data.loading import AHEAD, batches
from semantica.train.data.workers import BEST_MFU, choose
from semantica.train.run.measure import drained

# first steps, which compile; and batches that the step alone repeats
WARMUP, KEPT = 3, 4
# of the seconds, so many for the loader alone and for the step alone
ALONE = 0.25
# a loader that is not faster than the step by this much starves it now and then; and so does one that is waited for
CLOSE, WAITED = 1.1, 0.05
# a step that keeps less of its speed though it need not wait shares what it runs on
KEPT_SPEED = 0.9
SUSTAINED = (
    Column("preset", "{preset}"),
    Column("batch", "{batch}"),
    Column("workers", "{workers}"),
    Column("loader alone, samples/s", "{loader:,.0f}"),
    Column("step alone", "{step:,.0f}"),
    Column("together", "{together:,.0f}"),
    Column("of the step alone", "{share:.0%}"),
    Column("data wait", "{data_wait:.1%}"),
    Column("seconds", "{seconds:.1f}"),
)


def measure(
    rung: str, preset: str, batch: int, device: str, workers: int | None, seconds: float, data: str
) -> tuple[dict, str]:
    """Run a rung of the ladder on real data; returns the row, and in words what bounds it.

    Args:
        workers: None for as many as `semantica train` would choose. seconds: for which both run together.
        data: what `semantica train --data` takes.

    Returns:
        `loader`, `step`, `together`: samples a second; `share` of the step's speed that is left with data; `data_wait`:
        share of the time in which a batch was waited for and the device had nothing else to do.
    """
    trainer = Trainer()
    built = trainer.build(rung=rung, data=data, preset=preset, batch=batch, device=device, workers=0)
    kind = torch.bfloat16 if built["arithmetic"] == "bf16" else torch.float32
    peak, _ = peak_flops(trainer.device, kind)
    demand = None if peak is None else BEST_MFU * peak / built["flops_per_image"]
    workers, why = choose(trainer.pairs, 0, batch, workers, demand, 1, device)
    feed = batches(trainer.pairs, first_index=0, batch=batch, workers=workers, device=trainer.device)
    try:
        trainer.feed = feed
        for _ in range(WARMUP):
            trainer.step()
        kept = [next(feed) for _ in range(KEPT)]
        alone, _, _ = timed(trainer, itertools.cycle(kept), ALONE * seconds)
        loader = load(feed, batch, max(1, workers) * AHEAD + 1, ALONE * seconds, trainer.device)
        together, waited, lasted = timed(trainer, feed, seconds)
    finally:
        feed.close()
    row = {"preset": preset, "batch": batch, "workers": workers, "loader": loader, "step": batch * alone}
    row |= {"together": batch * together, "share": together / alone, "data_wait": waited, "seconds": lasted}
    arch = environment(device)["arch"]
    row |= {"op": "sustained", "rung": rung, "arch": arch, "kernel_hash": source_hash("sustained", arch)}
    return row, f"{why}\n{verdict(row)}"


def timed(
    trainer: Trainer, feed: Iterator[dict], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float, float]:
    """Steps a second, the share of the time spent waiting for batches, and the seconds that it took."""
    trainer.feed, waited, count = feed, 0.0, 0
    drained(trainer.device)
    began = clock()
    while not count or clock() - began < seconds:
        waited += trainer.step()[1]
        count += 1
    drained(trainer.device)
    passed = clock() - began
    return count / passed, waited / passed, passed


def load(
    feed: Iterator[dict],
    batch: int,
    ahead: int,
    seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Samples a second that arrive on the device where nothing else is done, after `ahead` batches from the queue."""
    for _ in range(ahead):
        next(feed)
    drained(device)
    began, count = clock(), 0
    while not count or clock() - began < seconds:
        next(feed)
        count += 1
    drained(device)
    return count * batch / (clock() - began)


def verdict(row: dict) -> str:
    """Whether the loader keeps up with the step."""
    rates = f"the loader gives {row['loader']:,.0f} samples/s and the step takes {row['step']:,.0f}"
    if row["loader"] < CLOSE * row["step"]:
        factor = row["step"] * CLOSE / row["loader"]
        more = math.ceil(max(1, row["workers"]) * factor)
        return f"STARVED: {rates}: give {more} workers, or store smaller pictures (semantica pairs --resize)"
    if row["data_wait"] > WAITED:
        return f"UNEVEN: {rates}, and still {row['data_wait']:.0%} of the time was spent waiting: look at the disk"
    if row["share"] < KEPT_SPEED:
        return f"CROWDED: {rates}, and they share the processors: the step keeps {row['share']:.0%} of its speed"
    return f"fed: {rates}"


def drawn(place: Path) -> str:
    """Photos of a web page's size, where no --data is given."""
    from semantica.benchmarks.loading.photos import draw_photos

    draw_photos(place / "photos", 32, 1024, 768)
    return str(place / "photos")
