"""Runs the comparisons that decide whether a bundle exists, and names the layer to blame where it does not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from semantica.engines import ort
from semantica.engines.bundle import FOR_ONNX_RUNTIME, MANIFEST, NULL, REFERENCE, WEIGHTS, Bundle, open_bundle
from semantica.errors import ArtifactError
from semantica.export import diagnose, parity
from semantica.export import onnx as graph
from semantica.export.program import Captured
from semantica.export.reduced import ReducedNetwork
from semantica.files import entries

# an activation this close to the type's largest number overflows on another picture
LEAST_HEADROOM = 4.0
TWIN = "fp32 over the bf16 file's weights"
# of the graphs that ONNX Runtime takes another form of, two neighbouring levels in so many are compared
THINNED = 8


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
    problem = parity.make_problem(network, schedule, levels, steps)
    parity.save_problem(problem, folder / REFERENCE)
    rows, record = {}, {}
    if captured.precision != "fp32":
        reduced = ReducedNetwork(captured)
        words = f"{captured.precision}, products added up in fp32"
        rows["program"] = parity.compare(reduced, problem, words)
        check(rows["program"], "program", network, problem, captured, None)
        record["headroom"] = reduced.headroom()
        check_headroom(record["headroom"], captured.precision)
    whole = folder if captured.precision != "bf16" else write_twin(folder)
    try:
        bundle = open_bundle(whole)
        native = as_written(bundle)
        for name, graphs in {"onnxruntime": bundle, "native": native}.items():
            if name == "onnxruntime" or native != bundle:
                engine = ort.load(graphs, "onnxruntime", "cpu")
                words = engine.arithmetic if whole == folder else TWIN
                rows[name] = parity.compare(engine, problem if graphs is bundle else thinned(problem), words)
                check(rows[name], name, network, problem, captured, graphs)
    finally:
        if whole != folder:
            shutil.rmtree(whole)
    return {"parity": rows, "bounds": vars(parity.BOUNDS[captured.precision]), **record}


def check(
    row: dict, name: str, network: parity.Network, problem: parity.Problem, captured: Captured, files: Bundle | None
):
    """Raise `ArtifactError` where a row is over its bound, with the layer of `files`, or of the program, to blame."""
    bounds = parity.BOUNDS[captured.precision]
    said = parity.failures(row, bounds)
    if not said:
        return
    # NaN is over any bound
    at = row["worst_logsnr"] if row["condition_error"] <= bounds.condition else None
    layer = diagnose.blame(network, problem, captured, at, files)
    raise ArtifactError(
        f"{name} ({row['arithmetic']}) differs from the fp32 network: {'; '.join(said)}; worst layer: {layer}; "
        "nothing was written"
    )


def as_written(bundle: Bundle) -> Bundle:
    """A bundle of the graphs alone that every runtime takes, without ONNX Runtime's own."""
    files = {name: entry for name, entry in bundle.manifest["files"].items() if name not in FOR_ONNX_RUNTIME.values()}
    return replace(bundle, manifest=bundle.manifest | {"files": files})


def thinned(problem: parity.Problem) -> parity.Problem:
    """A few of the noise levels; what is at each place keeps its picture."""
    some = [i for i in range(len(problem.levels)) if i % THINNED < max(parity.BATCHES)]
    return replace(problem, levels=problem.levels[some], z=problem.z[some], v=problem.v[some])


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
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        if name.endswith(".onnx"):
            graph.save(graph.widened(folder / name), twin / name, weights, twin / WEIGHTS)
    manifest |= {"precision": "fp32", "files": entries(twin, manifest["files"])}
    (twin / MANIFEST).write_text(json.dumps(manifest))
    return twin
