"""Forward and backward pass of a step as one CUDA graph, for models whose kernels run shorter than they take to launch.

What a step then costs the host is one launch and what comes after it: clipping, AdamW and averages, a few launches for
all weights together.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from semantica.device import numbered
from semantica.errors import ArtifactError, first_line

# what is tuned, compiled or allocated at first use must be so before recording
WARMUP = 3
# of a replayed loss and gradient norm, against the call: in bf16 sums may be in another order
TOLERANCE = 2e-2

Pass = Callable[..., tuple[Tensor, ...]]


class StepGraph:
    """A function that adds to gradients, recorded at its first call and replayed from then on.

    Inputs are copied into buffers of its own and results out of them. Gradients stay where they are: after an update
    they have to be zeroed, not dropped.

    Args:
        function: tensors (or trees of them, None among them) of the same shapes each time -> tensors; without reading
            any value. Its first result is the loss.
        parameters: what it may add gradients to.
        record: `function()` -> its results, which each replay overwrites, and the replay.

    Raises:
        ArtifactError: on the first call, where it cannot be recorded, or a replay does not compute what the call
            computes.
    """

    def __init__(self, function: Pass, parameters: Iterable[nn.Parameter], device: torch.device, record=None):
        self.function, self.parameters, self.device = function, list(parameters), device
        self.record = record or cuda_graph
        self.replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        tensors, shape = tree_flatten(inputs)
        if self.replay is None:
            self._prepare(tensors, shape)
        for own, given in zip(self.inputs, tensors, strict=True):
            if own is not None:
                own.copy_(given, non_blocking=True)
        self.replay()
        return tuple(result.clone() for result in self.results)

    def _prepare(self, tensors: list[Tensor | None], shape: Any) -> None:
        self.inputs = [t if t is None else t.clone() for t in tensors]

        def run() -> tuple[Tensor, ...]:
            return self.function(*tree_unflatten(self.inputs, shape))

        before = [p.grad for p in self.parameters]
        # random numbers of the step that follows are those of a step without recording
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            expected = self._warm(run)
            # a parameter that no gradient reaches must have none, or weight decay would move it
            self.reached = [p for p in self.parameters if p.grad is not None]
            for p in self.reached:
                p.grad = torch.zeros_like(p)
            self.results, self.replay = self._recorded(run)
            self._zero()
            torch.manual_seed(0)
            self.replay()
            actual = self._figures(self.results)
        self._check(expected, actual)
        self._zero()
        held = {id(p): gradient for p, gradient in zip(self.parameters, before) if gradient is not None}
        for p in self.reached:
            if id(p) in held:
                p.grad.add_(held[id(p)])

    def _recorded(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        try:
            return self.record(run)
        except torch.OutOfMemoryError:
            raise
        # what a recording forbids comes as errors of the device, which is as good as before
        except RuntimeError as refused:
            # the end of a failed recording says no more than that it failed
            cause = first_line(refused.__context__ or refused)
            raise ArtifactError(f"the step cannot be recorded ({cause}): leave out --graph") from refused

    def _warm(self, run: Callable[[], tuple[Tensor, ...]]) -> list[float]:
        """Loss and gradient norm of a call."""
        for _ in range(WARMUP):
            for p in self.parameters:
                p.grad = None
            torch.manual_seed(0)
            results = on_side_stream(run, self.device)
        return self._figures(results)

    def _figures(self, results: tuple[Tensor, ...]) -> list[float]:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return [results[0].item(), torch.nn.utils.get_total_norm(gradients).item()]

    def _check(self, expected: list[float], actual: list[float]) -> None:
        for what, wanted, found in zip(("loss", "gradient norm"), expected, actual):
            # of a scaled loss in fp16 both may overflow, into infinities or NaN
            alike = not (math.isfinite(found) or math.isfinite(wanted))
            # written so that NaN fails
            if not alike and not abs(found - wanted) <= TOLERANCE * abs(wanted):
                self.replay = None
                said = f"the recorded step's {what} is {found:.6g}, the call's {wanted:.6g}"
                raise ArtifactError(f"{said}: leave out --graph")

    def _zero(self) -> None:
        torch._foreach_zero_([p.grad for p in self.reached])


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A GPU's one stream for warm-ups and recordings: for each stream and thread cuBLAS keeps a workspace, of 32 MiB
    on Hopper."""
    return torch.cuda.Stream(device)


def on_side_stream(run: Callable, device: torch.device) -> Any:
    """As graphs are recorded: what is cached for each stream is then ready."""
    if device.type != "cuda":
        return run()
    stream = side_stream(numbered(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        results = run()
    torch.cuda.current_stream(device).wait_stream(stream)
    return results


def cuda_graph(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """What a function enqueues, recorded. Not yet run on a GPU."""
    graph, stream = torch.cuda.CUDAGraph(), side_stream(numbered(torch.device("cuda")))
    # the loader's thread pins memory meanwhile, which would end a recording that counts other threads' calls
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = run()
    return results, graph.replay
