"""A graph of a bundle in ONNX Runtime."""

from collections.abc import Sequence
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from semantica.engines.bundle import Bundle
from semantica.errors import UserError, first_line

REFUSALS = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NoSuchFile,
    errors.NotImplemented,
    errors.RuntimeException,
)


def session(
    bundle: Bundle, name: str, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> onnxruntime.InferenceSession:
    """Raises `UserError` for a graph that does not load with these execution providers."""
    options = onnxruntime.SessionOptions()
    # warnings about graphs that run are not for the user; what fails is raised
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(bundle.folder / name, options, providers=list(providers))
    except REFUSALS as error:
        raise UserError(f"ONNX Runtime cannot load {bundle.folder / name}: {first_line(error)}") from error
