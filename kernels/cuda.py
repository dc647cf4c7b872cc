"""CUDA kernels beside Triton's: whether a card runs those of `semantica._cuda`, and which of the two serves a call.

The choice is a table, `choice.json` in an operator's folder: for each direction and architecture ranges of sizes, as
they were measured. Triton serves what no row names, and what the CUDA kernels cannot compute.
"""

import functools
import json
from pathlib import Path
from types import ModuleType

import torch

try:
    from semantica import _cuda
except ImportError:
    _cuda = None


def module() -> ModuleType | None:
    """`semantica._cuda`, None where it is not built."""
    return _cuda


@functools.cache
def code(device: torch.device) -> tuple[int, str]:
    """The architecture of the code that a card runs, such as 90, and ""; or 0, and why it runs none of it."""
    if (built := module()) is None:
        return 0, "semantica._cuda is not built"
    try:
        return built.code(torch.cuda.current_device() if device.index is None else device.index), ""
    # an old driver, a card that there is no code for, no card
    except built.CudaError as error:
        return 0, str(error)


@functools.cache
def choice(path: Path) -> dict[str, dict[str, list[dict]]]:
    """Rows by direction and architecture: `layout` ("contiguous" or "channels_last"), `bytes` [from, to], `use`."""
    return json.loads(path.read_text())


def chosen(path: Path, direction: str, arch: str, layout: str | None, size: int) -> bool:
    """Whether the table says that CUDA serves a call: on an architecture, of a layout, of so many bytes."""
    rows = choice(path)[direction].get(arch, ())
    fits = (row for row in rows if row["layout"] == layout and row["bytes"][0] <= size <= row["bytes"][1])
    return next((row["use"] == "cuda" for row in fits), False)


def has_rows(path: Path) -> bool:
    """Whether CUDA kernels are built, and any call may be theirs."""
    return module() is not None and any(choice(path)[direction] for direction in ("forward", "backward"))


def status(path: Path) -> str:
    """For the user: whether CUDA kernels serve an operator, and why."""
    if module() is None:
        return "CUDA kernels are not built"
    if not has_rows(path):
        return "CUDA kernels are built and serve no call: not yet measured on a GPU"
    measured = sorted({arch for direction in ("forward", "backward") for arch in choice(path)[direction]})
    return f"CUDA kernels serve sizes measured on {', '.join(measured)}"
