"""A graph of a bundle in ONNX Runtime."""

from collections.abc import Mapping

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from semantica.engines.bundle import Bundle
from semantica.errors import UserError, first_line

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL = (
    "pip uninstall onnxruntime, then pip install onnxruntime-gpu (never both), for the CUDA and cuDNN that torch brings"
)
REFUSALS = (
    errors.EPFail,
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NoSuchFile,
    errors.NotImplemented,
    errors.RuntimeException,
)


def session(
    bundle: Bundle, name: str, provider: str = CPU, settings: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """A graph on one execution provider with its settings.

    Raises `UserError` for a graph that does not load there, and where ONNX Runtime would compute elsewhere instead.
    """
    options, path = onnxruntime.SessionOptions(), bundle.for_onnx_runtime(name)
    # warnings about graphs that run are not for the user; what fails is raised
    options.log_severity_level = 3
    try:
        # without the second attempt, on the CPU, that ONNX Runtime makes of its own accord
        made = onnxruntime.InferenceSession(
            path, options, providers=[provider], provider_options=[dict(settings or {})], enable_fallback=0
        )
    except (*REFUSALS, RuntimeError, ValueError) as error:
        raise UserError(f"ONNX Runtime cannot load {path}{where(provider)}: {first_line(error)}") from error
    there = made.get_providers()
    # a provider whose libraries are missing is left out with no more than a warning
    if provider not in there:
        raise UserError(f"ONNX Runtime has {', '.join(there)} for {path} and no {provider}: {INSTALL}")
    return made


def where(provider: str) -> str:
    return "" if provider == CPU else f" with {provider} (a bundle of an older version? export it again)"
