"""ONNX Runtime: on the CPU numpy arrays in and out, and no torch; for CUDA see `ort_bound`."""

from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

from semantica.condition import Condition
from semantica.engines.base import Engine, GraphEngine
from semantica.engines.bundle import CONDITION, DECODE, DENOISE, NULL, Bundle
from semantica.engines.ort_session import session
from semantica.errors import UserError

ARITHMETIC = {
    "fp32": "fp32",
    # ONNX Runtime's CPU kernels for half precision convert to fp32 and back
    "fp16": "fp32 between fp16 values",
}


def load(bundle: Bundle, backend: str, device: str) -> Engine:
    """Raises `UserError` for a precision or device that ONNX Runtime's CPU kernels do not have; as `ort_bound.load`."""
    if device.partition(":")[0] == "cuda":
        from semantica.engines import ort_bound

        return ort_bound.load(bundle, device)
    if bundle.precision not in ARITHMETIC:
        raise UserError(
            f"{bundle.folder} is {bundle.precision}, which ONNX Runtime cannot compute on a CPU: "
            "use --engine torch, or export fp32 or fp16"
        )
    if device not in ("auto", "cpu"):
        raise UserError(f"engine 'onnxruntime' runs on cpu or cuda, not on {device!r}: choose another --device")
    return OnnxRuntimeEngine(bundle)


class OnnxRuntimeEngine(GraphEngine):
    """Two sessions over a checked bundle."""

    backend, array = "onnxruntime", "numpy"

    def __init__(self, bundle: Bundle):
        super().__init__(bundle)
        self.arithmetic = bundle.computed(ARITHMETIC[bundle.precision])
        self.denoiser, self.encoder = (runner(session(bundle, name)) for name in (DENOISE, CONDITION))
        self.null_arrays = load_file(bundle.folder / NULL)
        if DECODE in bundle.manifest["files"]:
            self.decoder = runner(session(bundle, DECODE))

    def encode(self, inputs: Mapping[str, np.ndarray]) -> Condition:
        whole = {n: a.astype(np.float32, copy=False) if a.dtype.kind == "f" else a for n, a in inputs.items()}
        return super().encode(whole)


def runner(session: onnxruntime.InferenceSession) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """A session as a function of named arrays."""
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))
