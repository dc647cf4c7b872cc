"""ONNX Runtime with tensors bound by address: for GPUs, where nothing may cross to the host between steps.

The binding is tested on a CPU; on CUDA, with the graphs that replay a whole step, it has not run yet.
"""

from dataclasses import dataclass

import onnxruntime
import torch
from safetensors.torch import load_file
from torch import Tensor

from semantica.engines.base import GraphEngine
from semantica.engines.bundle import CONDITION, DENOISE, NULL, Bundle
from semantica.engines.ort_session import session
from semantica.errors import UserError

# torch's element types by the name that ONNX Runtime gives to those of a graph, with ONNX's number
ELEMENTS = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(int64)": (torch.int64, 7),
}


def load(bundle: Bundle, device: str) -> "BoundEngine":
    """Raises `UserError` without a GPU, or where the installed ONNX Runtime has no CUDA."""
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is no CUDA device, or torch is a build without CUDA")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UserError(
            "this ONNX Runtime has no CUDA: pip uninstall onnxruntime, then pip install onnxruntime-gpu (never both)"
        )
    return BoundEngine(bundle, torch.device(device))


class BoundEngine(GraphEngine):
    """Two sessions that read and write tensors of their own, one set for each batch size, on one stream."""

    backend, array = "onnxruntime", "torch"

    def __init__(self, bundle: Bundle, device: torch.device):
        super().__init__(bundle)
        self.device, self.arithmetic = str(device), f"{bundle.precision}, as typed in the graph"
        self.denoiser, self.encoder = (BoundSession(bundle, name, device) for name in (DENOISE, CONDITION))
        self.null_arrays = {name: array.to(device) for name, array in load_file(bundle.folder / NULL).items()}


@dataclass(frozen=True)
class Buffers:
    """Tensors of a batch size by name, and the binding that holds their addresses."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    binding: onnxruntime.IOBinding
    options: onnxruntime.RunOptions


class BoundSession:
    """One graph: inputs are copied into its buffers, results are copied out of them.

    A CUDA graph has its addresses written into it, so that they must not change from one replay to the next.
    """

    def __init__(self, bundle: Bundle, name: str, device: torch.device):
        self.bundle, self.device = bundle, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        providers = ["CPUExecutionProvider"]
        if self.stream is not None:
            options = {
                "device_id": str(device.index or 0),
                "user_compute_stream": str(self.stream.cuda_stream),
                "enable_cuda_graph": "1",
            }
            providers = [("CUDAExecutionProvider", options)]
        self.session = session(bundle, name, providers)
        self.kept: dict[int, Buffers] = {}

    def buffers(self, batch: int) -> Buffers:
        if batch not in self.kept:
            binding, options, made = self.session.io_binding(), onnxruntime.RunOptions(), []
            for entries, bind in (
                (self.session.get_inputs(), binding.bind_input),
                (self.session.get_outputs(), binding.bind_output),
            ):
                tensors = {}
                for entry in entries:
                    dtype, element = ELEMENTS[entry.type]
                    shape = self.bundle.shape_of(entry.name, batch)
                    tensor = tensors[entry.name] = torch.empty(shape, dtype=dtype, device=self.device)
                    place = self.device.type, self.device.index or 0
                    bind(entry.name, *place, element, shape, tensor.data_ptr())
                made.append(tensors)
            if self.stream is not None:
                # a graph for each batch size; the host does not wait for a step
                options.add_run_config_entry("gpu_graph_id", str(batch))
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self.kept[batch] = Buffers(*made, binding, options)
        return self.kept[batch]

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = self.buffers(len(next(iter(inputs.values()))))
        if self.stream is None:
            return self.run(buffers, inputs)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            made = self.run(buffers, inputs)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return made

    def run(self, buffers: Buffers, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, own in buffers.inputs.items():
            own.copy_(inputs[name])
        self.session.run_with_iobinding(buffers.binding, buffers.options)
        return {name: own.clone() for name, own in buffers.outputs.items()}
