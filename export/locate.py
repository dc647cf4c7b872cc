"""Which layer is to blame: activations of an artifact beside those of the fp32 network, module by module."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from semantica.export.onnx import MODULE, enclosing


def reference_outputs(module: nn.Module, call: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """What each sub-module of a network gives during one call, in the order of computation."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.detach()

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in module.named_modules() if name]
    try:
        with torch.no_grad():
            call(module)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def onnx_outputs(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The last value of each module in a graph."""
    model = onnx.load(path, load_external_data=False)
    last = {}
    for node in model.graph.node:
        name = next((entry.value for entry in node.metadata_props if entry.key == MODULE), None)
        for module in enclosing(name or ""):
            last[module] = node.output[0]
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in {*last.values()} - present)
    # beside the original, so that its parameters are found
    probe = path.with_name(f".{path.name}.probe")
    try:
        onnx.save(model, probe)
        session = onnxruntime.InferenceSession(probe, providers=["CPUExecutionProvider"])
        made = session.run([*last.values()], feeds)
    finally:
        probe.unlink(missing_ok=True)
    return {name: torch.from_numpy(array) for name, array in zip(last, made) if array.dtype.kind == "f"}


def worst_layer(reference: Mapping[str, Tensor], actual: Mapping[str, Tensor], floor: float) -> str:
    """The module at which the error grows most over everything before it, in words.

    Everything after a faulty layer is wrong as well, so growth is judged, not size.

    floor: relative error of one rounding in the artifact's type.
    """
    before, found, steepest = floor, "", 0.0
    for name, expected in reference.items():
        if name not in actual or actual[name].shape != expected.shape:
            continue
        value, expected = actual[name].double(), expected.double()
        if not value.isfinite().all():
            return f"{name} (not finite)"
        error = float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if error / before > steepest:
            steepest, found = error / before, f"{name} (error {error:.2g} of its largest value, {before:.2g} before it)"
        before = max(before, error)
    return found or "none of the layers that can be compared"
