"""One way to train in a process of its own; the other side is `semantica.benchmarks.training.suite`.

The step is the trainer's, with one switch for each rung of the ladder: the last rung is what `semantica train` runs.
"""

import copy
import functools
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from semantica.benchmarks.harness.ladder import cumulative
from semantica.benchmarks.harness.process import peak_memory, serve
from semantica.benchmarks.sampling.stock import rebuild
from semantica.diffusion import noise_levels
from semantica.memory import keep_freed_memory
from semantica.model.attention import set_attention
from semantica.model.compile import compile_in_place
from semantica.model.cost import step_flops
from semantica.train.build import build
from semantica.train.config import TrainConfig
from semantica.train.data.folders import scan
from semantica.train.data.loading import batches
from semantica.train.data.pairs import Pairs
from semantica.train.objective import Objective
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


def rungs(device: str) -> dict[str, Switches]:
    """The ladder, and after the plain loop what most would write first: that loop in bf16, compiled as a whole. What
    the host does with freed memory is nothing to a GPU."""
    ladder = cumulative(Switches, ("kept_memory",) if device == "cuda" else ())
    return {"plain": ladder.pop("plain"), STRONG: Switches(compile=True, bf16=True, whole_network=True), **ladder}


def group_of(name: str) -> str:
    """What kind of work an operator of PyTorch is."""
    kinds = {
        "convolution": ("conv",),
        "matrix products": ("mm", "addmm", "bmm", "linear", "gemm", "matmul"),
        "group_norm": ("group_norm",),
        "attention": ("attention", "softmax"),
        "optimizer and averages": ("adam", "foreach", "lerp"),
        "compiled, fused": ("fused", "triton", "compiledfx", "graph_"),
    }
    low = name.lower()
    # attention and norms are named more exactly than the products inside them
    for kind in ("attention", "group_norm", "convolution", "optimizer and averages", "compiled, fused"):
        if any(word in low for word in kinds[kind]):
            return kind
    if any(word in low.split("::")[-1].split("_") or low.endswith(f"::{word}") for word in kinds["matrix products"]):
        return "matrix products"
    return "the rest"


class Trainer:
    """A training run without its log, checkpoints and figures."""

    def build(self, rung: str, data: str, preset: str, batch: int, device: str, workers: int) -> dict:
        switches = rungs(device)[rung]
        self.device = torch.device(device)
        if switches.kept_memory:
            keep_freed_memory()
        config = TrainConfig(Path(data), Path("unused"), preset=preset, batch=batch, workers=workers)
        unet, encoder, scheduler = build(config, self.device)
        self.flops = step_flops(unet, encoder)
        unet = rebuild(unet, norm=not switches.fused_group_norm, cross=not switches.fused_attention)
        if not switches.channels_last:
            unet, encoder = (copy.deepcopy(m).to(memory_format=torch.contiguous_format) for m in (unet, encoder))
        dtype = torch.bfloat16 if switches.bf16 else torch.float32
        if switches.fused_attention:
            set_attention(torch.nn.ModuleList([unet, encoder]), "auto", self.device, dtype)
        self.autocast = functools.partial(torch.autocast, device, dtype) if switches.bf16 else nullcontext
        self.state = TrainState(config, {"unet": unet, "encoder": encoder})
        self.objective = Objective(unet, encoder, config.loss).train()
        if switches.compile:
            compile_in_place(self.objective, "network" if switches.whole_network else "blocks")
        pairs = Pairs(
            scan(config.data, "folders"), seed=0, image_size=unet.config.image_size,
            condition_size=encoder.image_size, global_batch=batch, drop=config.drop, flip=True, crop=1.0,
        )  # fmt: skip
        self.feed = batches(pairs, first_index=0, batch=batch, workers=workers, device=self.device)
        self.schedule = scheduler.schedule
        return {"flops_per_image": self.flops, "arithmetic": "bf16" if switches.bf16 else "fp32"}

    def step(self) -> tuple[torch.Tensor, float]:
        """The loss, still on the device, and the seconds that were spent waiting for data."""
        torch.manual_seed(self.state.step)
        began = time.perf_counter()
        batch = next(self.feed)
        waited = time.perf_counter() - began
        logsnr = noise_levels(batch["u"], self.schedule).to(self.device)
        with self.autocast():
            losses, *_ = self.objective(batch["condition"], batch["target"], batch["noise"], logsnr, batch["drop"])
        loss = losses.mean()
        loss.backward()
        self.state.update()
        return loss.detach(), waited

    def steps(self, count: int) -> dict:
        """Run some steps: seconds of each on the wall, device included."""
        seconds, waits, losses = [], [], []
        for _ in range(count):
            began = time.perf_counter()
            loss, waited = self.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
            waits.append(waited)
        return {"seconds": seconds, "waits": waits, "losses": losses, "peak_bytes": peak_memory()}

    def shares(self, count: int) -> dict:
        """Seconds of a step by operator, and by kind of work, as PyTorch's profiler sees them."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            self.steps(count)
        rows = []
        for event in found.key_averages():
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            if spent:
                rows.append((event.key, spent / 1e6 / count, event.count / count))
        kinds: dict[str, float] = {}
        for name, seconds, _ in rows:
            kinds[group_of(name)] = kinds.get(group_of(name), 0.0) + seconds
        return {"operators": sorted(rows, key=lambda row: -row[1])[:25], "kinds": kinds}


if __name__ == "__main__":
    trainer = Trainer()
    serve({"build": trainer.build, "steps": trainer.steps, "shares": trainer.shares})
