"""Figures of a run: loss, gradient norm, speed, memory."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from semantica.memory import peak_resident
from semantica.model.cost import peak_flops
from semantica.train.config import TrainConfig
from semantica.train.processes import World


def drained(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Mark:
    """A place in a device's queue, and whether the device has come to it; a CPU has no queue."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event() if device.type == "cuda" else None

    def set(self) -> None:
        """Behind all that the device has been given so far."""
        if self.event is not None:
            self.event.record()

    def reached(self) -> bool:
        return self.event is None or self.event.query()


def received(feed: Iterator[dict], mark: Mark, clock: Callable[[], float]) -> tuple[dict, float]:
    """The next batch, and the seconds that it was waited for: none where the device had work until it came.

    A host that runs steps ahead of its device, as where these are replayed as graphs, always waits for batches.
    """
    mark.set()
    began = clock()
    batch = next(feed)
    passed = clock() - began
    return batch, passed if mark.reached() else 0.0


class Measure:
    """Loss, gradient norm and speed since the last row, without a device synchronisation at each step.

    The clock runs from `start` to `stop`, over any number of steps; `stop` first waits for the device, which otherwise
    still has to do what the last steps gave it.

    Args:
        clock, drain, mark: seconds on the wall, what waits until a device has nothing left to do, and what says whether
            it has.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        flops: int,
        world: World,
        clock: Callable[[], float] = time.perf_counter,
        drain: Callable[[torch.device], None] = drained,
        mark: Mark | None = None,
    ):
        self.config, self.device, self.flops, self.world = config, device, flops, world
        self.clock, self.drain, self.skips = clock, drain, dtype == torch.float16
        self.mark = mark or Mark(device)
        self.peak, self.peak_source = peak_flops(device, dtype)
        if self.peak is not None:
            self.peak *= world.size
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.reset()

    def reset(self) -> None:
        self.busy = self.waited = 0.0
        self.steps = 0
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.aligned: list[Tensor] = []

    def start(self) -> None:
        self.began = self.clock()

    def stop(self) -> None:
        """Before anything that is not training: it would wait for the device, and hide the time of the steps."""
        self.drain(self.device)
        self.busy += self.clock() - self.began

    def waiting(self, feed: Iterator[dict]) -> dict:
        batch, seconds = received(feed, self.mark, self.clock)
        self.waited += seconds
        return batch

    def step(self, loss: Tensor, norm: Tensor, aligned: Tensor | None = None) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        if aligned is not None:
            self.aligned.append(aligned)
        # a step whose gradients overflow in fp16 was skipped, and the next has a lower scale
        self.finite &= torch.isfinite(loss) & (torch.isfinite(norm) | self.skips)
        self.steps += 1

    def check(self) -> None:
        # the same answer on every process: a mean over 0 and 1 is 1 only where all are
        if self.world.mean(self.finite.float()) < 1:
            raise FloatingPointError(
                "the loss or a gradient is not finite any more; nothing was saved since: continue from the last "
                "checkpoint with a lower --lr or with --precision fp32"
            )

    def row(self, step: int, rate: float) -> dict:
        self.check()
        norms = torch.stack(self.norms)
        norms = norms[norms.isfinite()] if self.skips else norms
        images = self.steps * self.config.batch / max(self.busy, 1e-9)
        row = {
            "step": step,
            "loss": self.world.mean(torch.stack(self.losses).mean()).item(),
            # of steps that all were skipped there is none
            "grad_norm": norms.mean().item() if len(norms) else None,
            "lr": rate,
            "images_per_s": images,
            "data_wait": self.waited / max(self.busy, 1e-9),
            "peak_memory_bytes": peak_memory(self.device),
            "mfu": None if self.peak is None else images * self.flops / self.peak,
            "flops_per_image": self.flops,
            "peak_flops": self.peak,
            "peak_flops_source": self.peak_source,
        }
        if self.aligned:
            row["repa_loss"] = self.world.mean(torch.stack(self.aligned).mean()).item()
        self.reset()
        return row


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process' largest resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()
