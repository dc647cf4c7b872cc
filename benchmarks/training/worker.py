"""One way to train in a process of its own; the other side is `semantica.benchmarks.training.suite`.

The step is the trainer's, with one switch for each rung of the ladder: the last rung is what `semantica train` runs.
"""

import copy
import functools
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from semantica.benchmarks.harness.ladder import cumulative
from semantica.benchmarks.harness.process import peak_memory, serve
from semantica.benchmarks.sampling.stock import rebuild
from semantica.device import sent
from semantica.diffusion import noise_levels
from semantica.kernels import OPERATORS
from semantica.memory import keep_freed_memory
from semantica.model.attention import set_attention
from semantica.model.compile import compile_in_place
from semantica.model.cost import step_flops
from semantica.train.build import build
from semantica.train.config import TrainConfig
from semantica.train.data.loading import batches
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Pairs
from semantica.train.graph import StepGraph
from semantica.train.objective import Objective
from semantica.train.run.measure import Mark, drained, received
from semantica.train.state import TrainState

STRONG = "strong"


@dataclass(frozen=True)
class Switches:
    """In the order of the ladder: each rung has all switches up to its own."""

    channels_last: bool = False
    fused_group_norm: bool = False
    fused_attention: bool = False
    compile: bool = False
    bf16: bool = False
    kept_memory: bool = False
    whole_network: bool = False
    """Compiled as one graph, not by block."""
    recorded: bool = False
    """Forward and backward pass replayed as one CUDA graph."""


def rungs(device: str) -> dict[str, Switches]:
    """The ladder, and after the plain loop what most would write first: that loop in bf16, compiled as a whole. What
    the host does with freed memory is nothing to a GPU, and graphs are recorded on one only."""
    ladder = cumulative(Switches, ("kept_memory",) if device == "cuda" else ("recorded",))
    return {"plain": ladder.pop("plain"), STRONG: Switches(compile=True, bf16=True, whole_network=True), **ladder}


@functools.cache
def own_kernels() -> dict[str, str]:
    """Names of this package's Triton kernels, and the operator that each is part of."""
    files = [(operator.name, path) for operator in OPERATORS.values() for path in operator.sources(gpu=True)]
    return {kernel: name for name, path in files for kernel in re.findall(r"def (\w+_kernel)\(", path.read_text())}


def group_of(name: str) -> str:
    """What kind of work an operator of PyTorch is, or a kernel of a GPU."""
    kinds = {
        "convolution": ("conv", "fprop", "dgrad", "wgrad"),
        "matrix products": ("mm", "addmm", "bmm", "linear", "gemm", "matmul"),
        "group_norm": ("group_norm",),
        "attention": ("attention", "softmax", "flash_", "fmha"),
        "optimizer and averages": ("adam", "foreach", "lerp", "multi_tensor_apply"),
        "compiled, fused": ("fused", "triton", "compiledfx", "graph_"),
    }
    # those of csrc/cuda are in this package's namespace, and share names with Triton's
    own = "group_norm" if name.startswith("void semantica::") else own_kernels().get(name, name)
    low = own.lower()
    # attention and norms are named more exactly than the products inside them
    for kind in ("attention", "group_norm", "convolution", "optimizer and averages", "compiled, fused"):
        if any(word in low for word in kinds[kind]):
            return kind
    if any(word in low.split("::")[-1].split("_") or low.endswith(f"::{word}") for word in kinds["matrix products"]):
        return "matrix products"
    # cuBLAS' own names
    return "matrix products" if any(word in low for word in ("gemm", "nvjet", "cutlass")) else "the rest"


def seconds_by_name(events: Iterable[Any], cuda: bool) -> Iterator[tuple[str, float, int]]:
    """Name, seconds and calls of what took time on the device, from averages of PyTorch's profiler.

    On a GPU these are its kernels alone: each operator's row has the time of the kernels that it launched once more,
    and what a graph launches no operator has.
    """
    for event in events:
        if cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent:
            yield event.key, spent / 1e6, event.count


class Trainer:
    """A training run without its log, checkpoints and figures."""

    def build(self, rung: str, data: str, preset: str, batch: int, device: str, workers: int) -> dict:
        switches = rungs(device)[rung]
        self.device = torch.device(device)
        self.mark = Mark(self.device)
        if switches.kept_memory:
            keep_freed_memory()
        config = TrainConfig(data, Path("unused"), preset=preset, batch=batch, workers=workers, graph=switches.recorded)
        unet, encoder, scheduler = build(config, self.device)
        self.flops = step_flops(unet, encoder)
        unet = rebuild(unet, norm=not switches.fused_group_norm, cross=not switches.fused_attention)
        if not switches.channels_last:
            unet, encoder = (copy.deepcopy(m).to(memory_format=torch.contiguous_format) for m in (unet, encoder))
        dtype = torch.bfloat16 if switches.bf16 else torch.float32
        if switches.fused_attention:
            networks = torch.nn.ModuleList([unet, encoder])
            set_attention(networks, "auto", self.device, dtype, compiled=switches.compile)
        self.autocast = functools.partial(torch.autocast, device, dtype) if switches.bf16 else nullcontext
        self.state = TrainState(config, {"unet": unet, "encoder": encoder})
        self.objective = Objective(unet, encoder, config.loss).train()
        self.record()
        if switches.compile:
            compile_in_place(self.objective, "network" if switches.whole_network else "blocks")
        self.pairs = Pairs(
            open_data(config.data), seed=0, image_size=unet.config.image_size,
            condition_size=encoder.image_size, global_batch=batch, drop=config.drop, flip=True, crop=1.0,
        )  # fmt: skip
        self.feed = batches(self.pairs, first_index=0, batch=batch, workers=workers, device=self.device)
        self.schedule = scheduler.schedule
        return {"flops_per_image": self.flops, "arithmetic": "bf16" if switches.bf16 else "fp32"}

    def step(self) -> tuple[torch.Tensor, float]:
        """The loss, still on the device, and the seconds that it waited for data."""
        torch.manual_seed(self.state.step)
        batch, waited = received(self.feed, self.mark, time.perf_counter)
        logsnr = sent(noise_levels(batch["u"], self.schedule), self.device)
        images = (batch[name] for name in ("condition", "target", "noise"))
        (loss,) = self.gradients(*images, logsnr, batch["drop"])
        self.state.update()
        return loss, waited

    def backward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        with self.autocast():
            losses, *_ = self.objective(*inputs)
        loss = losses.mean()
        loss.backward()
        return (loss.detach(),)

    def record(self) -> None:
        """Where that is its rung, the next step is recorded as a graph."""
        graph = functools.partial(StepGraph, self.backward, self.state.parameters.values(), self.device)
        self.gradients = graph() if self.state.config.graph else self.backward

    def steps(self, count: int) -> dict:
        """Run some steps: seconds of each on the wall, device included.

        A GPU runs behind the host, as in training, and is waited for after the last one: each step then has an equal
        share of the time.
        """
        ends, waits, losses = [time.perf_counter()], [], []
        for _ in range(count):
            loss, waited = self.step()
            losses.append(loss)
            waits.append(waited)
            ends.append(time.perf_counter())
        if self.device.type == "cuda":
            drained(self.device)
            each = (time.perf_counter() - ends[0]) / count
            ends = [ends[0] + i * each for i in range(count + 1)]
        seconds = [after - before for before, after in zip(ends, ends[1:])]
        return {
            "seconds": seconds, "waits": waits, "losses": torch.stack(losses).tolist(), "peak_bytes": peak_memory()
        }  # fmt: skip

    def park(self) -> dict:
        """Leave the device to others: weights go to the host; gradients, moments and averages are dropped.

        Returns what stays allocated there, in bytes.
        """
        # a graph keeps memory of its own, and the addresses of weights: it is recorded anew
        self.record()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.optimizer.state.clear()
        held = [*self.objective.parameters(), *self.objective.buffers()]
        self.parked = [(tensor, tensor.detach().cpu().clone()) for tensor in held]
        averages = [p for module in self.state.ema.values() for p in module.parameters()]
        for tensor in (*held, *averages):
            tensor.data = tensor.new_empty(0)
        if self.device.type != "cuda":
            return {"parked_bytes": 0}
        # no graph is left that works in them: 32 MiB for each thread and stream on Hopper
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return {"parked_bytes": torch.cuda.memory_allocated()}

    def wake(self) -> dict:
        """Go on after `park`, with two steps that are not timed: moments and averages begin anew, which takes no other
        time, and allocators and caches are warm again."""
        for tensor, kept in self.parked:
            tensor.data = kept.to(self.device)
        for name, module in self.state.trained.items():
            for average, weight in zip(self.state.ema[name].parameters(), module.parameters(), strict=True):
                average.data = weight.detach().clone()
        self.parked = []
        self.steps(2)
        return {}

    def shares(self, count: int) -> dict:
        """Seconds of a step by operator, and by kind of work, as PyTorch's profiler sees them."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            self.steps(count)
        events = seconds_by_name(found.key_averages(), cuda)
        rows = [(name, seconds / count, calls / count) for name, seconds, calls in events]
        kinds: dict[str, float] = {}
        for name, seconds, _ in rows:
            kinds[group_of(name)] = kinds.get(group_of(name), 0.0) + seconds
        return {"operators": sorted(rows, key=lambda row: -row[1])[:25], "kinds": kinds}


if __name__ == "__main__":
    trainer = Trainer()
    serve({name: getattr(trainer, name) for name in ("build", "steps", "park", "wake", "shares")})
