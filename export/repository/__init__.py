"""A bundle as a model repository of NVIDIA Triton Inference Server.

Four models or five: `variations` (the sampling loop, in Python), `variations_condition`, `variations_denoise` and, of
latents, `variations_decode`, which the loop calls; and `variations_one_file`, the whole run as one graph.
"""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import onnx_ir as ir

import semantica
from semantica.discrete import CLASS
from semantica.engines.base import GraphEngine
from semantica.engines.bundle import CONDITION, DECODE, DENOISE, NULL, Bundle
from semantica.errors import UserError
from semantica.export import one_file
from semantica.export.one_file.compose import TOKENS
from semantica.export.repository import models
from semantica.export.repository.graphs import Plans, Port, Ports, plans_of, ports_of
from semantica.export.repository.pbtxt import pbtxt
from semantica.export.write import new_folder
from semantica.inputs import TEXT
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.kinds import at_once, usual_guidance

LOOP, ONE_FILE = "variations", "variations_one_file"
PARTS = {"condition": CONDITION, "denoise": DENOISE, "decode": DECODE}
# images of one batch, at most
MOST = 16
STEPS = 20
# what the loop is made of, numpy alone; `device` is read where torch is there too
SHIPPED = (
    "__init__.py", "condition.py", "device.py", "discrete.py", "errors.py", "pixels.py", "ranges.py", "solvers.py",
    "weak.py", "sampling/__init__.py", "sampling/loop.py", "sampling/settings.py",
)  # fmt: skip


def write(bundle: Bundle, out: Path) -> Path:
    """Write a repository, whole or not at all; returns where it is.

    Graphs go to the onnxruntime backend, or, where the bundle holds TensorRT engines, as plans to that of TensorRT.
    What the loop needs of this package is copied beside it: a server needs numpy, and no installation of ours.

    Raises:
        UserError: `out` is there already, or an engine of the bundle cannot serve.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists: choose another folder")
    plans = plans_of(bundle)
    latent = DECODE in bundle.graphs
    most = min(MOST, at_once(bundle.shapes["latent"])) if latent else MOST
    most = min(most, plans.most // 2) if plans else most
    with new_folder(out) as folder:
        ports = {}
        for part, graph in PARTS.items():
            if graph in bundle.graphs:
                # guidance takes two for each image; latents are decoded one at a time
                batches = {"condition": (most, 1), "denoise": (2 * most, 2), "decode": (1, 1)}[part]
                ports[part] = write_graph(bundle, folder, part, batches, plans)
        write_loop(bundle, folder, ports, most, kind_of(bundle, plans))
        write_one_file(bundle, folder)
    print(f"model repository in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return out


def kind_of(bundle: Bundle, plans: Plans | None = None) -> str:
    """Where instances run: on the GPU if there is one, or nowhere else."""
    return "KIND_GPU" if plans or bundle.precision == "bf16" else "KIND_AUTO"


def version_folder(folder: Path, name: str) -> Path:
    place = folder / name / "1"
    place.mkdir(parents=True)
    return place


def save(config: dict[str, Any], folder: Path) -> None:
    (folder / config["name"] / "config.pbtxt").write_text(pbtxt(config))


def write_graph(bundle: Bundle, folder: Path, part: str, batches: tuple[int, int], plans: Plans | None) -> Ports:
    """A graph as a model of its own; returns what goes in and out, without the batch."""
    graph, name = PARTS[part], f"{LOOP}_{part}"
    place = version_folder(folder, name)
    ports = ports_of(bundle.folder / graph).without_batch()
    files = plans.copy(graph, place) if plans else {}
    if not files:
        # with the weights that it uses
        one_file.save(ir.load(bundle.for_onnx_runtime(graph)), place / "model.onnx")
    save(models.graph(name, ports, *batches, kind_of(bundle, plans), plans, files), folder)
    return ports


def write_loop(bundle: Bundle, folder: Path, ports: dict[str, Ports], most: int, kind: str) -> None:
    """The sampling loop as a model: Triton's side of it, the modules that it is made of, and what it must know."""
    place, here = version_folder(folder, LOOP), Path(semantica.__file__).parent
    shutil.copyfile(Path(__file__).with_name("model.py"), place / "model.py")
    for name in SHIPPED:
        target = place / "semantica" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(here / name, target)
    write_null(bundle, place / NULL)
    facts = facts_of(bundle, ports)
    (place / "variations.json").write_text(json.dumps(facts, indent=1))
    own = tuple(given(port, facts["inputs"][port.name]) for port in ports["condition"].inputs)
    side = bundle.manifest.get("decode", bundle.shapes["latent"])
    settings = (
        Port("noise", "FP32", tuple(facts["sample"])),
        Port("seed", "INT64", (1,)),
        Port("steps", "INT64", (1,)),
        Port("guidance", "FP32", (1,)),
    )
    made = Ports((*own, *settings), (Port("images", "UINT8", (side, side, 3)),))
    save(models.variations(LOOP, made, most, kind, {part: f"{LOOP}_{part}" for part in ports}), folder)


def given(port: Port, fact: dict[str, Any]) -> Port:
    """An encoder's input as clients send it: a picture `[S, S, 3]`, of which the graph takes planes."""
    if fact["picture"]:
        return Port(fact["given"], "UINT8", (*port.dims[1:], port.dims[0]))
    return Port(fact["given"], port.type, port.dims)


def facts_of(bundle: Bundle, ports: dict[str, Ports]) -> dict[str, Any]:
    """What the loop must know of the bundle."""
    config, unet = bundle.manifest["model"]["scheduler"], bundle.manifest["model"]["unet"]
    inputs = {}
    for port in ports["condition"].inputs:
        text = port.name in bundle.tokenizers
        # as the one file names them
        tokens = TOKENS if port.name == TEXT else f"{port.name}_{TOKENS}"
        inputs[port.name] = {
            "given": tokens if text else port.name,
            "picture": not text and len(port.dims) == 3 and port.dims[0] == 3,
        }
    return {
        "inputs": inputs,
        "types": {port.name: port.type for port in ports["denoise"].inputs},
        "sample": bundle.shape_of("z", 1)[1:],
        "blocks": bundle.shapes["blocks"],
        "sizes": bundle.sizes,
        "decodes": "decode" in ports,
        "scheduler": config,
        "steps": STEPS,
        "guidance": usual_guidance(unet) if config["class"] == CLASS else VariationPipeline.guidance,
    }


def write_null(bundle: Bundle, place: Path) -> None:
    """The null condition of one sample, whole, in the layout of the graphs and in fp32, which holds every other type.

    The loop reads it without the package of safetensors.
    """
    from safetensors.numpy import save
    from safetensors.torch import load_file

    engine = GraphEngine(bundle)
    engine.null_arrays = {name: array.float().numpy() for name, array in load_file(bundle.folder / NULL).items()}
    null = engine.null(1)
    # not by its `save_file`, whose files nobody else may read: servers run as users of their own
    place.write_bytes(save(engine.inputs(null)))


def write_one_file(bundle: Bundle, folder: Path) -> None:
    """The whole run as one graph, with the model's own solver where one file can have it."""
    place, solver = version_folder(folder, ONE_FILE), bundle.manifest["model"]["scheduler"]["solver"]
    solver = solver if solver in one_file.SOLVERS else "ddim"
    path = one_file.write(bundle, place / "model.onnx", solver, models.MOST_STEPS)
    (place.parent / "warmup").mkdir()
    for name, value in (("steps", struct.pack("<q", 1)), ("guidance", struct.pack("<f", 1.0))):
        (place.parent / "warmup" / name).write_bytes(value)
    save(models.one_file(ONE_FILE, ports_of(path), kind_of(bundle)), folder)
