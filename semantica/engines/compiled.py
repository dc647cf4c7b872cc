"""The network in PyTorch, rearranged and compiled for sampling, from a bundle's weights: fast, and slow to start."""

from collections.abc import Callable

import torch
from torch import Tensor

from semantica.condition import Condition
from semantica.device import pick_device
from semantica.engines.bundle import Bundle
from semantica.engines.network import TorchEngine
from semantica.fast_sampler import FastSampler
from semantica.solvers import Plan


def load(bundle: Bundle, backend: str, device: str) -> "CompiledEngine":
    return CompiledEngine(bundle, pick_device(device))


class CompiledEngine(TorchEngine):
    """`TorchEngine` whose whole runs go through a `FastSampler`; a single call is the eager network."""

    backend = "torch-compile"

    def __init__(self, bundle: Bundle, device: torch.device):
        super().__init__(bundle, device)
        self.sampler = FastSampler(self.unet, self.unet.dtype)

    def sample(
        self,
        z: Tensor,
        condition: Condition,
        plan: Plan,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        thresholding: str = "clip",
        clip_range: float = 1.0,
        ratio: float = 0.995,
        noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """As `Engine.sample`; the first run of each batch size compiles."""
        self.check("z", z, len(z))
        # not filled up: one token per stream makes cross-attention a constant
        null = self.unet.null_condition(len(z)) if guidance != 1 else None
        return self.sampler(z, condition, null, plan, guidance, interval, thresholding, clip_range, ratio, noise)
