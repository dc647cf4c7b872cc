"""A graph of a bundle in ONNX Runtime."""

import os
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
    path = bundle.for_onnx_runtime(name)
    try:
        # without the second attempt, on the CPU, that ONNX Runtime makes of its own accord
        made = onnxruntime.InferenceSession(
            path, options(), providers=[provider], provider_options=[dict(settings or {})], enable_fallback=0
        )
    except (*REFUSALS, RuntimeError, ValueError) as error:
        raise UserError(f"ONNX Runtime cannot load {path}{where(provider)}: {first_line(error)}") from error
    there = made.get_providers()
    # a provider whose libraries are missing is left out with no more than a warning
    if provider not in there:
        raise UserError(f"ONNX Runtime has {', '.join(there)} for {path} and no {provider}: {INSTALL}")
    return made


def options(severity: int = 3) -> onnxruntime.SessionOptions:
    """Of a session; severity: 3 prints errors, 4 nothing. Warnings about graphs that run are not for the user."""
    made = onnxruntime.SessionOptions()
    made.log_severity_level = severity
    made.intra_op_num_threads = threads()
    return made


def threads() -> int:
    """How many a session has; 0 leaves it to ONNX Runtime, which counts the machine's cores and pins a thread to each.

    Where this process is kept to some processors, by its affinity or by OpenMP's variable as torch is, so many instead.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if told.isdigit() and int(told):
        return int(told)
    everywhere = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    return mine if mine < everywhere else 0


def where(provider: str) -> str:
    return "" if provider == CPU else f" with {provider} (a bundle of an older version? export it again)"
