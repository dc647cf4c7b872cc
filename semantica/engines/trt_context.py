"""Execution contexts of TensorRT: inputs bound once, a stream of their own, and no more of them than a bound."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from semantica import cache
from semantica.device import current
from semantica.errors import UserError

# TensorRT asks for it of every address; a row of a table of noise levels has less
ALIGNMENT = 256
# batch sizes that a session keeps contexts for, each with memory of its own
SHAPES = 4
Item = TypeVar("Item")


class Pool:
    """Things that one thread at a time may use: made when first needed, and no more than a limit."""

    def __init__(self, make: Callable[[], Item], limit: int):
        self.make, self.free = make, threading.BoundedSemaphore(limit)
        self.idle: deque[Item] = deque()
        self.making = threading.Lock()

    @contextmanager
    def lease(self) -> Iterator[Any]:
        """One of them; waits while all are in use."""
        with self.free:
            try:
                item = self.idle.pop()
            except IndexError:
                with self.making:
                    item = self.make()
            try:
                yield item
            finally:
                self.idle.append(item)


class Plan:
    """A deserialised engine: what its tensors are, and sessions over it. Not for two threads, but for `context`.

    kept: what its runtime cache depends on, where it has one (TensorRT-RTX compiles its kernels where they run).
    """

    def __init__(self, trt: ModuleType, runtime: Any, path: Path, device: torch.device, kept: Mapping[str, Any] | None):
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(f"{path} does not load in TensorRT {trt.__version__}: build it again on this machine")
        self.path, self.device, self.lock = path, device, threading.Lock()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.dtypes = {name: dtype_of(trt, self.engine.get_tensor_dtype(name)) for name in names}
        self.outputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self.config = self.cache = self.place = None
        if kept is not None:
            self.config = self.engine.create_runtime_config()
            # kernels for the shape itself at once, not some time later: a graph keeps those that it was recorded with
            self.config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self.cache, self.place = self.config.create_runtime_cache(), cache.path("tensorrt-rtx", kept)
            content = cache.read(self.place)
            # one of another environment is refused by it, and made again
            if content:
                self.cache.deserialize(content)
            self.config.set_runtime_cache(self.cache)

    def context(self) -> "Context":
        """A new execution context; the engine itself takes one thread at a time."""
        with self.lock, current(self.device):
            made = self.engine.create_execution_context(*([] if self.config is None else [self.config]))
        if made is None:
            raise UserError(f"{self.path}: no memory for an execution context: free some, or build for smaller batches")
        return Context(self, made)

    def keep(self) -> None:
        """Store what was compiled at first use, for the next process."""
        if self.cache is not None:
            with self.lock, current(self.device):
                content = bytes(self.cache.serialize())
            cache.write(self.place, content)

    def ready(self, name: str, tensor: Tensor) -> Tensor:
        """An input as the engine reads it: on its device, of its type, contiguous, at an aligned address."""
        tensor = tensor.to(self.device, self.dtypes[name]).contiguous()
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


class Context:
    """One execution context at one batch size: what stays from call to call is bound once."""

    def __init__(self, plan: Plan, context: Any):
        self.plan, self.context = plan, context
        self.fixed: Mapping[str, Tensor] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.results: dict[str, tuple[int, ...]] = {}

    def __call__(self, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor], stream: int) -> dict[str, Tensor]:
        # known again as the same object, whose tensors it holds: an address alone may belong to another by now
        if fixed is not self.fixed:
            self.bind(inputs, fixed)
        made = {
            name: torch.empty(shape, dtype=self.plan.dtypes[name], device=self.plan.device)
            for name, shape in self.results.items()
        }
        for name, tensor in (*inputs.items(), *made.items()):
            self.accepted(self.context.set_tensor_address(name, tensor.data_ptr()), name, tensor)
        if not self.context.execute_async_v3(stream):
            raise RuntimeError(f"TensorRT could not launch {self.plan.path}")
        return made

    def bind(self, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> None:
        self.fixed = None
        for name, tensor in (*inputs.items(), *fixed.items()):
            if self.shapes.get(name) != tuple(tensor.shape):
                self.accepted(self.context.set_input_shape(name, tuple(tensor.shape)), name, tensor)
                self.shapes[name] = tuple(tensor.shape)
        for name, tensor in fixed.items():
            self.accepted(self.context.set_tensor_address(name, tensor.data_ptr()), name, tensor)
        self.results = {name: tuple(self.context.get_tensor_shape(name)) for name in self.plan.outputs}
        self.fixed = fixed

    def accepted(self, answer: bool, name: str, tensor: Tensor) -> None:
        if not answer:
            raise UserError(f"{self.plan.path} takes no {name} of shape {tuple(tensor.shape)}: build it for this batch")


class Session:
    """Contexts for one thread at a time, one for each batch size.

    own: on a stream of their own, since TensorRT waits for the device on the default one; otherwise on the caller's.
    """

    def __init__(self, plan: Plan, own: bool = True):
        self.plan, self.contexts, self.fresh = plan, {}, False
        self.stream = torch.cuda.Stream(plan.device) if own and plan.device.type == "cuda" else None

    def __call__(self, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Results by name; fixed: inputs that stay for many calls, prepared by `Plan.ready`."""
        plan, batch = self.plan, len(next(iter(inputs.values())))
        with current(plan.device):
            inputs = {name: plan.ready(name, tensor) for name, tensor in inputs.items()}
            if batch not in self.contexts:
                self.contexts[batch], self.fresh = plan.context(), True
            return self.run(self.contexts[batch], inputs, {} if fixed is None else fixed)

    def run(self, context: Context, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = self.plan.device
        if device.type != "cuda":
            return context(inputs, fixed, 0)
        caller = torch.cuda.current_stream(device)
        if self.stream is None:
            return context(inputs, fixed, caller.cuda_stream)
        # the results' memory is the caller's, so that it is free again only after what the caller does with it
        self.stream.wait_stream(caller)
        made = context(inputs, fixed, self.stream.cuda_stream)
        caller.wait_stream(self.stream)
        return made

    def rest(self) -> None:
        """Between two uses: let go of the condition, keep what was compiled, and bound the contexts."""
        for context in self.contexts.values():
            context.fixed = None
        if self.fresh:
            self.fresh = False
            self.plan.keep()
            while len(self.contexts) > SHAPES:
                # a context must not go while it runs
                if self.stream is not None:
                    self.stream.synchronize()
                del self.contexts[next(iter(self.contexts))]


def dtype_of(trt: ModuleType, dtype: Any) -> torch.dtype:
    table = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
    return {getattr(trt.DataType, name): made for name, made in table.items()}[dtype]
