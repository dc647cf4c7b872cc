"""Whole sampling runs as CUDA graphs: recorded on the device of their tensors, checked once, kept where faster."""

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from semantica.condition import Condition
from semantica.errors import UserError, first_line
from semantica.ranges import span
from semantica.weak import Weak

logger = logging.getLogger(__name__)

# graphs that a cache keeps
BUCKETS = 8
# what is compiled, tuned or allocated at first use must be so before recording
WARM_UPS = 3
# root mean square of the difference of replay and call over that of the call; equal kernels that are split otherwise
# stay far below, a replay of something else is around 1
AGREEMENT = 0.05
# a capture may not meet another thread's synchronisation or capture
RECORDING = threading.Lock()


def flatten(condition: Condition, weak: Weak | None) -> tuple[list[Tensor], Callable]:
    """All tensors of both branches, and the function that puts them back."""
    tensors: list[Tensor] = []

    def collect(t: Tensor) -> int:
        tensors.append(t)
        return len(tensors) - 1

    places = [c if c is None else c.map(collect) for c in (condition, weak)]
    return tensors, lambda given: [p if p is None else p.map(lambda i: given[i]) for p in places]


class Replays:
    """What the graphs of one cache share: they run one after the other, on one stream, with one pool of memory."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.holder: torch.cuda.CUDAGraph | None = None

    def record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> "CudaGraph":
        """Raises what the function or its capture raised: nothing of it runs any more then, and others may be made."""
        try:
            if self.holder is None:
                self.hold()
            return CudaGraph(self, function, inputs)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Wait for what was begun, and leave the pool to the graphs that are in it already.

        Where a capture fails, torch's allocator takes it for one that goes on: it refuses the next one in that pool,
        and keeps whatever two streams have used until the capture ends.
        """
        self.holder = None
        with suppress(RuntimeError):
            self.stream.synchronize()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            # the failed graph's share, which it gives back only after a capture that ended
            torch._C._cuda_releasePool(self.device.index, self.pool)

    def hold(self) -> None:
        """Make the pool, with an empty graph in it: torch takes no pool again whose graphs have all gone."""
        self.pool, self.holder = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            # that it is empty
            warnings.simplefilter("ignore")
            with torch.cuda.device(self.device), self.capture(self.holder):
                pass

    def capture(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        # other threads go on allocating meanwhile
        return torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")


class CudaGraph:
    """A function of tensors as one CUDA graph: inputs are copied into its own buffers, the result is copied out.

    Everything runs on the stream of `shared`, which waits for the caller's and is waited for: calls from several
    threads find the buffers free, as long as each is made whole before the next (`GraphCache` has a lock for that).
    """

    def __init__(self, shared: Replays, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.shared, device = shared, shared.device
        with torch.cuda.device(device):
            caller, own = torch.cuda.current_stream(device), shared.stream
            own.wait_stream(caller)
            with torch.cuda.stream(own):
                self.inputs = [t.clone() for t in inputs]
                for _ in range(WARM_UPS):
                    function(*self.inputs)
                self.graph = torch.cuda.CUDAGraph()
                with shared.capture(self.graph):
                    self.output = function(*self.inputs)
            caller.wait_stream(own)

    def __call__(self, *inputs: Tensor) -> Tensor:
        own, device = self.shared.stream, self.shared.device
        with torch.cuda.device(device):
            caller = torch.cuda.current_stream(device)
            # of the caller's stream, so that its memory is free again only after what the caller does with it
            made = torch.empty_like(self.output)
            own.wait_stream(caller)
            with torch.cuda.stream(own):
                for buffer, given in zip(self.inputs, inputs, strict=True):
                    buffer.copy_(given, non_blocking=True)
                self.graph.replay()
                made.copy_(self.output, non_blocking=True)
            caller.wait_stream(own)
        return made


def drain(device: torch.device) -> None:
    """Wait for all that a device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Tensor]) -> float:
    """The shortest of three calls, on the wall."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        drain(call().device)
        found.append(time.perf_counter() - began)
    return min(found)


def disagreement(call: Callable[..., Tensor], replay: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Relative root mean square by which a replay differs from the call, on other values than it was recorded with."""
    other = [-t if t.is_floating_point() else t for t in inputs]
    expected, actual = (f(*other).double() for f in (call, replay))
    if not expected.isfinite().any():
        # nothing to tell one replay from another by
        return math.inf
    alike = (expected == actual) | (expected.isnan() & actual.isnan())
    error = torch.where(alike, 0.0, actual - expected).square().mean().sqrt()
    scale = expected.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()
    return float(error / scale.clamp(min=1e-12))


class GraphCache:
    """One graph for each kind of call, kept where its replay is faster than the call; the kind that was not asked for
    for longest goes first.

    Recording and proving a kind costs some twelve runs at its first call, so a server offers a few kinds (settings,
    sizes) rather than any. Safe with several threads: one records or replays at a time.

    Args:
        record: makes a graph of a function and its inputs.
        measure: seconds that a call takes.
        limit: of kinds that are kept.
    """

    def __init__(
        self,
        record: Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Callable[..., Tensor]],
        measure: Callable[[Callable[[], Tensor]], float] = seconds,
        limit: int = BUCKETS,
    ):
        self.record, self.measure, self.limit = record, measure, limit
        self.kept: dict[tuple, Callable | None] = {}
        self.times: dict[tuple, tuple[float, float]] = {}
        self.lock = threading.Lock()

    def __call__(self, key: tuple, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, by replay. `key`: all that the function depends on but the values of its inputs."""
        key = (*key, *((tuple(t.shape), t.dtype) for t in inputs))
        with self.lock:
            if key in self.kept:
                # now the last to go
                self.kept[key] = self.kept.pop(key)
            else:
                # a function that lost to its replay is not kept: it holds this call's condition
                self.kept[key] = self.proven(key, function, inputs)
                while len(self.kept) > self.limit:
                    self.forget(next(iter(self.kept)), inputs)
            graph = self.kept[key]
            if graph is not None:
                with span("replay"):
                    return graph(*inputs)
        return function(*inputs)

    def proven(self, key: tuple, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable | None:
        """A graph that gives what the call gives, and sooner; else None, and a line in the log if it is a wrong one."""
        with RECORDING:
            try:
                graph = self.record(function, inputs)
                error = disagreement(function, graph, inputs)
                if not error <= AGREEMENT:
                    said = "the CUDA graph of this run differs from the run itself by %.2g: it is not used"
                    logger.warning(said, error)
                    return None
                self.times[key] = self.measure(lambda: function(*inputs)), self.measure(lambda: graph(*inputs))
            # what is the caller's own mistake is raised once more by the run itself
            except (RuntimeError, UserError) as refused:
                # the end of a failed capture says no more than that it failed
                cause = refused.__context__ or refused
                logger.warning("no CUDA graph of this run (%s): it goes on without", first_line(cause))
                return None
        return graph if self.times[key][1] < self.times[key][0] else None

    def forget(self, key: tuple, inputs: tuple[Tensor, ...]) -> None:
        """Drop a graph that may still run, on the device of these inputs: its memory and its contexts go with it."""
        if self.kept[key] is not None:
            # no other cache's capture may meet it
            with RECORDING:
                drain(inputs[0].device)
        del self.kept[key]
        self.times.pop(key, None)

    def clear(self) -> None:
        """Forget every graph, as when what they read has changed; none of them may still run."""
        with self.lock:
            self.kept.clear()
            self.times.clear()
