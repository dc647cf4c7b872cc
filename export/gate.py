"""Runs the comparisons that decide whether a bundle exists, and names the layer to blame where it does not."""

import json
import shutil
from collections.abc import Callable
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


class Gate:
    """The comparisons with the fp32 network that a bundle has to pass: `program`, then `files`.

    Args:
        unet, encoder: the fp32 network. schedule: its noise schedule.
        sizes: tokens of each stream.
        folder: of the bundle; what the network answered is kept there.
        levels, steps: how many noise levels, and the length of the sampling runs.
        decode: of a network that samples latents, the fp32 decoder of these.
    """

    def __init__(
        self,
        unet,
        encoder,
        schedule,
        sizes: tuple[int, ...],
        folder: Path,
        levels: int,
        steps: int,
        decode: Callable | None = None,
    ):
        self.network, self.folder = parity.Network(unet, encoder, sizes), folder
        self.problem = parity.make_problem(self.network, schedule, levels, steps, decode)
        parity.save_problem(self.problem, folder / REFERENCE)
        self.rows: dict[str, dict[str, Any]] = {}

    def program(self, captured: Captured) -> dict[str, Any]:
        """Compare the decomposed program, in half precision; returns its `headroom` for the manifest.

        Raises:
            ArtifactError: something is over its bound or not finite; the line names the layer.
        """
        if captured.precision == "fp32":
            return {}
        reduced = ReducedNetwork(captured)
        words = f"{captured.precision}, products added up in fp32"
        self.rows["program"] = parity.compare(reduced, self.problem, words)
        check(self.rows["program"], "program", self.network, self.problem, captured, None)
        headroom = reduced.headroom()
        check_headroom(headroom, captured.precision)
        return {"headroom": headroom}

    def files(self, captured: Captured) -> dict[str, Any]:
        """Compare the written files; returns `parity` and `bounds` for the manifest.

        captured: what they were written from, maybe without its programs. Raises `ArtifactError` as `program`.
        """
        folder, problem = self.folder, self.problem
        whole = folder if captured.precision != "bf16" else twin_of(folder)
        try:
            if whole != folder:
                write_twin(folder, whole)
            bundle = open_bundle(whole)
            native = as_written(bundle)
            for name, graphs in {"onnxruntime": bundle, "native": native}.items():
                if name == "onnxruntime" or native != bundle:
                    # one at a time: each holds the weights, in fp32 where the CPU has no narrower kernels
                    engine = None
                    engine = ort.load(graphs, "onnxruntime", "cpu")
                    words = engine.arithmetic if whole == folder else TWIN
                    row = parity.compare(engine, problem if graphs is bundle else thinned(problem), words)
                    check(row, name, self.network, problem, captured, graphs)
                    self.rows[name] = row
        finally:
            if whole != folder:
                shutil.rmtree(whole, ignore_errors=True)
        return {"parity": self.rows, "bounds": vars(parity.BOUNDS[captured.precision])}


def check(
    row: dict, name: str, network: parity.Network, problem: parity.Problem, captured: Captured, files: Bundle | None
):
    """Raise `ArtifactError` where a row is over its bound, with the layer of `files`, or of the program, to blame."""
    bounds = parity.BOUNDS[captured.precision]
    said = parity.failures(row, bounds)
    if not said:
        return
    differs = f"{name} ({row['arithmetic']}) differs from the fp32 network: {'; '.join(said)}"
    if not parity.failures(row | {"decode_error": 0.0}, bounds):
        raise ArtifactError(f"{differs}; it is the decoder; nothing was written")
    # NaN is over any bound
    at = row["worst_logsnr"] if row["condition_error"] <= bounds.condition else None
    layer = diagnose.blame(network, problem, captured, at, files)
    raise ArtifactError(f"{differs}; worst layer: {layer}; nothing was written")


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


def twin_of(folder: Path) -> Path:
    """Where `write_twin` writes, beside a bundle."""
    return folder.with_name(f"{folder.name}.fp32")


def write_twin(folder: Path, twin: Path) -> None:
    """A bf16 bundle's files with fp32 types, so that ONNX Runtime can run what is written there."""
    shutil.rmtree(twin, ignore_errors=True)
    twin.mkdir()
    for name in (WEIGHTS, NULL):
        save_file({key: value.float() for key, value in load_file(folder / name).items()}, twin / name)
    weights = load_file(twin / WEIGHTS)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        if name.endswith(".onnx"):
            graph.save(graph.widened(folder / name), twin / name, weights, twin / WEIGHTS)
    kept = [name for name in manifest["files"] if (twin / name).is_file()]
    manifest |= {"precision": "fp32", "tokenizers": {}, "files": entries(twin, kept)}
    (twin / MANIFEST).write_text(json.dumps(manifest))
