"""One kernel launch as a value: planned from shapes alone, so that it can be run, traced or only compiled."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Triton's own switch, read where Triton reads it: when it is first imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
AVAILABLE = util.find_spec("triton") is not None
# where the Triton kernels are registered: nowhere without Triton
DEVICE = None if not AVAILABLE else "cpu" if INTERPRETED else "cuda"


@dataclass(frozen=True)
class Launch:
    """A Triton kernel with everything it is started with.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along up to three axes.
        arguments: run-time arguments by name: tensors, numbers or None.
        constants: `tl.constexpr` arguments by name.
        warps, stages: `num_warps` and `num_stages`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    warps: int
    stages: int = 1

    def run(self) -> None:
        """Start it. Visible to `make_fx`, so that a compiler can see the kernel."""
        kernel = torch.library.wrap_triton(self.kernel)
        kernel[self.grid](**self.arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's own."""
        # stated, since the default of fusing products with sums changes between versions
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def run(launches: Iterable[Launch]) -> None:
    """Start them one after the other, on the current stream."""
    for launch in launches:
        launch.run()


# files of launch settings by operator
LADDERS: dict[str, Path] = {}


@functools.cache
def table(operator: str) -> dict[str, dict[str, list[dict]]]:
    """Launch settings of an operator by kernel, then by architecture ("default" for those not tuned): ladders of rows.

    Tuned offline and shipped: nothing is tuned at run time.
    """
    return json.loads(LADDERS[operator].read_text())


# plans that a function keeps: programs whose shapes never repeat must not fill the memory
LIMIT = 4096
# functions that remember what they planned with the tables
_planned: list = []


def planned(function: Callable) -> Callable:
    """`functools.lru_cache` for a function that reads launch settings."""
    cached = functools.lru_cache(maxsize=LIMIT)(function)
    forgettable(cached)
    return cached


def forgettable(cached: Any) -> None:
    """Plans to be forgotten, by `cache_clear`, when the settings change."""
    _planned.append(cached)


@contextmanager
def trial(operator: str, content: dict) -> Iterator[None]:
    """Plan with another table than the shipped one, as a tuner does. For one thread: the table is the process's."""
    used = table(operator)
    shipped = dict(used)

    def use(ladders: dict) -> None:
        used.clear()
        used.update(ladders)
        forget_plans()

    use(content)
    try:
        yield
    finally:
        use(shipped)


def forget_plans() -> None:
    for cached in _planned:
        cached.cache_clear()


# the architecture that is planned for without a GPU
_target: str | None = None


@contextmanager
def target(arch: str) -> Iterator[None]:
    """Plan with an architecture's own ladders where there is no such GPU, as to compile for it. For one thread."""
    global _target
    before, _target = _target, arch
    forget_plans()
    try:
        yield
    finally:
        _target = before
        forget_plans()


def settings(operator: str, kernel: str, width: int, device: torch.device) -> dict:
    """The first row of the kernel's ladder whose `width` is at least the given one, else the last row."""
    ladders = table(operator)[kernel]
    ladder = ladders.get(architecture(device), ladders["default"])
    return next((row for row in ladder if width <= row["width"]), ladder[-1])


def architecture(device: torch.device) -> str:
    """Such as "sm_90"; where there is no NVIDIA GPU, the one that is planned for (`target`), or "default"."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _target or "default"
    return _capability(device)


@functools.cache
def modern(device: torch.device) -> bool:
    """Whether a device runs the kernels for GPUs: of NVIDIA's from compute capability 8.0 on, the first with bf16."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
