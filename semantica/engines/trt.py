"""TensorRT and TensorRT-RTX: one API in two packages. Not yet run on a GPU."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from semantica.engines import BACKENDS
from semantica.engines.base import GraphEngine
from semantica.engines.built import open_built
from semantica.engines.bundle import NULL, Bundle
from semantica.errors import UserError
from semantica.kernels.launch import architecture

FILES = {"encode": "condition.engine", "denoise": "denoise.engine"}


def load(bundle: Bundle, backend: str, device: str) -> "TensorRTEngine":
    """Raises `UserError` without a GPU, for an engine of another one, and as `open_built`."""
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(f"engine {backend!r} needs an NVIDIA GPU and a CUDA build of torch: use another --engine")
    place = torch.device("cuda" if device == "auto" else device)
    version = importlib.import_module(BACKENDS[backend].packages[0]).__version__
    return TensorRTEngine(bundle, *open_built(bundle, backend, architecture(place), version), place)


class TensorRTEngine(GraphEngine):
    """Two deserialised engines with one execution context each; everything stays on the device."""

    array = "torch"

    def __init__(self, bundle: Bundle, folder: Path, manifest: dict[str, Any], device: torch.device):
        super().__init__(bundle)
        self.backend, self.device = manifest["backend"], str(device)
        self.arithmetic = f"{bundle.precision}, as typed in the graph"
        trt = importlib.import_module(BACKENDS[self.backend].packages[0])
        self.max_batch = manifest["profile"]["max"]
        self.logger = trt.Logger(trt.Logger.WARNING)
        self.runtime = trt.Runtime(self.logger)
        paths = (folder / FILES[name] for name in ("encode", "denoise"))
        self.encoder, self.denoiser = (ExecutionContext(trt, self.runtime, path, device) for path in paths)
        self.null_arrays = {name: array.to(device) for name, array in load_file(bundle.folder / NULL).items()}


class ExecutionContext:
    """One engine: named tensors on the device in, new named tensors out."""

    def __init__(self, trt: ModuleType, runtime, path, device: torch.device):
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(f"{path} does not load in TensorRT {trt.__version__}: build it again on this machine")
        self.context, self.device = self.engine.create_execution_context(), device
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.dtypes = {name: dtype_of(trt, self.engine.get_tensor_dtype(name)) for name in self.names}
        self.outputs = [n for n in self.names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # held until the launch, so that no address belongs to a freed tensor
        held = {name: tensor.to(self.device, self.dtypes[name]).contiguous() for name, tensor in inputs.items()}
        for name, tensor in held.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            held[name] = torch.empty(shape, dtype=self.dtypes[name], device=self.device)
        for name, tensor in held.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise RuntimeError("TensorRT could not launch the engine")
        return {name: held[name] for name in self.outputs}


def dtype_of(trt: ModuleType, dtype) -> torch.dtype:
    table = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
    return {getattr(trt.DataType, name): made for name, made in table.items()}[dtype]
