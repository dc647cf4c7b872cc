"""Engines: an exported model as a callable `(z, logsnr, condition) -> v`, whatever runs it.

`load_engine(bundle)` checks the bundle and loads one backend; only that backend's packages are imported.
"""

import importlib
import importlib.util
from pathlib import Path

from semantica.engines.base import Engine
from semantica.engines.bundle import Bundle, open_bundle
from semantica.errors import UserError

# backend -> (module of this package, importable packages that it needs, extra that brings them)
BACKENDS = {
    "onnxruntime": ("semantica.engines.ort", ("onnxruntime",), "export"),
    "torch": ("semantica.engines.network", ("torch",), ""),
    "torch-compile": ("semantica.engines.compiled", ("torch",), ""),
    "inductor": ("semantica.engines.inductor", ("torch",), ""),
    "tensorrt": ("semantica.engines.trt", ("tensorrt", "torch"), "tensorrt"),
    "tensorrt-rtx": ("semantica.engines.trt", ("tensorrt_rtx", "torch"), "tensorrt-rtx"),
}


def load_engine(bundle: str | Path | Bundle, backend: str = "auto", device: str = "auto") -> Engine:
    """Load a bundle into a backend.

    Args:
        bundle: the folder that `semantica export` wrote; every file is checked against its hash first.
        backend: one of `BACKENDS`, or "auto": ONNX Runtime for fp32 and fp16 bundles where it is installed and no GPU
            is asked for, otherwise torch. By name only: what `semantica build` made, and torch-compile, whose first
            run takes long.
        device: "cpu", "cuda" or "auto", for the backends that run on either; "auto" is the CPU for ONNX Runtime.

    Raises:
        UserError: the bundle or an engine in it cannot be used here, or a package is missing.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if backend == "auto":
        fits = opened.precision != "bf16" and device in ("auto", "cpu") and not missing("onnxruntime")
        backend = "onnxruntime" if fits else "torch"
    if backend not in BACKENDS:
        raise UserError(f"engine {backend!r} is unknown: expected auto, {', '.join(BACKENDS)}")
    absent = missing(backend)
    if absent:
        extra = BACKENDS[backend][2]
        how = f'pip install "semantica-diffusion[{extra}]"' if extra else f"pip install {' '.join(absent)}"
        raise UserError(f"engine {backend!r} needs {', '.join(absent)}, not installed here: {how}")
    return importlib.import_module(BACKENDS[backend][0]).load(opened, backend, device)


def missing(backend: str) -> list[str]:
    """Packages that a backend needs and that are not installed."""
    return [name for name in BACKENDS[backend][1] if importlib.util.find_spec(name) is None]


__all__ = ["BACKENDS", "Bundle", "Engine", "load_engine", "missing", "open_bundle"]
