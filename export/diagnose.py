"""Which layer is to blame: activations of an artifact beside those of the fp32 network, module by module."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from semantica.engines.bundle import CONDITION, DENOISE, Bundle
from semantica.export.onnx import MODULE, enclosing
from semantica.export.parity import Network, Problem
from semantica.export.program import DTYPES, Captured, Denoise, Encode
from semantica.export.reduced import Reduced
from semantica.inputs import part_of


def blame(network: Network, problem: Problem, captured: Captured, logsnr: float | None, files: Bundle | None) -> str:
    """The layer at which the error of an artifact grows most, on the first picture.

    Args:
        network, problem: the fp32 network, and what artifacts are compared on.
        logsnr: the noise level to look at; None for the half that encodes pictures.
        files: whose ONNX files are to blame, in ONNX Runtime's form; None for the captured program itself.
    """
    if logsnr is None:
        twin, program, file = Encode(network.unet, network.encoder), captured.encode, CONDITION
        feeds = wide = part_of(problem.inputs, 0, 1)
        arguments = tuple(feeds.values())
    else:
        twin, program, file = Denoise(network.unet, captured.sizes), captured.denoise, DENOISE
        at = int((problem.levels - logsnr).abs().argmin())
        z, level, rows = problem.z[at : at + 1], problem.levels[at : at + 1], problem.condition.map(lambda a: a[:1])
        pairs = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(rows.keys, rows.values)]
        arguments, wide = (z, level, pairs, rows.emb), ("z", "logsnr")
        feeds = {"z": z, "logsnr": level, "emb": rows.emb}
        feeds |= {f"{kind}.{i}": array for i, pair in enumerate(pairs) for kind, array in zip("kv", pair)}
    reference = reference_outputs(twin, lambda module: module(*arguments))
    narrow = DTYPES[captured.precision]
    if files is None:
        actual = program_outputs(program, captured.precision, arguments, len(wide))
    else:
        # a bf16 graph was widened, and takes fp32 throughout
        dtype = torch.float32 if narrow == torch.bfloat16 else narrow
        arrays = {key: (a if key in wide else a.to(dtype)).contiguous().numpy() for key, a in feeds.items()}
        actual = onnx_outputs(files.for_onnx_runtime(file), arrays)
    return worst_layer(reference, actual, torch.finfo(narrow).eps)


def program_outputs(program: ExportedProgram, precision: str, arguments: tuple, wide: int) -> dict[str, Tensor]:
    """The last value of each module in a program of reduced precision; so many arguments stay as they are."""
    narrow = tree_map(lambda a: a.to(DTYPES[precision]), arguments[wide:])
    reduced = Reduced(program, precision, keep=True)
    with torch.no_grad():
        reduced.run(*arguments[:wide], *narrow)
    return reduced.outputs


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
