"""Plans kept by what they depend on: a later call like an earlier one fills its own tensors in, and plans nothing.

A plan is a function of shapes, strides, types and numbers; the compiler also tells addresses that are multiples of 16
bytes from others. All of that is the key, so a plan that is found fits, and its kernels are compiled and loaded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from semantica.kernels import launch
from semantica.kernels.launch import LIMIT, Launch


class Kept(dict):
    """Plans by signature, forgotten with the others."""

    cache_clear = dict.clear


KEPT = Kept()
launch.forgettable(KEPT)
# whether kernels are left out
_idle = False


class Nothing:
    """In a kernel's place, compiled or not: starts nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Nothing":
        return self

    def __call__(self, *arguments, **options) -> "Nothing":
        return self


@contextmanager
def idle() -> Iterator[None]:
    """The processor's tensors are planned for as a GPU's, and nothing is started: to time the host. For one thread."""
    global _idle
    device, launch.DEVICE = launch.DEVICE, "cpu"
    _idle = True
    KEPT.clear()
    try:
        yield
    finally:
        launch.DEVICE, _idle = device, False
        KEPT.clear()


class Start:
    """A `Launch` without its tensors: the places of its arguments that a call fills."""

    def __init__(self, planned: Launch, slots: dict[int, int]):
        given = planned.arguments | planned.constants
        values = [given[name] for name in planned.kernel.arg_names]
        self.fill = [(place, slots[id(a)]) for place, a in enumerate(values) if isinstance(a, Tensor)]
        self.template = [None if isinstance(a, Tensor) else a for a in values]
        self.kernel, self.options = Nothing() if _idle else planned.kernel, planned.options
        self.grid = (*planned.grid, 1, 1)[:3]
        # of the compiled kernel, once it is
        self.runner: Callable | None = None

    def __call__(self, tensors: list) -> None:
        arguments = self.template.copy()
        for place, slot in self.fill:
            arguments[place] = tensors[slot]
        if self.runner is not None:
            self.runner(*arguments)
            return
        compiled = self.kernel[self.grid](*arguments, **self.options)
        # the interpreter compiles nothing
        if compiled is not None:
            self.runner = compiled[self.grid]


class Replay:
    """A plan without its tensors: what it allocates, what it starts, what it returns."""

    def __init__(self, launches: list[Launch], outputs: tuple[Tensor, ...], arguments: tuple):
        slots = {id(a): slot for slot, a in enumerate(arguments) if isinstance(a, Tensor)}
        self.buffers = []
        used = [a for planned in launches for a in planned.arguments.values() if isinstance(a, Tensor)]
        for a in (*used, *outputs):
            if id(a) not in slots:
                slots[id(a)] = len(arguments) + len(self.buffers)
                self.buffers.append((a.shape, a.stride(), a.dtype))
        self.starts = [Start(planned, slots) for planned in launches]
        self.outputs = [slots[id(a)] for a in outputs]

    def __call__(self, arguments: tuple) -> list[Tensor]:
        device = arguments[0].device
        tensors = [*arguments]
        for shape, stride, dtype in self.buffers:
            tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        if is_current(device):
            self.start(tensors)
        else:
            with torch.cuda.device(device):
                self.start(tensors)
        return [tensors[slot] for slot in self.outputs]

    def start(self, tensors: list) -> None:
        for start in self.starts:
            start(tensors)


class Allocates(TorchDispatchMode):
    """Notes whether anything is run beside allocations and views: such work belongs to the call, not to the plan."""

    only = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.only &= views or func.name().startswith(("aten::empty", "aten::new_empty"))
        return func(*args, **(kwargs or {}))


def run(plan: Callable, arguments: tuple) -> tuple[bool, list[Tensor]]:
    """Plan, or find the plan, and start it on the current stream.

    Args:
        plan: from `arguments` to launches and what they fill.
        arguments: tensors of one device and hashable values, a tensor first.

    Returns:
        Whether the plan takes the tensors as they are, without a copy; and what it fills.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False, traced(plan, arguments)
    key = signature(plan, arguments)
    found = KEPT.get(key)
    if found is None:
        # one tensor may come as several arguments, which other calls give several tensors
        apart = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        with Allocates() as allocates:
            launches, outputs = plan(*apart)
        found = Replay(launches, outputs, apart) if allocates.only and launches else False
        if len(KEPT) >= LIMIT:
            KEPT.clear()
        KEPT[key] = found
    return (True, found(arguments)) if found else (False, traced(plan, arguments))


def traced(plan: Callable, arguments: tuple) -> list[Tensor]:
    """Plan and start, visibly to a tracer."""
    launches, outputs = plan(*arguments)
    with torch.cuda.device_of(arguments[0]):
        launch.run(launches)
    return list(outputs)


def signature(plan: Callable, arguments: tuple) -> tuple:
    """What a plan, and the code that is compiled for it, depend on."""
    key: list[Any] = [plan, arguments[0].device]
    for a in arguments:
        if isinstance(a, Tensor):
            key += (a.shape, a.stride(), a.dtype, a.data_ptr() % 16 == 0)
        else:
            key.append(a)
    return tuple(key)


def is_current(device: torch.device) -> bool:
    """Whether what Triton starts goes to the device: changing the current one costs more than asking."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()
