"""Arrays that stand for values of an ONNX graph: arithmetic on them adds nodes.

They answer to what `semantica.solvers` does with numpy arrays and torch tensors, so that the solvers, the noise levels'
scales, guidance and thresholding in the graph are those very functions, not a second text of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir

END = np.iinfo(np.int64).max
# pi / 2 in float64, and what it leaves out
RIGHT_ANGLE = math.pi / 2, 6.123233995736766e-17
DOUBLE, FLOAT, INTEGER, BOOL = ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
# in a shape as Reshape reads it: as it comes
SAME = 0


class Trace:
    """A graph that is being written, node after node.

    name: what the names of its values begin with; no two graphs of a model share one.
    """

    def __init__(self, name: str):
        self.name, self.graph = name, ir.Graph([], [], nodes=[], name=name, opset_imports={})
        self.constants: dict[tuple, ir.Value] = {}

    def values(self, operator: str, *inputs: "Traced | ir.Value | None", outputs: int = 1, name="", **attributes):
        """Add a node; returns its results, untyped."""
        given = [one.value if isinstance(one, Traced) else one for one in inputs]
        attrs = ir.convenience.convert_attributes(attributes) if attributes else ()
        label = f"{self.name}/{name or operator}.{len(self.graph)}"
        node = ir.Node("", operator, given, attrs, num_outputs=outputs, name=label)
        for i, value in enumerate(node.outputs):
            value.name = label if outputs == 1 else f"{label}.{i}"
        self.graph.append(node)
        return node.outputs

    def add(
        self, operator: str, *inputs: "Traced | ir.Value | None", dtype=None, shape=None, name="", **attributes
    ) -> "Traced":
        """Add a node of one result; its type is that of the first input, if none is given."""
        (value,) = self.values(operator, *inputs, name=name, **attributes)
        value.dtype = dtype or next(one.dtype for one in inputs if one is not None)
        return Traced(self, value, shape)

    def constant(self, array: Any, dtype: ir.DataType | None = None, name: str = "") -> "Traced":
        """An array in the graph, once for equal ones."""
        array = np.asarray(array, dtype.numpy() if dtype else None)
        key = array.tobytes(), array.shape, array.dtype.str, name
        if key not in self.constants:
            tensor = ir.tensor(array, name=f"{self.name}/{name or 'constant'}.{len(self.constants)}")
            self.constants[key] = self.initializer(tensor)
        return Traced(self, self.constants[key], array.shape)

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A tensor in the graph, under its own name."""
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )  # fmt: skip
        self.graph.register_initializer(value)
        return value

    def input(self, name: str, dtype: ir.DataType, shape: tuple) -> "Traced":
        """An input of the graph; dimensions that differ from call to call are names."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return Traced(self, value, tuple(SAME if isinstance(side, str) else side for side in shape))

    def outer(self, array: "Traced") -> "Traced":
        """An array of a graph around this one, which a node of this one can read."""
        return Traced(self, array.value, array.shape)

    def output(self, array: "Traced", name: str, dtype: ir.DataType, shape: tuple) -> None:
        """An output of the graph, under a name."""
        value = self.add("Identity", array, dtype=dtype).value
        value.name, value.shape = name, ir.Shape(shape)
        self.graph.outputs.append(value)


@dataclass(eq=False)
class Traced:
    """An array of a graph. shape: as Reshape reads it, where that is known and needed; its first side is the batch."""

    trace: Trace
    value: ir.Value
    shape: tuple[int, ...] | None = None

    # numpy leaves operators between its arrays and these to these
    __array_priority__ = 1000

    @property
    def dtype(self) -> ir.DataType:
        return self.value.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def like(self, other: Any) -> "Traced":
        """A number as an array of this one's type."""
        return other if isinstance(other, Traced) else self.trace.constant(other, self.dtype)

    def _with(self, operator: str, *others: Any) -> "Traced":
        return self.trace.add(operator, self, *map(self.like, others), shape=self.shape)

    def _after(self, operator: str, other: Any) -> "Traced":
        return self.trace.add(operator, self.like(other), self, shape=self.shape)

    def __add__(self, other: Any) -> "Traced":
        return self._with("Add", other)

    def __radd__(self, other: Any) -> "Traced":
        return self._after("Add", other)

    def __sub__(self, other: Any) -> "Traced":
        return self._with("Sub", other)

    def __rsub__(self, other: Any) -> "Traced":
        return self._after("Sub", other)

    def __mul__(self, other: Any) -> "Traced":
        return self._with("Mul", other)

    def __rmul__(self, other: Any) -> "Traced":
        return self._after("Mul", other)

    def __truediv__(self, other: Any) -> "Traced":
        return self._with("Div", other)

    def __rtruediv__(self, other: Any) -> "Traced":
        return self._after("Div", other)

    def __pow__(self, other: Any) -> "Traced":
        return self._with("Pow", other)

    def __rpow__(self, other: Any) -> "Traced":
        return self.exp() if other == math.e else self._after("Pow", other)

    def __neg__(self) -> "Traced":
        return self._with("Neg")

    def __abs__(self) -> "Traced":
        return self._with("Abs")

    def exp(self) -> "Traced":
        return self._with("Exp")

    def log(self) -> "Traced":
        return self._with("Log")

    def sqrt(self) -> "Traced":
        return self._with("Sqrt")

    def tanh(self) -> "Traced":
        return self._with("Tanh")

    def round(self) -> "Traced":
        """To the nearest, halves to even, as numpy."""
        return self._with("Round")

    def tan(self) -> "Traced":
        """ONNX Runtime has no tangent in float64, and in old versions no cosine: that is a sine too, of what is left to
        a right angle, in two parts so that little of it is exact."""
        rest = RIGHT_ANGLE[0] - self + RIGHT_ANGLE[1]
        return self._with("Sin") / rest._with("Sin")

    def expm1(self) -> "Traced":
        """e^x - 1, accurate where x is small: ONNX has none."""
        half = (self / 2).tanh()
        return 2 * half / (1 - half)

    def cast(self, dtype: ir.DataType) -> "Traced":
        if dtype == self.dtype:
            return self
        return self.trace.add("Cast", self, dtype=dtype, shape=self.shape, to=int(dtype))

    def clip(self, low: Any = None, high: Any = None) -> "Traced":
        """Between numbers, or arrays that are stretched to this one."""
        if not any(isinstance(bound, Traced) for bound in (low, high)):
            bounds = [None if bound is None else self.like(bound) for bound in (low, high)]
            return self.trace.add("Clip", self, *bounds, shape=self.shape)
        above = self if low is None else self._with("Max", low)
        return above if high is None else above._with("Min", high)

    def reshape(self, *shape: int) -> "Traced":
        made = self.trace.constant(np.array(shape, np.int64))
        known = None
        if self.shape is not None:
            sides = [self.shape[i] if side == SAME else side for i, side in enumerate(shape)]
            whole = math.prod(side for side in self.shape if side > 0)
            rest = math.prod(side for side in sides if side > 0)
            # where the batch is among what is joined, so much is not known
            at = [i for i, side in enumerate(sides) if side == -1]
            known = tuple(whole // rest if i in at and sides[0] == SAME else side for i, side in enumerate(sides))
        return self.trace.add("Reshape", self, made, shape=known)

    def sort(self, axis: int) -> SimpleNamespace:
        """Ascending along the last axis, as torch's: under `values`."""
        (largest, _) = self.trace.values(
            "TopK", self, self.trace.constant([self.shape[axis]], INTEGER), outputs=2, axis=axis, largest=0
        )
        largest.dtype = self.dtype
        return SimpleNamespace(values=Traced(self.trace, largest, self.shape))

    def __getitem__(self, key: Any) -> "Traced":
        """Slices of step 1, and whole numbers along the last axis."""
        keys = key if isinstance(key, tuple) else (key,)
        made = self
        for axis, one in enumerate(keys):
            if isinstance(one, slice):
                if one != slice(None):
                    made = made.part(one.start or 0, END if one.stop is None else one.stop, axis)
            else:
                index = self.trace.constant(one, INTEGER)
                made = self.trace.add("Gather", made, index, dtype=self.dtype, axis=axis)
        return made

    def part(self, start: Any, stop: Any, axis: int = 0) -> "Traced":
        """From start to stop along an axis, each a number or an integer array of one."""
        ends = [
            one.reshape(1) if isinstance(one, Traced) else self.trace.constant([one], INTEGER) for one in (start, stop)
        ]
        shape = self.shape and (SAME, *self.shape[1:]) if axis == 0 else None
        return self.trace.add("Slice", self, *ends, self.trace.constant([axis], INTEGER), shape=shape)

    def __setitem__(self, key: slice, value: "Traced") -> None:
        """A part along the first axis, replaced: other nodes have the array as it was."""
        start, size = key.start or 0, value.trace.add("Size", value, dtype=INTEGER)
        parts = self.part(0, start), value, self.part(start + size, END)
        self.value = joined(*parts).value

    def __array_ufunc__(self, function: np.ufunc, method: str, *inputs: Any, **options: Any) -> "Traced":
        name = {"negative": "__neg__", "absolute": "__abs__"}.get(function.__name__, function.__name__)
        if method != "__call__" or options or len(inputs) != 1 or not hasattr(self, name):
            return NotImplemented
        return getattr(self, name)()

    def __array_function__(self, function: Callable, types: Any, arguments: tuple, options: dict) -> "Traced":
        if function is not np.zeros_like:
            return NotImplemented
        (like,) = arguments
        size = like.trace.add("Shape", like, dtype=INTEGER)
        return like.trace.add("Expand", like.like(0), size, shape=like.shape)


def joined(*arrays: Traced, axis: int = 0, shape=None) -> Traced:
    """One after the other along an axis."""
    return arrays[0].trace.add("Concat", *arrays, shape=shape, axis=axis)


def where(test: Traced, yes: Traced, no: Traced) -> Traced:
    return test.trace.add("Where", test, yes, no, dtype=yes.dtype)


def compared(operator: str, a: Traced, b: Any) -> Traced:
    """A test of two arrays, or of one and a number: Less, Equal, ..."""
    return a.trace.add(operator, a, a.like(b), dtype=BOOL, shape=a.shape)


def count(stop: Traced, dtype: ir.DataType) -> Traced:
    """0, 1, ... below a number."""
    trace = stop.trace
    return trace.add("Range", trace.constant(0, INTEGER), stop, trace.constant(1, INTEGER)).cast(dtype)
