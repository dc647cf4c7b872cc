"""A decomposed program run node by node in half precision, with the largest activation of every node watched.

Kernels for half precision multiply narrow numbers and add up in fp32; a CPU's own half-precision kernels are slow or
missing. So matrix products, convolutions, attention and norms are computed here in fp32 from narrow inputs and rounded
once, everything else in the narrow type itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from semantica.condition import Condition
from semantica.engines.base import heads_first
from semantica.export.onnx import enclosing
from semantica.export.program import DTYPES, Captured

aten = torch.ops.aten
ACCUMULATED = {
    aten.linear.default,
    aten.conv2d.default,
    aten.matmul.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.avg_pool2d.default,
    aten.mean.dim,
}


def module_of(node: Node) -> str:
    """The module of the network that a node was traced in: "unet.conv_in"."""
    stack = node.meta.get("nn_module_stack") or {}
    return [name for name, _ in stack.values()][-1] if stack else ""


class Reduced(Interpreter):
    """Runs a program over fp16 or bf16 parameters.

    peaks: node name -> (module, largest absolute value so far), of nodes that give the narrow type.
    outputs: module -> its last result, of the last run, where `keep` is set.
    """

    def __init__(self, program: torch.export.ExportedProgram, precision: str, keep: bool = False):
        super().__init__(program.module())
        self.narrow, self.keep = DTYPES[precision], keep
        self.peaks: dict[str, tuple[str, float]] = {}
        self.outputs: dict[str, Tensor] = {}

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target not in ACCUMULATED or self.narrow == torch.float32:
            return super().call_function(target, args, kwargs)
        narrow = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.dtype == self.narrow]
        if not narrow:
            return super().call_function(target, args, kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self.widen, (args, kwargs))
        return super().call_function(target, args, kwargs).to(self.narrow)

    def widen(self, tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == self.narrow else tensor

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            module = module_of(n)
            if result.dtype == self.narrow and result.numel():
                low, high = torch.aminmax(result)
                peak = max(-float(low), float(high))
                # a NaN is no peak; the comparison of the results reports it
                self.peaks[n.name] = (module, max(peak, self.peaks.get(n.name, (module, 0.0))[1]))
            if self.keep:
                self.outputs |= dict.fromkeys(enclosing(module), result)
        return result


class ReducedNetwork:
    """Both programs of a `Captured`, as an engine's callables."""

    array, device = "torch", torch.device("cpu")

    def __init__(self, captured: Captured):
        self.unet, self.inputs, self.sizes = captured.unet, captured.inputs, captured.sizes
        self.runners = {name: Reduced(getattr(captured, name), captured.precision) for name in ("encode", "denoise")}

    def condition(self, inputs: Mapping[str, Tensor]) -> Condition:
        pairs, emb = self.runners["encode"].run(*(inputs[name] for name in self.inputs))
        keys, values = (tuple(pair[i].transpose(1, 2) for pair in pairs) for i in (0, 1))
        return Condition(keys, values, emb, None, self.sizes)

    def null(self, batch: int) -> Condition:
        return self.unet.null(batch).fill(self.sizes)

    def __call__(self, z: Tensor, logsnr: Tensor, condition: Condition) -> Tensor:
        pairs = [(heads_first(key), heads_first(value)) for key, value in zip(condition.keys, condition.values)]
        return self.runners["denoise"].run(z, logsnr, pairs, condition.emb)

    def headroom(self) -> dict[str, Any]:
        """As the function of this name, of both programs."""
        return headroom(list(self.runners.values()))


def headroom(runners: Sequence[Reduced]) -> dict[str, Any]:
    """How far the largest activations stay below the type's largest number, and the nodes that come closest."""
    limit = torch.finfo(runners[0].narrow).max
    rows = [(peak, name, module) for r in runners for name, (module, peak) in r.peaks.items()]
    rows.sort(reverse=True)
    return {
        "type_max": limit,
        "headroom": limit / max(rows[0][0], 1e-30),
        "largest": [{"node": name, "module": module, "value": peak} for peak, name, module in rows[:5]],
    }
