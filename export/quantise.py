"""`semantica quantise`: a bundle whose denoiser multiplies int8 numbers, held to the same network, or nothing."""

import importlib.util
import json
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantica.engines import Bundle, load_engine, open_bundle
from semantica.engines.bundle import (
    CONDITION,
    DECODE,
    DENOISE,
    FOR_ONNX_RUNTIME,
    MANIFEST,
    NULL,
    REFERENCE,
    WEIGHTS,
)
from semantica.errors import ArtifactError, UserError
from semantica.export.config import QuantiseConfig
from semantica.export.write import PACKAGES, contents, new_folder
from semantica.files import entries

if TYPE_CHECKING:
    import onnx_ir as ir

    from semantica.export.calibration import Calibration
    from semantica.export.sensitivity import Cost

# whose interface and graphs are known
MODELOPT = "0.47.0"
INSTALL = 'pip install "semantica-diffusion[quantise]"'
NEEDED = ("modelopt", "onnx_graphsurgeon", "onnxslim", "polygraphy", "lief")
# ModelOpt's ways to bound activations: the largest value, or the histogram that loses least information
METHODS = ("max", "entropy")


def quantise(config: QuantiseConfig) -> Path:
    """Write a quantised bundle that agreed with the fp32 network; returns where it is.

    Raises:
        UserError: impossible options, no usable bundle or pictures, or a package that is missing or unknown.
        ArtifactError: ModelOpt failed, or the result is too far from the network; nothing is kept.
    """
    config.check()
    check_packages()
    bundle = open_bundle(config.bundle)
    check_bundle(bundle)

    from semantica.export import parity
    from semantica.export.calibration import draw
    from semantica.export.gate import as_written

    began = time.perf_counter()
    if config.images is None:
        print("no --images: calibrated on drawn fields; pictures like those to be varied give better scales")
    with new_folder(config.out) as folder:
        source = load_engine(bundle, "onnxruntime", "cpu")
        calibration = draw(bundle, source, config.images, config.samples, config.seed)
        manifest = {key: value for key, value in bundle.manifest.items() if key not in ("headroom", "seconds")}
        manifest |= write_graphs(bundle, calibration, config, folder)
        for name in (NULL, REFERENCE):
            shutil.copyfile(bundle.folder / name, folder / name)
        manifest["files"] = entries(folder, contents(folder))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        made, problem, rows = open_bundle(folder), parity.load_problem(bundle), {}
        bounds = parity.bounds_of(made)
        # the graphs as ONNX Runtime takes them, and as every other runtime does
        for name, graphs in {"onnxruntime": made, "native": as_written(made)}.items():
            if graphs == made and rows:
                continue
            engine = load_engine(graphs, "onnxruntime", "cpu")
            row = rows[name] = parity.compare(engine, problem, engine.arithmetic)
            if said := parity.failures(row, bounds):
                raise ArtifactError(
                    f"in {config.mode} the network differs from fp32: {'; '.join(said)}; nothing was written: "
                    f"a --target above {config.target:g} quantises fewer layers"
                )
        row = rows["onnxruntime"]
        manifest |= {"parity": rows, "bounds": vars(bounds)}
        manifest["seconds"] = round(time.perf_counter() - began, 1)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    print(f"v max error {row['v_max_error']:.2g}, mean {row['v_mean_error']:.2g}, images {row['psnr_db']:.1f} dB")
    print(f"{config.mode} bundle in {config.out}, {row['arithmetic']}, {manifest['seconds']} s")
    return config.out


def check_packages() -> None:
    """Raises `UserError` where a package is missing, or a ModelOpt that is not known to work is installed."""
    absent = [name for name in (*PACKAGES, *NEEDED) if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"quantise needs {', '.join(absent)}, not installed here: {INSTALL}")
    version = metadata.version("nvidia-modelopt")
    if version != MODELOPT:
        raise UserError(f"nvidia-modelopt {version} is not known to work, {MODELOPT} is: {INSTALL}")


def check_bundle(bundle: Bundle) -> None:
    """Raises `UserError` for a bundle that cannot be quantised."""
    if bundle.quantised:
        raise UserError(f"{bundle.folder} is {bundle.quantised} already: give the bundle that it was made from")
    if bundle.precision not in ("fp32", "fp16"):
        raise UserError(f"{bundle.folder} is {bundle.precision}, in which no CPU calibrates it: export fp32 or fp16")
    if DECODE in bundle.manifest["files"]:
        raise UserError(f"{bundle.folder} is of a diffusers pipeline: only those of run folders are quantised so far")
    if REFERENCE not in bundle.manifest["files"]:
        raise UserError(f"{bundle.folder} has no {REFERENCE} to compare with: export the bundle again")


def write_graphs(bundle: Bundle, calibration: "Calibration", config: QuantiseConfig, folder: Path) -> dict[str, Any]:
    """Both graphs, in ONNX Runtime's form too where that is another, and the file of their weights; returns what the
    manifest says of them and of their making.

    The half that makes conditions stays as it is: it runs once for each picture, and the denoiser in every step.
    """
    import onnx_ir as ir

    from semantica.export import onnx as graph
    from semantica.export import qdq, sensitivity
    from semantica.export.onnx_runtime import with_layer_norms

    # what is tried lies in a folder of its own, gone at the end
    with tempfile.TemporaryDirectory(dir=folder) as place:
        scratch = Path(place)
        model = qdq.folded(bundle.folder / DENOISE)
        layers = qdq.layers(model)
        qdq.save({DENOISE: model}, scratch / WEIGHTS)
        scales = calibrate(scratch, calibration, config.mode)
        judge = sensitivity.Judge(scratch / DENOISE, calibration)
        found = sensitivity.costs(judge, layers, scales)
        taken = {cost.layer.node: cost.scale for cost in sensitivity.chosen(found, config.target)}
        if not taken:
            raise ArtifactError(f"no layer in {config.mode} leaves v {config.target:g} dB: lower --target")
        summed = sensitivity.decibels(sum(cost.error for cost in found if cost.layer.node in taken))
        together = sensitivity.decibels(judge.error(taken))
        model = ir.load(scratch / DENOISE)
        qdq.insert(model, taken)
        written = {CONDITION: ir.load(bundle.folder / CONDITION), DENOISE: model}
        weights, counted = qdq.save(written, folder / WEIGHTS), graph.node_counts(model)
        for name, own in written.items():
            if with_layer_norms(own):
                graph.save(own, folder / FOR_ONNX_RUNTIME[name], weights, folder / WEIGHTS)
    share = sum(layer.products for layer in layers if layer.node in taken) / sum(layer.products for layer in layers)
    return {
        "graphs": bundle.manifest["graphs"] | {DENOISE: {"nodes": counted, "types": graph.types(model)}},
        "quantisation": {
            "mode": config.mode,
            "what": f"{len(taken)} of {len(layers)} layers, {share:.0%} of their products",
            "modelopt": MODELOPT,
            "target_db": config.target,
            "v_db": {"summed": summed, "together": together},
            "calibration": {
                "samples": len(calibration),
                "logsnr": sorted({round(float(level), 3) for level in calibration.logsnr}),
                "seed": config.seed,
                "pictures": "drawn" if config.images is None else "given",
                "sha256": calibration.sha256(),
            },
            "layers": rows(layers, found, set(taken)),
        },
    }


def rows(layers: list, found: "list[Cost]", taken: set[str]) -> list[dict[str, Any]]:
    """A row for each layer; `alone_db`: v over the error that the layer makes alone, None where none was measured."""
    from semantica.export.sensitivity import decibels

    by_node, made = {cost.layer.node: cost for cost in found}, []
    for layer in layers:
        cost = by_node.get(layer.node)
        made.append(
            {
                "module": layer.module,
                "operator": layer.operator,
                "products": layer.products,
                "quantised": layer.node in taken,
                "alone_db": cost and decibels(cost.error),
                "calibration": cost and cost.method,
            }
        )
    return made


def calibrate(scratch: Path, calibration: "Calibration", mode: str) -> dict[str, dict[str, float]]:
    """Scales of activations by ModelOpt, `{method: {node: scale}}`, of the denoiser that lies in a folder."""
    import numpy as np
    import onnx_ir as ir
    from safetensors.numpy import save_file

    from semantica.export.builders._process import run_worker
    from semantica.export.onnx import widened
    from semantica.export.qdq import CHANNELS

    # in fp32: histograms of fp16 values have too few different edges
    model = widened(scratch / DENOISE, ir.DataType.FLOAT16)
    names = prepare(model.graph)
    ir.save(model, scratch / "prepared.onnx", external_data="prepared.weights")
    arrays = calibration.arrays()
    wide = {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in arrays.items()}
    save_file(wide, scratch / "calibration.safetensors")
    request = {
        "module": "modelopt.onnx.quantization",
        "graph": str(scratch / "prepared.onnx"),
        "data": str(scratch / "calibration.safetensors"),
        "out": str(scratch),
        "mode": mode,
        "methods": METHODS,
        "operators": list(CHANNELS),
    }
    made = run_worker("semantica.export._modelopt_worker", request, scratch / "request.json", "ModelOpt", DENOISE)
    return {method: {names[node]: scale for node, scale in found.items()} for method, found in made["scales"].items()}


def prepare(graph: "ir.Graph") -> dict[str, str]:
    """Get a graph past what ModelOpt would leave out without a word, in place; returns new names -> old ones.

    It forgets the types of values and infers them anew, which stops at GroupNormalization, and what has no type is not
    quantised: a Cast says the type again. And it takes the names of nodes to leave out for beginnings of names, so
    that a small `linear` takes `linear_7` with it: none begins with another here.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type == "GroupNormalization":
            value = node.outputs[0]
            typed = ir.node("Cast", [value], {"to": value.dtype})
            typed.outputs[0].dtype, typed.outputs[0].shape = value.dtype, value.shape
            ir.convenience.replace_all_uses_with(value, typed.outputs[0])
            typed.replace_input_with(0, value)
            graph.insert_after(node, typed)
    names = {}
    for i, node in enumerate(graph):
        names[f"node_{i:08d}"], node.name = node.name or "", f"node_{i:08d}"
    return names
