"""NVIDIA ModelOpt on one graph; a process of its own, since it imports much and prints: python -m ... REQUEST.json."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file


class Reader:
    """Calibration samples one at a time, as ModelOpt and ONNX Runtime's calibrators ask for them."""

    def __init__(self, path: Path):
        arrays = load_file(path)
        self.own = {name: arrays.pop(name) for name in ("z", "logsnr")}
        self.rows, self.fixed = arrays.pop("rows"), arrays
        self.next = 0

    def sample(self, i: int) -> dict[str, np.ndarray]:
        row = self.rows[i]
        own = {name: array[i : i + 1] for name, array in self.own.items()}
        return own | {name: array[row : row + 1] for name, array in self.fixed.items()}

    def get_first(self) -> dict[str, np.ndarray]:
        return self.sample(0)

    def get_next(self) -> dict[str, np.ndarray] | None:
        self.next += 1
        return self.sample(self.next - 1) if self.next <= len(self.rows) else None

    def rewind(self) -> None:
        self.next = 0


def activation_scales(path: Path) -> dict[str, float]:
    """Of a graph that ModelOpt wrote: node -> scale of its first input, for those whose both inputs were quantised."""
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        ups = [makers.get(name) for name in node.input[:2]]
        if node.op_type in ("Conv", "MatMul") and all(up and up.op_type == "DequantizeLinear" for up in ups):
            found[node.name] = float(onnx.numpy_helper.to_array(constants[ups[0].input[1]]))
    return found


def quantise(request: dict[str, Any]) -> dict[str, Any]:
    """Calibrate a graph by each method; returns the scales, `{method: {node: scale}}`.

    request: `module`: where ModelOpt's `quantize` is; `graph`, `data`: paths of the graph and of the arrays of a
        `Calibration`; `out`: folder for what ModelOpt writes; `mode`: "int8"; `methods`: names of its calibrations;
        `operators`: those to quantise.
    """
    quantize, scales = importlib.import_module(request["module"]).quantize, {}
    for method in request["methods"]:
        reader, path = Reader(Path(request["data"])), Path(request["out"], f"{method}.onnx")
        quantize(
            request["graph"],
            quantize_mode=request["mode"],
            calibration_data_reader=reader,
            calibration_method=method,
            calibration_eps=["cpu"],
            op_types_to_quantize=list(request["operators"]),
            # fp32 of a graph means: leave its types as they are
            high_precision_dtype="fp32",
            output_path=str(path),
            log_level="ERROR",
        )
        scales[method] = activation_scales(path)
    return {"scales": scales}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    result = quantise(json.loads(place.read_text()))
    place.with_suffix(".result").write_text(json.dumps(result))
