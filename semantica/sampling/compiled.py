"""A `FastDenoiser` in the sampling loop: prepared before the first step, compiled, on a GPU replayed as one graph."""

import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from semantica.condition import Condition, Stream
from semantica.device import pick_precision
from semantica.model.fast import FastDenoiser
from semantica.model.uvit import SIGMA_MIN, UViT
from semantica.sampling.loop import Predict
from semantica.sampling.settings import Sampling
from semantica.solvers import alpha_sigma

# graphs that a sampler keeps, each with its own memory; dynamo's limit on the shapes that compiled code is kept for
BUCKETS, SHAPES = 8, 64


class CompiledDenoiser:
    """A `UViT` that samples whole runs faster: rearranged, compiled and in reduced precision; a `Denoiser`.

    Written for CPUs and CUDA. What is here for CUDA, the graphs above all, has not run on a GPU yet.

    Args:
        unet: on the device where sampling happens; it is copied. A single call is the network as it was.
        dtype: of weights and activations; by default bf16 where the processor has instructions for it, else fp32.
        compile: "none", "blocks" (each block on its own: compiles sooner) or "network" (runs fastest).
        graphs: on CUDA, record the whole run as a graph for every kind of call, and use it where it is faster.
    """

    array, max_batch, joins = "torch", None, True
    refuses = dict.fromkeys(
        ("steps", "module", "gradients"),
        "an accelerated pipeline takes no guider and no callback: load it again without",
    )

    def __init__(
        self,
        unet: UViT,
        dtype: torch.dtype | None = None,
        compile: Literal["none", "blocks", "network"] = "network",
        graphs: bool = True,
    ):
        self.unet, self.device = unet, unet.device
        self.network = FastDenoiser(unet, dtype or pick_precision("auto", self.device))
        self.dtype = self.network.dtype
        if compile == "network":
            self.network.compile(fullgraph=True, dynamic=False)
        elif compile == "blocks":
            for block in chain(*self.network.net.blocks):
                block.compile(fullgraph=True, dynamic=False)
        self.graphs = GraphCache() if graphs and self.device.type == "cuda" else None

    def __call__(self, z: Tensor, logsnr: Tensor, condition: Condition) -> Tensor:
        return self.unet(z, logsnr, condition)

    def condition(self, streams: Mapping[str, Stream]) -> Condition:
        return self.unet.condition(streams)

    def null(self, batch: int) -> Condition:
        return self.unet.null(batch)

    def predictor(self, levels: Tensor, condition: Condition, null: Condition | None, settings: Sampling) -> Predict:
        """v by number of step, both branches in one call, with all that the steps share computed here.

        levels: log-SNR of every step and sample, `[steps, B]`.
        """
        net, levels, guided = self.network, levels[:, 0], settings.guided()
        alpha, sigma = alpha_sigma(levels)
        scale = torch.full_like(alpha, settings.guidance)
        scales = torch.stack((alpha, 1 / sigma.clamp(min=SIGMA_MIN), scale), 1)
        kinds = {}
        for both in sorted(set(guided)):
            other = null if both else None
            kinds[both] = net.prepare(condition, other), net.modulations(levels, condition, other)

        def predict(i: int, z: Tensor) -> Tensor:
            branches, modulations = kinds[guided[i]]
            return net(z, modulations[i], scales[i], branches)

        return predict

    @torch.no_grad()
    def execute(
        self, run: Callable, z: Tensor, levels: Tensor, condition: Condition, null: Condition | None, key: tuple | None
    ) -> Tensor:
        """`run(z, levels, condition, null)`, the whole loop, or the replay of its graph.

        key: all that the run depends on but its tensors; None where it also reads something else, such as fresh noise.
        """
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            if self.graphs is None or key is None:
                return run(z, levels, condition, null)
            # a null condition on the host would be copied by every call
            tensors, rebuild = flatten(condition, null)
            key = (*key, condition.sizes, null and null.sizes)
            return self.graphs(key, lambda z, levels, *rest: run(z, levels, *rebuild(rest)), z, levels, *tensors)


def flatten(condition: Condition, null: Condition | None) -> tuple[list[Tensor], Callable]:
    """All tensors of both conditions, and the function that puts them back."""
    tensors: list[Tensor] = []

    def collect(t: Tensor) -> int:
        tensors.append(t)
        return len(tensors) - 1

    places = [c if c is None else c.map(collect) for c in (condition, null)]
    return tensors, lambda given: [p if p is None else p.map(lambda i: given[i]) for p in places]


class CudaGraph:
    """A function of tensors as one CUDA graph: inputs are copied into its own buffers, the result is copied out."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.inputs = [t.clone() for t in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # what is compiled, tuned or allocated at first use must be so before recording
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()


def seconds(call: Callable[[], Tensor]) -> float:
    """The shortest of three calls, on the wall."""
    found = []
    for _ in range(3):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


class GraphCache:
    """One graph for each kind of call, kept where its replay is faster than the call; the oldest kind goes first.

    Args:
        record: makes a graph of a function and its inputs.
        measure: seconds that a call takes.
    """

    def __init__(self, record: Callable = CudaGraph, measure: Callable[[Callable[[], Tensor]], float] = seconds):
        self.record, self.measure = record, measure
        self.kept: dict[tuple, Callable] = {}
        self.times: dict[tuple, tuple[float, float]] = {}

    def __call__(self, key: tuple, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, by replay. `key`: all that the function depends on but the values of its inputs."""
        key = (*key, *((tuple(t.shape), t.dtype) for t in inputs))
        if key not in self.kept:
            while len(self.kept) >= BUCKETS:
                oldest = next(iter(self.kept))
                del self.kept[oldest], self.times[oldest]
            graph = self.record(function, inputs)
            self.times[key] = self.measure(lambda: function(*inputs)), self.measure(lambda: graph(*inputs))
            # a function that lost to its replay is not kept: it holds this call's condition
            self.kept[key] = graph if self.times[key][1] < self.times[key][0] else None
        return (self.kept[key] or function)(*inputs)
