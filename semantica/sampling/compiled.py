"""A `FastDenoiser` in the sampling loop: prepared before the first step, compiled, on a GPU replayed as one graph."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from semantica.condition import Condition, Stream
from semantica.device import current, pick_precision
from semantica.model.fast import FastDenoiser
from semantica.model.uvit import SIGMA_MIN, UViT
from semantica.sampling.graphs import GraphCache, Replays, flatten
from semantica.sampling.loop import Predict
from semantica.sampling.settings import Sampling
from semantica.solvers import alpha_sigma
from semantica.weak import Weak

# dynamo's limit on the shapes that compiled code is kept for
SHAPES = 64
# its configuration is the process's own, and so are its compilers
COMPILING = threading.RLock()


class CompiledDenoiser:
    """A `UViT` that samples whole runs faster: rearranged, compiled and in reduced precision; a `Denoiser`.

    Written for CPUs and CUDA. What is here for CUDA, the graphs above all, has not run on a GPU yet.

    Args:
        unet: on the device where sampling happens; it is copied. A single call is the network as it was. Or another
            denoiser with `fast(dtype)`, such as `semantica.fused.denoiser.UNetDenoiser`.
        dtype: of weights and activations; by default bf16 where the processor has instructions for it, else fp32.
        compile: "none", "blocks" (each block on its own: compiles sooner) or "network" (runs fastest).
        graphs: on CUDA, record the whole run as a graph for every kind of call, and use it where it is faster.
    """

    array, max_batch, joins = "torch", None, True
    refuses = {
        "steps": "an accelerated pipeline takes no callback: load it again without",
        "module": "an accelerated pipeline takes no guider that changes the network: load it again without",
        "gradients": "an accelerated pipeline gives no gradients: load it again without",
    }

    def __init__(
        self,
        unet: UViT,
        dtype: torch.dtype | None = None,
        compile: Literal["none", "blocks", "network"] = "network",
        graphs: bool = True,
    ):
        self.unet, self.device = unet, unet.device
        dtype = dtype or pick_precision("auto", self.device)
        # other networks than this package's bring a fast form of their own
        self.network = unet.fast(dtype) if hasattr(unet, "fast") else FastDenoiser(unet, dtype)
        self.dtype = self.network.dtype
        if compile == "network":
            self.network.compile(fullgraph=True, dynamic=False)
        elif compile == "blocks":
            for block in self.network.blocks:
                block.compile(fullgraph=True, dynamic=False)
        self.graphs = GraphCache(Replays(self.device).record) if graphs and self.device.type == "cuda" else None
        # kinds of runs whose code is compiled
        self.known: set[tuple] = set()
        for name in ("embedding", "first_blocks"):
            if hasattr(unet, name):
                setattr(self, name, getattr(unet, name))

    def __call__(self, z: Tensor, logsnr: Tensor, condition: Condition) -> Tensor:
        return self.unet(z, logsnr, condition)

    def condition(self, streams: Mapping[str, Stream]) -> Condition:
        return self.unet.condition(streams)

    def null(self, batch: int) -> Condition:
        return self.unet.null(batch)

    def predictor(self, levels: Tensor, condition: Condition, weak: Weak | None, settings: Sampling) -> Predict:
        """v by number of step, both branches in one call, with all that the steps share computed here.

        levels: log-SNR of every step and sample, `[steps, B]`.
        """
        net, levels, guided = self.network, levels[:, 0], settings.guided()
        alpha, sigma = alpha_sigma(levels)
        scale = torch.full_like(alpha, settings.guidance)
        scales = torch.stack((alpha, 1 / sigma.clamp(min=SIGMA_MIN), scale), 1)
        kinds = {}
        for both in sorted(set(guided)):
            other = weak if both else None
            kinds[both] = net.branches(condition, other), net.modulations(levels, condition, other)

        def predict(i: int, z: Tensor) -> Tensor:
            branches, modulations = kinds[guided[i]]
            return net(z, modulations[i], scales[i], branches(i))

        return predict

    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(
        self, run: Callable, z: Tensor, levels: Tensor, condition: Condition, weak: Weak | None, key: tuple | None
    ) -> Tensor:
        """`run(z, levels, condition, weak)`, the whole loop, or the replay of its graph.

        key: all that the run depends on but its tensors; None where it also reads something else, such as fresh noise.
        """
        tensors, rebuild = flatten(condition, weak)
        # inference tensors are other inputs to a compiler than ordinary ones, and graphs could not write into them
        z, levels, *tensors = (t.clone() if t.is_inference() else t for t in (z, levels, *tensors))
        given = z, levels, *tensors
        # what depends on fresh noise or somebody's hooks has no name to be known by
        kind = key and (*key, condition.sizes, weak and weak.kind)

        def function(z: Tensor, levels: Tensor, *rest: Tensor) -> Tensor:
            return run(z, levels, *rebuild(rest))

        with current(self.device), self.compiling(kind and (*kind, *map(layout, given))):
            return function(*given) if self.graphs is None or kind is None else self.graphs(kind, function, *given)

    @contextmanager
    def compiling(self, kind: tuple | None) -> Iterator[None]:
        """Around the first run of a kind: the compiler may keep as many shapes, and one thread at a time compiles."""
        if kind in self.known:
            yield
            return
        with COMPILING, torch._dynamo.config.patch(recompile_limit=SHAPES):
            yield
        if kind is not None:
            self.known.add(kind)


def layout(tensor: Tensor) -> tuple:
    """What compiled code depends on of a tensor, besides its values."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
