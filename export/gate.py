"""Runs the comparisons that decide whether a bundle exists, and names the layer to blame where it does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from semantica.engines import load_engine
from semantica.engines.bundle import CONDITION, DENOISE, FILES, MANIFEST, NULL, REFERENCE, WEIGHTS
from semantica.errors import ArtifactError
from semantica.export import locate, parity
from semantica.export import onnx as graph
from semantica.export.program import DTYPES, Captured, Denoise, Encode
from semantica.export.reduced import Reduced, ReducedNetwork
from semantica.files import entries

# an activation this close to the type's largest number overflows on another picture
LEAST_HEADROOM = 4.0
TWIN = "fp32 over the bf16 file's weights"


def gate(unet, encoder, schedule, captured: Captured, folder: Path, levels: int, steps: int) -> dict[str, Any]:
    """Compare the decomposed program, in half precision, and the written files with the fp32 network.

    Args:
        unet, encoder: the fp32 network. schedule: its noise schedule.
        captured: the programs that the files in `folder` were written from.
        levels, steps: how many noise levels, and the length of the sampling runs.

    Returns:
        `parity`, `bounds` and, in half precision, `headroom`, for the manifest.

    Raises:
        ArtifactError: something is over its bound or not finite; the line names the layer.
    """
    network = parity.Network(unet, encoder, captured.sizes)
    problem = parity.make_problem(network, schedule, encoder.image_size, levels, steps)
    parity.save_problem(problem, folder / REFERENCE)
    rows, record = {}, {}
    if captured.precision != "fp32":
        reduced = ReducedNetwork(captured)
        words = f"{captured.precision}, products added up in fp32"
        rows["program"] = parity.compare(reduced, problem, words)
        check(rows["program"], "program", network, problem, captured, folder)
        record["headroom"] = reduced.headroom()
        check_headroom(record["headroom"], captured.precision)
    whole = folder if captured.precision != "bf16" else write_twin(folder)
    try:
        engine = load_engine(whole, "onnxruntime")
        words = engine.arithmetic if whole == folder else TWIN
        rows["onnxruntime"] = parity.compare(engine, problem, words)
        check(rows["onnxruntime"], "onnxruntime", network, problem, captured, whole)
    finally:
        if whole != folder:
            shutil.rmtree(whole)
    return {"parity": rows, "bounds": vars(parity.BOUNDS[captured.precision]), **record}


def check(row: dict, name: str, network: parity.Network, problem: parity.Problem, captured: Captured, folder: Path):
    """Raise `ArtifactError` where a row is over its bound, with the layer that is to blame."""
    bounds = parity.BOUNDS[captured.precision]
    said = parity.failures(row, bounds)
    if not said:
        return
    on_condition = not row["condition_error"] <= bounds.condition
    layer = blame(name, on_condition, row["worst_logsnr"], network, problem, captured, folder)
    raise ArtifactError(
        f"{name} ({row['arithmetic']}) differs from the fp32 network: {'; '.join(said)}; worst layer: {layer}; "
        "nothing was written"
    )


def blame(
    name: str, on_condition: bool, logsnr: float, network: parity.Network, problem: parity.Problem,
    captured: Captured, folder: Path,
) -> str:  # fmt: skip
    """The layer at which the error of an artifact grows most, on the first picture and at one noise level."""
    if on_condition:
        twin, program, file, images = Encode(network.unet, network.encoder), captured.encode, CONDITION, problem.images
        arguments, feeds = (images[:1],), {"image": images[:1]}
    else:
        at = int((problem.levels - logsnr).abs().argmin())
        z, level, rows = problem.z[at : at + 1], problem.levels[at : at + 1], problem.condition.map(lambda a: a[:1])
        pairs = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(rows.keys, rows.values)]
        twin, program, file = Denoise(network.unet, captured.sizes), captured.denoise, DENOISE
        arguments, feeds = (z, level, pairs, rows.emb), {"z": z, "logsnr": level, "emb": rows.emb}
        feeds |= {f"{kind}.{i}": array for i, pair in enumerate(pairs) for kind, array in zip("kv", pair)}
    reference = locate.reference_outputs(twin, lambda module: module(*arguments))
    narrow = DTYPES[captured.precision]
    kept = ("z", "logsnr", "image")
    if name == "program":
        reduced = Reduced(program, captured.precision, keep=True)
        inputs = arguments if on_condition else (*arguments[:2], *torch.utils._pytree.tree_map(
            lambda a: a.to(narrow), arguments[2:]))  # fmt: skip
        with torch.no_grad():
            reduced.run(*inputs)
        actual = reduced.outputs
    else:
        # a widened twin takes fp32 throughout
        dtype = torch.float32 if narrow == torch.bfloat16 else narrow
        arrays = {key: (a if key in kept else a.to(dtype)).contiguous().numpy() for key, a in feeds.items()}
        actual = locate.onnx_outputs(folder / file, arrays)
    return locate.worst_layer(reference, actual, torch.finfo(narrow).eps)


def check_headroom(record: dict[str, Any], precision: str) -> None:
    """Raises `ArtifactError` where an activation comes too close to the largest number of its type."""
    if record["headroom"] < LEAST_HEADROOM:
        top = record["largest"][0]
        raise ArtifactError(
            f"{top['module']} ({top['node']}) reaches {top['value']:.3g} of at most {record['type_max']:.3g} in "
            f"{precision}: less than a factor {LEAST_HEADROOM:g} away from overflow; nothing was written: "
            "export bf16 or fp32"
        )


def write_twin(folder: Path) -> Path:
    """A bf16 bundle's files with fp32 types, beside it, so that ONNX Runtime can run what is written there."""
    twin = folder.with_name(f"{folder.name}.fp32")
    shutil.rmtree(twin, ignore_errors=True)
    twin.mkdir()
    for name in (WEIGHTS, NULL):
        save_file({key: value.float() for key, value in load_file(folder / name).items()}, twin / name)
    weights = load_file(twin / WEIGHTS)
    for name in (CONDITION, DENOISE):
        graph.save(graph.widened(folder / name), twin / name, weights, twin / WEIGHTS)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= {"precision": "fp32", "files": entries(twin, FILES)}
    (twin / MANIFEST).write_text(json.dumps(manifest))
    return twin
