"""Explicit quantisation of a graph: QuantizeLinear and DequantizeLinear around convolutions and products, in int8.

Activations: one symmetric scale for each tensor. Weights: stored in int8, one symmetric scale for each output channel
(Krishnamoorthi, arXiv 1806.08342, section 3). Biases, accumulation and everything else stay in the graph's own type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file

from semantica.export import onnx as graphs
from semantica.export.onnx import MODULE

# symmetric: -128 is left out
LIMIT = 127
# names of what is made of weights
TURNED, STORED = ".transposed", ".int8"
MADE = (TURNED, STORED)
# the axis of a weight's output channels
CHANNELS = {"Conv": 0, "MatMul": 1}


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product by a constant weight.

    node, operator: its name and type. reads: the tensor of its activations. module: of the network.
    products: multiplications for one sample.
    """

    node: str
    operator: str
    reads: str
    module: str
    products: int


def folded(path: Path) -> ir.Model:
    """A written graph with its weights as its operators read them, instead of transposed while it runs."""
    model = ir.load(path)
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or source is None or source.name not in graph.initializers:
            continue
        turned = np.ascontiguousarray(source.const_value.numpy().transpose(node.attributes["perm"].as_ints()))
        constant = constant_of(graph, f"{source.name}{TURNED}", turned)
        ir.convenience.replace_all_uses_with(node.outputs[0], constant)
        graph.remove(node, safe=True)
    prune(graph)
    return model


def layers(model: ir.Model) -> list[Layer]:
    """What may be quantised, in the order of the graph; tensors of products whose both sides vary are none of it."""
    found = []
    for node in model.graph:
        if node.op_type not in CHANNELS or node.inputs[1].name not in model.graph.initializers:
            continue
        weight, shape = node.inputs[1].shape.numpy(), node.outputs[0].shape
        # each place of the result takes a product with the whole weight
        places = shape[2:] if node.op_type == "Conv" else shape[1:-1]
        products = int(np.prod(weight)) * int(np.prod([int(side) for side in places]))
        module = node.metadata_props.get(MODULE, "")
        found.append(Layer(node.name, node.op_type, node.inputs[0].name, module, products))
    return found


def insert(model: ir.Model, scales: Mapping[str, float]) -> None:
    """Quantise layers of a folded graph, in place.

    scales: name of a node -> scale of its activations; the same for all nodes that read the same tensor.
    """
    graph, made = model.graph, {}
    for node in list(graph):
        if node.name not in scales:
            continue
        activation, weight = node.inputs[:2]
        if activation.name not in made:
            made[activation.name] = quantised(graph, node, activation, scales[node.name])
        node.replace_input_with(0, made[activation.name])
        node.replace_input_with(1, stored(graph, node, weight, CHANNELS[node.op_type]))
    prune(graph)


def quantised(graph: ir.Graph, before: ir.Node, value: ir.Value, scale: float) -> ir.Value:
    """A tensor rounded to int8 and back, for nodes from `before` on."""
    name, dtype = value.name, value.dtype.numpy()
    # of the tensor's own type, as the older definitions of both operators ask for
    constants = [
        constant_of(graph, f"{name}.scale", np.array(max(scale, least_scale(dtype)), dtype)),
        constant_of(graph, f"{name}.zero", np.array(0, np.int8)),
    ]
    down = ir.node("QuantizeLinear", [value, *constants], name=f"{name}.quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], *constants], name=f"{name}.dequantize")
    for node, suffix, dtype in ((down, "int8", ir.DataType.INT8), (up, "rounded", value.dtype)):
        output = node.outputs[0]
        output.name, output.dtype, output.shape = f"{name}.{suffix}", dtype, value.shape
    graph.insert_before(before, [down, up])
    return up.outputs[0]


def stored(graph: ir.Graph, before: ir.Node, weight: ir.Value, axis: int) -> ir.Value:
    """A weight from int8 numbers and a scale for each output channel."""
    values, scale = rounded(weight.const_value.numpy(), axis)
    name = weight.name
    constants = [
        constant_of(graph, f"{name}{STORED}", values),
        constant_of(graph, f"{name}.scale", scale),
        constant_of(graph, f"{name}.zero", np.zeros(len(scale), np.int8)),
    ]
    up = ir.node("DequantizeLinear", constants, {"axis": axis}, name=f"{name}.dequantize")
    output = up.outputs[0]
    output.name, output.dtype, output.shape = f"{name}.rounded", weight.dtype, weight.shape
    graph.insert_before(before, [up])
    return output


def rounded(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight's int8 values, and its scales `[channels]` in the weight's type; values times scales are the weight."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(others).astype(np.float64)
    scale = np.maximum(largest / LIMIT, least_scale(weight.dtype)).astype(weight.dtype)
    # subnormal scales, of fp16 channels below 0.008, have few digits: none may be so small that it cuts values off
    cuts = largest > (LIMIT + 0.5) * scale.astype(np.float64)
    scale = np.where(cuts, np.nextafter(scale, weight.dtype.type(1)), scale)
    wide = scale.astype(np.float64).reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    return np.clip(np.rint(weight / wide), -LIMIT, LIMIT).astype(np.int8), scale


def least_scale(dtype: np.dtype) -> float:
    """Above zero, by which would be divided, wherever it is used: of fp32 subnormal numbers may be flushed to it."""
    return max(float(np.finfo(dtype).smallest_subnormal), float(np.finfo(np.float32).tiny))


def constant_of(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer of that name, the one that is there or a new one."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        )
    return graph.initializers[name]


def prune(graph: ir.Graph) -> None:
    """Take out constants that nothing reads."""
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def save(models: Mapping[str, ir.Model], weights_file: Path) -> dict[str, torch.Tensor]:
    """Write graphs under their names beside one file with the weights of all of them, which are returned; scales stay
    in the graphs."""
    weights: dict[str, torch.Tensor] = {}
    for model in models.values():
        for name, value in model.graph.initializers.items():
            # constants that only one graph has may share a name
            if isinstance(value.const_value, ir.ExternalTensor) or name.endswith(MADE):
                array = torch.from_numpy(np.array(value.const_value.numpy()))
                assert name not in weights or torch.equal(weights[name], array), name
                weights[name] = array
    save_file(weights, weights_file)
    for name, model in models.items():
        graphs.save(model, weights_file.with_name(name), weights, weights_file)
    return weights
