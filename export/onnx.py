"""Exported programs to ONNX files whose weights live in one safetensors file beside them."""

import ast
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from semantica.export.program import quiet

# native GroupNormalization came with 21, Attention and RMSNormalization with 23
OPSET = 23
# where a node came from in the network, kept in the file so that a bad layer can be named
MODULE = "module"


def enclosing(module: str) -> list[str]:
    """A module and those that it is part of: "a.b" gives "a" and "a.b". The last value of any is its result."""
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def to_onnx(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], kept: set[str]) -> ir.Model:
    """An ONNX model with named inputs and outputs and a batch dimension called "batch".

    kept: names of parameters that stay as they are, not transposed or merged into others.
    """
    with quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
        )
        model = made.model

        def folds(node: ir.Node) -> bool | None:
            return False if any(value is not None and value.name in kept for value in node.inputs) else None

        optimize_ir(model, should_fold=folds)
    name_batch(model.graph)
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        # the exporter notes source lines and paths of this machine as well
        node.metadata_props.clear()
        if scopes:
            # the last scope is the operator's own name
            node.metadata_props[MODULE] = [*ast.literal_eval(scopes)][:-1][-1]
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    return model


def name_batch(graph: ir.Graph) -> None:
    """The one symbolic dimension that there is becomes "batch"."""
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    symbol = graph.inputs[0].shape[0].value
    for value in values:
        if value.shape is not None:
            for i, dim in enumerate(value.shape):
                if isinstance(dim, ir.SymbolicDim) and dim.value == symbol:
                    value.shape[i] = ir.SymbolicDim("batch")


def write_weights(modules: dict[str, torch.nn.Module], path: Path) -> dict[str, Tensor]:
    """One safetensors file with every parameter, named `<module>.<parameter>`; returns what is in it."""
    weights = {
        f"{name}.{key}": value.detach().contiguous()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    save_file(weights, path)
    return weights


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies: name -> (offset, bytes)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def save(model: ir.Model, path: Path, weights: dict[str, Tensor], weights_file: Path) -> None:
    """Write a graph whose parameters are read from the safetensors file; small constants stay in the graph."""
    where = places(weights_file)
    for name, value in model.graph.initializers.items():
        if name not in weights:
            continue
        tensor = value.const_value
        assert tuple(tensor.shape) == tuple(weights[name].shape), name
        offset, length = where[name]
        value.const_value = ir.ExternalTensor(
            weights_file.name, offset, length, tensor.dtype, shape=tensor.shape, name=name, base_dir=path.parent
        )
    ir.save(model, path)


def widened(path: Path, narrow: ir.DataType = ir.DataType.BFLOAT16) -> ir.Model:
    """A written graph with fp32 in place of a narrow type, parameters included: to be run where that has no kernels."""
    model = ir.load(path)
    wide = ir.DataType.FLOAT
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for value in values + [output for node in model.graph for output in node.outputs]:
        if value.dtype == narrow:
            value.dtype = wide
    for name, value in model.graph.initializers.items():
        if value.const_value.dtype == narrow:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=name)
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and node.op_type == "Cast" and attribute.value == narrow:
                node.attributes[name] = ir.AttrInt64(name, int(wide))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == narrow:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float32)))
    return model


def node_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator a graph has, most first."""
    return dict(Counter(node.op_type for node in model.graph).most_common())


def types(model: ir.Model) -> dict[str, str]:
    """The element type of each input and output."""
    return {value.name: str(value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)}
