"""A bundle's graphs and its null condition as parts of a larger graph."""

from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import safetensors

from semantica.engines.bundle import NULL, Bundle
from semantica.export.one_file.traced import SAME, Trace, Traced, joined

# numpy's types by safetensors' names of those that weights have
ELEMENTS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Part:
    """One of a bundle's graphs, in ONNX Runtime's form, whose nodes move into other graphs."""

    def __init__(self, bundle: Bundle, name: str):
        self.graph, self.name = ir.load(bundle.for_onnx_runtime(name)).graph, name.partition(".")[0]
        self.weights = {value: value.const_value for value in self.graph.initializers.values()}
        self.inputs = {value.name: value for value in self.graph.inputs}
        self.outputs = {value.name: value for value in self.graph.outputs}
        self.nodes = list(self.graph)
        self.graph.outputs.clear()

    def place(
        self, trace: Trace, nodes: Iterable[ir.Node], given: Mapping[ir.Value, Traced], batch: str, prefix: str = ""
    ) -> None:
        """Move nodes, in order, to the end of another graph.

        given: what stands there for inputs, and for results of nodes that were placed elsewhere. batch: what their
        first dimension is called there: a runtime may take memory of one size for all that has a dimension of one
        name. The weights that they read become that graph's own: ONNX Runtime packs those of an inner graph only if
        they are its.
        """
        prefix, copies = prefix or self.name, {}
        for node in nodes:
            self.graph.remove(node)
            for i, value in enumerate(node.inputs):
                if value in self.weights:
                    if value not in copies:
                        tensor = named(self.weights[value], f"{prefix}/{value.name}")
                        copies[value] = trace.initializer(tensor)
                    node.replace_input_with(i, copies[value])
                elif value in given:
                    node.replace_input_with(i, given[value].value)
            node.name = f"{prefix}/{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}"
                if value.shape is not None:
                    sides = [batch if isinstance(side, ir.SymbolicDim) else side for side in value.shape]
                    value.shape = ir.Shape(sides)
            trace.graph.append(node)

    def traced(self, trace: Trace, name: str) -> Traced:
        """An output whose node was placed."""
        value = self.outputs[name]
        return Traced(trace, value, sides(value))


def inline(trace: Trace, bundle: Bundle, graph: str, inputs: Mapping[str, Traced], batch: str) -> dict[str, Traced]:
    """A whole graph at the end of another one; returns its outputs by name. See `Part.place`."""
    part = Part(bundle, graph)
    part.place(trace, part.nodes, {part.inputs[name]: array for name, array in inputs.items()}, batch)
    return {name: part.traced(trace, name) for name in part.outputs}


def named(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A tensor under another name, its content where it was."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype,
            shape=tensor.shape, name=name, base_dir=tensor.base_dir,
        )  # fmt: skip
    return ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name)


def sides(value: ir.Value) -> tuple[int, ...]:
    return tuple(side if isinstance(side, int) else SAME for side in value.shape)


def null(trace: Trace, bundle: Bundle, batch: Traced) -> dict[str, Traced]:
    """The null condition of a batch by the names of the denoiser's inputs, filled up to the streams' sizes."""
    made = {}
    for name, array in read(bundle).items():
        if name == "emb":
            made[name] = stretched(trace, array, name, batch)
            continue
        # one token that stands for a stream, or all those of the empty prompt
        sizes = bundle.sizes if array.shape[2] != sum(bundle.sizes) else (array.shape[2],)
        tokens = np.split(array, len(sizes), axis=2)
        parts = [
            stretched(trace, token, f"{name}.{i}", batch, size) for i, (token, size) in enumerate(zip(tokens, sizes))
        ]
        made[name] = parts[0] if len(parts) == 1 else joined(*parts, axis=2)
    return made


def stretched(trace: Trace, array: np.ndarray, name: str, batch: Traced, tokens: int | None = None) -> Traced:
    """One sample `[1, ...]` as a batch, and one token along axis 2 as many."""
    given = trace.constant(array, name=f"null.{name}")
    sides = list(array.shape[1:]) if tokens is None else [array.shape[1], tokens, *array.shape[3:]]
    return trace.add("Expand", given, joined(batch.reshape(1), trace.constant(np.array(sides, np.int64))))


def read(bundle: Bundle) -> dict[str, np.ndarray]:
    """The arrays of null.safetensors, in whichever type they are; safetensors gives numpy no bf16."""
    found = safetensors.deserialize((bundle.folder / NULL).read_bytes())
    return {name: np.frombuffer(e["data"], ELEMENTS[e["dtype"]]).reshape(e["shape"]) for name, e in found}
