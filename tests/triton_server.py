"""Triton Inference Server, pretended: a repository's graphs in ONNX Runtime behind its `config.pbtxt`, and the module
`triton_python_backend_utils` that a model of the Python backend finds. What the server refuses is refused here."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

NUMPY = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64, "TYPE_UINT8": np.uint8}


def read_config(folder: Path) -> ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


class Tensor:
    def __init__(self, name: str, array: np.ndarray):
        assert isinstance(array, np.ndarray) and array.flags.c_contiguous
        self.named, self.array = name, array

    @staticmethod
    def from_dlpack(name: str, tensor) -> "Tensor":
        return Tensor(name, np.from_dlpack(tensor))

    def name(self) -> str:
        return self.named

    def as_numpy(self) -> np.ndarray:
        # the server gives memory of its own
        return self.array.copy()

    def __dlpack__(self, **options):
        return self.array.copy().__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Error:
    INVALID_ARG, INTERNAL, CANCELLED = "INVALID_ARG", "INTERNAL", "CANCELLED"

    def __init__(self, message: str, code: str = "INTERNAL"):
        self.text, self.kind = message, code

    def message(self) -> str:
        return self.text

    def code(self) -> str:
        return self.kind


class Response:
    def __init__(self, output_tensors, error: Error | None = None):
        self.tensors, self.failed = output_tensors, error

    def output_tensors(self):
        return self.tensors

    def has_error(self) -> bool:
        return self.failed is not None

    def error(self) -> Error | None:
        return self.failed


class Request:
    """A client's request. leaves: at which time of asking it is cancelled."""

    def __init__(self, leaves: int | None = None, **arrays: np.ndarray):
        self.arrays, self.leaves, self.asked = arrays, leaves, 0

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.arrays.items()]

    def is_cancelled(self) -> bool:
        self.asked += 1
        return self.leaves is not None and self.asked > self.leaves


class Server:
    """The models of a repository. calls: batch of each call, by model. broken: models that fail, at which call."""

    def __init__(self, folder: Path):
        self.folder, self.sessions, self.calls, self.broken = folder, {}, {}, {}
        self.configs = {path.name: read_config(path) for path in folder.iterdir()}
        for name, config in self.configs.items():
            if config.backend == "onnxruntime":
                path = folder / name / "1" / config.default_model_filename
                self.sessions[name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def check(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """What the server checks of every request before a backend sees it."""
        config = self.configs[name]
        given = {port.name: port for port in config.input}
        assert {port.name for port in config.input if not port.optional} <= set(arrays) <= set(given), name
        for key, array in arrays.items():
            port, shape = given[key], list(array.shape)
            assert array.dtype == NUMPY[DataType.Name(port.data_type)], (name, key, array.dtype)
            if config.max_batch_size:
                assert 1 <= shape.pop(0) <= config.max_batch_size, (name, key, array.shape)
            assert len(shape) == len(port.dims) and all(d in (-1, s) for d, s in zip(port.dims, shape)), (name, key)

    def call(self, name: str, arrays: dict[str, np.ndarray], outputs: list[str]) -> Response:
        self.check(name, arrays)
        made = self.calls.setdefault(name, [])
        made.append(len(next(iter(arrays.values()))))
        if self.broken.get(name) == len(made):
            return Response([], Error("out of memory"))
        session, batches = self.sessions[name], self.configs[name].max_batch_size > 0
        feeds = {}
        for port in self.configs[name].input:
            array = arrays[port.name]
            if port.HasField("reshape") and batches:
                array = array.reshape(len(array), *port.reshape.shape)
            # the backend hands scalars of models that do not batch over as such
            scalar = next(len(i.shape) == 0 for i in session.get_inputs() if i.name == port.name)
            feeds[port.name] = array.reshape(()) if scalar else array
        return Response([Tensor(*pair) for pair in zip(outputs, session.run(outputs, feeds))])

    def utilities(self) -> SimpleNamespace:
        """What a model of the Python backend imports."""

        def request(model_name, requested_output_names, inputs, preferred_memory):
            arrays = {tensor.name(): tensor.array for tensor in inputs}
            return SimpleNamespace(exec=lambda: self.call(model_name, arrays, requested_output_names))

        return SimpleNamespace(
            Tensor=Tensor, InferenceRequest=request, InferenceResponse=Response, TritonError=Error,
            TritonModelException=type("TritonModelException", (Exception,), {}),
            Logger=SimpleNamespace(log_error=print, log_warn=print), PreferredMemory=lambda *place: place,
            TRITONSERVER_MEMORY_CPU=0, TRITONSERVER_MEMORY_GPU=1,
        )  # fmt: skip

    def loop(self, name: str = "variations", kind: str = "CPU"):
        """The Python model of a name, initialised; its module is read from the repository. kind: of its instance."""
        path = self.folder / name / "1" / "model.py"
        sys.modules["triton_python_backend_utils"] = self.utilities()
        spec = importlib.util.spec_from_file_location("1.model", path)
        module = importlib.util.module_from_spec(spec)
        before = list(sys.path)
        try:
            # dataclasses ask for their module
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = before
        made = module.TritonPythonModel()
        config = json_format.MessageToDict(self.configs[name], preserving_proto_field_name=True)
        made.initialize(
            {"model_config": json.dumps(config), "model_instance_kind": kind, "model_instance_device_id": "0"}
        )
        return made

    def ask(self, model, *requests: Request) -> list[Response]:
        """What the scheduler does: requests are checked, and those of one batch are handed over together."""
        for request in requests:
            self.check("variations", request.arrays)
        return model.execute(list(requests))
