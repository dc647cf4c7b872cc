"""Engines: an exported model as a callable `(z, logsnr, condition) -> v`, whatever runs it.

`load_engine(bundle)` checks the bundle and loads one backend; only that backend's packages are imported.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from semantica.engines.base import Engine
from semantica.engines.bundle import Bundle, open_bundle
from semantica.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One way to run bundles.

    load: `(bundle, name, device) -> Engine`; what it imports is imported when it is called.
    packages: importable names that it needs. extra: of this distribution, which brings them; "" where none does.
    precisions: of the bundles that it runs, by the device that it runs them on. place: that in words.
    """

    name: str
    load: Callable[[Bundle, str, str], Engine]
    packages: tuple[str, ...]
    extra: str
    precisions: Mapping[str, tuple[str, ...]]
    place: str

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self.precisions)

    def missing(self) -> list[str]:
        """Packages that are needed and not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    @property
    def install(self) -> str:
        """The command that installs what is missing."""
        what = f'"semantica-diffusion[{self.extra}]"' if self.extra else " ".join(self.missing())
        return f"pip install {what}"

    def why_not(self) -> str:
        """Why it cannot be used here, and what to do; "" if it can."""
        absent = self.missing()
        return f"missing {', '.join(absent)}: {self.install}" if absent else ""


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> Backend:
    """Add a way to run bundles: then `load_engine`, the command line and `semantica doctor` know it by its name."""
    BACKENDS[backend.name] = backend
    return backend


def function_of(module: str) -> Callable[[Bundle, str, str], Engine]:
    """The function `load` of a module that is imported when it is called."""
    return lambda *arguments: importlib.import_module(module).load(*arguments)


ANY = ("fp32", "fp16", "bf16")
for backend in (
    Backend(
        "onnxruntime", function_of("semantica.engines.ort"), ("onnxruntime",), "export",
        {"cpu": ("fp32", "fp16"), "cuda": ANY}, "the CPU; onnxruntime-gpu: a GPU too",
    ),
    Backend(
        "torch", function_of("semantica.engines.network"), ("torch",), "",
        {"cpu": ANY, "cuda": ANY}, "the CPU or a GPU",
    ),
    Backend(
        "torch-compile", function_of("semantica.engines.compiled"), ("torch",), "",
        {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16")}, "the CPU or a GPU",
    ),
    Backend(
        "inductor", function_of("semantica.engines.inductor"), ("torch",), "",
        {"cpu": ("fp32", "bf16")}, "the CPU it was built on",
    ),
    Backend(
        "tensorrt", function_of("semantica.engines.trt"), ("tensorrt", "torch"), "tensorrt",
        {"cuda": ("fp16", "bf16")}, "an NVIDIA GPU",
    ),
    Backend(
        "tensorrt-rtx", function_of("semantica.engines.trt"), ("tensorrt_rtx", "torch"), "tensorrt-rtx",
        {"cuda": ("fp16", "bf16")}, "an NVIDIA GPU",
    ),
):  # fmt: skip
    register_backend(backend)


def gpu_here() -> bool:
    """Whether there is an NVIDIA GPU, without importing torch."""
    torch = sys.modules.get("torch")
    return any(Path("/dev").glob("nvidia[0-9]*")) or torch is not None and torch.cuda.is_available()


def version_of(package: str) -> str:
    """An installed package's version; "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def on_gpu() -> str:
    """How a bundle runs on the GPU with what is installed, or with which package it would."""
    if version_of("onnxruntime-gpu"):
        return "--engine onnxruntime --device cuda runs it there"
    if version_of("torch") and "+cpu" not in version_of("torch"):
        return "--engine torch --device cuda runs it there, pip install onnxruntime-gpu in place of onnxruntime also"
    return "it takes onnxruntime-gpu in place of onnxruntime, or a CUDA build of torch"


def load_engine(bundle: str | Path | Bundle, backend: str = "auto", device: str = "auto") -> Engine:
    """Load a bundle into a backend.

    Args:
        bundle: the folder that `semantica export` wrote; every file is checked against its hash first.
        backend: a name in `BACKENDS`, or "auto": ONNX Runtime for fp32 and fp16 bundles where it is installed and no
            GPU is asked for (a line in the log says so where there is one), and for quantised ones; otherwise torch. By
            name only: what `semantica build` made, and torch-compile, whose first run takes long.
        device: "cpu", "cuda" or "auto", for the backends that run on either; "auto" is the CPU for ONNX Runtime.

    Raises:
        UserError: the bundle or an engine in it cannot be used here, or a package is missing.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if backend == "auto":
        row = BACKENDS["onnxruntime"]
        fits = opened.precision in row.precisions["cpu"] and device in ("auto", "cpu") and not row.missing()
        backend = "onnxruntime" if fits or opened.quantised else "torch"
        if fits and device == "auto" and gpu_here():
            logger.warning(
                "auto: %s (%s) runs in ONNX Runtime on the CPU, though there is an NVIDIA GPU: %s; "
                "--device cpu says that the CPU is meant", opened.folder, opened.precision, on_gpu(),
            )  # fmt: skip
    if backend not in BACKENDS:
        raise UserError(f"engine {backend!r} is unknown: expected auto, {', '.join(BACKENDS)}")
    row = BACKENDS[backend]
    if row.missing():
        raise UserError(f"engine {backend!r} needs {', '.join(row.missing())}, not installed here: {row.install}")
    return row.load(opened, backend, device)


__all__ = ["BACKENDS", "Backend", "Bundle", "Engine", "load_engine", "open_bundle", "register_backend"]
