"""The network in PyTorch, rearranged and compiled for sampling, from a bundle's weights: fast, and slow to start."""

from typing import Any

import torch
from torch import Tensor

from semantica.condition import Condition
from semantica.device import pick_device
from semantica.engines.bundle import Bundle
from semantica.engines.network import TorchEngine
from semantica.sampling.compiled import FastSampler


def load(bundle: Bundle, backend: str, device: str) -> "CompiledEngine":
    return CompiledEngine(bundle, pick_device(device))


class CompiledEngine(TorchEngine):
    """`TorchEngine` whose whole runs go through a `FastSampler`; a single call is the eager network."""

    backend = "torch-compile"

    def __init__(self, bundle: Bundle, device: torch.device):
        super().__init__(bundle, device)
        self.sampler = FastSampler(self.unet, self.unet.dtype)

    def run(self, z: Tensor, condition: Condition, null: Condition | None, *settings: Any) -> Tensor:
        """The first run of each batch size compiles."""
        self.check("z", z, len(z))
        # not filled up: one token per stream makes cross-attention a constant
        return self.sampler(z, condition, null and self.unet.null(len(z)), *settings)
