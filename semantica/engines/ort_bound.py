"""ONNX Runtime with tensors bound by address: for GPUs, where nothing may cross to the host between steps.

Proved on a CPU and on devices that tests pretend; on CUDA itself it has not run yet.

ONNX Runtime's CUDA provider keeps recorded graphs, and handles of cuBLAS and cuDNN, for each thread that ever ran a
session. So each session has one thread that runs it, whichever asks: a batch size is recorded once and not by every
thread of a server.

It records at the first call, and in CUDA's global mode: what another thread of the process asks of CUDA meanwhile, such
as whether an event has come or a device is done, fails there and spoils the recording. This package's own recordings
wait for each other; of a server's other threads nothing is known here, so that each batch size is best called once
before they start. A size whose recording failed is launched kernel by kernel, which the log says.
"""

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import onnxruntime
import torch
from safetensors.torch import load_file
from torch import Tensor

from semantica.device import current, pick_device
from semantica.engines.base import GraphEngine
from semantica.engines.bundle import CONDITION, DECODE, DENOISE, NULL, Bundle
from semantica.engines.ort_session import CPU, CUDA, INSTALL, REFUSALS, session
from semantica.errors import UserError, first_line
from semantica.sampling.graphs import RECORDING

logger = logging.getLogger(__name__)
# batch sizes of a session that have buffers and a graph: ONNX Runtime never lets go of one
SHAPES = 8
# of an ONNX Runtime's graphs: none for this run
UNRECORDED = "-1"

# torch's element types by the name that ONNX Runtime gives to those of a graph, with ONNX's number
ELEMENTS = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(int64)": (torch.int64, 7),
}


def load(bundle: Bundle, device: str) -> "BoundEngine":
    """Raises `UserError` without such a GPU, or where the installed ONNX Runtime has no CUDA."""
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is no CUDA device, or torch is a build without CUDA")
    if CUDA not in onnxruntime.get_available_providers():
        raise UserError(f"this ONNX Runtime has no CUDA: {INSTALL}")
    return BoundEngine(bundle, pick_device(device))


def settings(device: torch.device, stream: int) -> dict[str, str]:
    """Options of the CUDA provider, https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html."""
    return {
        "device_id": str(device.index),
        "user_compute_stream": str(stream),
        # a whole step in one launch; a graph of which anything but shapes would be computed on the CPU is refused then
        "enable_cuda_graph": "1",
        # fp32 is held to what the parity gate measured in fp32
        "use_tf32": "0",
        # every algorithm timed once for each shape, before the graph is recorded that runs in all steps since
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        # by default its memory grows to powers of two, though every run of a size takes the same
        "arena_extend_strategy": "kSameAsRequested",
        # GroupNormalization is not there in that layout, and every convolution would be turned to and fro
        "prefer_nhwc": "0",
    }


class BoundEngine(GraphEngine):
    """Two sessions that read and write tensors of their own, one set for each batch size. Safe with several threads."""

    backend, array = "onnxruntime", "torch"

    def __init__(self, bundle: Bundle, device: torch.device):
        super().__init__(bundle)
        self.device, self.arithmetic = str(device), bundle.computed(f"{bundle.precision}, as typed in the graph")
        self.denoiser, self.encoder = (BoundSession(bundle, name, device) for name in (DENOISE, CONDITION))
        self.null_arrays = {name: array.to(device) for name, array in load_file(bundle.folder / NULL).items()}
        if DECODE in bundle.manifest["files"]:
            self.decoder = BoundSession(bundle, DECODE, device)

    def predict(self, z: Tensor, logsnr: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.denoiser({"z": z, "logsnr": logsnr}, inputs)["v"]


@dataclass
class Buffers:
    """Tensors of a batch size by name, and the binding that holds their addresses.

    fixed: the inputs of many calls that lie in them now, known again as the same object. settled: whether the next run
    records nothing.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    binding: onnxruntime.IOBinding
    options: onnxruntime.RunOptions
    fixed: Mapping[str, Tensor] | None = None
    settled: bool = False


class BoundSession:
    """One graph: inputs are copied into its buffers, results are copied out of them; one thread at a time.

    A CUDA graph has its addresses written into it, so that they must not change from one replay to the next. Everything
    runs on a stream of the session's own, which waits for the caller's and is waited for.
    """

    def __init__(self, bundle: Bundle, name: str, device: torch.device):
        self.bundle, self.device, self.lock = bundle, device, threading.Lock()
        self.kept: dict[int, Buffers] = {}
        with current(device):
            self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            self.runner = None if self.stream is None else ThreadPoolExecutor(1, f"onnxruntime-{name}")
            if self.stream is None:
                self.session = session(bundle, name, CPU)
            else:
                self.session = session(bundle, name, CUDA, settings(device, self.stream.cuda_stream))

    def __call__(self, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Results by name; fixed: inputs that stay for many calls, copied when another object comes."""
        batch = len(next(iter(inputs.values())))
        with self.lock, current(self.device):
            # the results' memory is the caller's, so that it is free again only after what the caller does with it
            made = {
                entry.name: torch.empty(
                    self.bundle.shape_of(entry.name, batch), dtype=ELEMENTS[entry.type][0], device=self.device
                )
                for entry in self.session.get_outputs()
            }
            if self.stream is None:
                self.run(batch, inputs, fixed, made)
                return made
            caller = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                self.run(batch, inputs, fixed, made)
            caller.wait_stream(self.stream)
            return made

    def run(
        self, batch: int, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor] | None, made: dict[str, Tensor]
    ) -> None:
        buffers = self.buffers(batch)
        given = dict(inputs)
        if fixed is not None and fixed is not buffers.fixed:
            buffers.fixed = None
            given |= fixed
        for name, tensor in given.items():
            buffers.inputs[name].copy_(tensor)
        if buffers.settled or not self.records(buffers):
            self.launch(buffers)
        buffers.fixed, buffers.settled = fixed, True
        for name, tensor in made.items():
            tensor.copy_(buffers.outputs[name])

    def records(self, buffers: Buffers) -> bool:
        """Run, and record the graph of all later runs; False where that fails: then nothing has run."""
        try:
            with RECORDING:
                self.launch(buffers)
        except (*REFUSALS, RuntimeError) as refused:
            said = "ONNX Runtime recorded no graph of this batch size (%s): it launches every kernel from now on"
            logger.warning(said, first_line(refused))
            buffers.options.add_run_config_entry("gpu_graph_id", UNRECORDED)
            return False
        return True

    def launch(self, buffers: Buffers) -> None:
        def work() -> None:
            # every thread has a current device of its own
            with current(self.device):
                self.session.run_with_iobinding(buffers.binding, buffers.options)

        if self.runner is None:
            work()
        else:
            self.runner.submit(work).result()

    def buffers(self, batch: int) -> Buffers:
        """Those of a batch size; of one more than `SHAPES`, for one run without a graph."""
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
            keeps = len(self.kept) < SHAPES
            if self.stream is not None:
                # a graph for each batch size; the host does not wait for a step
                options.add_run_config_entry("gpu_graph_id", str(batch) if keeps else UNRECORDED)
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            buffers = Buffers(*made, binding, options, settled=self.stream is None or not keeps)
            if not keeps:
                return buffers
            self.kept[batch] = buffers
        return self.kept[batch]
