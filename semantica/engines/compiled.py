"""The network in PyTorch, rearranged and compiled for sampling, from a bundle's weights: fast, and slow to start."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semantica.condition import Condition
from semantica.device import pick_device
from semantica.engines.bundle import Bundle
from semantica.engines.network import TorchEngine
from semantica.sampling.compiled import CompiledDenoiser


def load(bundle: Bundle, backend: str, device: str) -> "CompiledEngine":
    return CompiledEngine(bundle, pick_device(device))


class CompiledEngine(TorchEngine):
    """`TorchEngine` whose whole runs go through a `CompiledDenoiser`; a single call is the eager network."""

    backend = "torch-compile"
    refuses = {
        "steps": "engine 'torch-compile' takes no callback: use the engine 'torch'",
        "module": "engine 'torch-compile' takes no guider that changes the network: use the engine 'torch'",
        "gradients": "engine 'torch-compile' gives no gradients: sample the run folder that it was exported from",
    }

    def __init__(self, bundle: Bundle, device: torch.device):
        super().__init__(bundle, device)
        self.compiled = CompiledDenoiser(self.unet, self.unet.dtype)
        self.predictor = self.compiled.predictor

    def null(self, batch: int) -> Condition:
        """Not filled up: one token per stream makes cross-attention a constant."""
        return self.unet.null(batch)

    def execute(self, run: Callable, z: Tensor, *arguments: Any) -> Tensor:
        """The first run of each batch size compiles."""
        self.check("z", z, len(z))
        return self.compiled.execute(run, z, *arguments)
