"""A static web page that samples a bundle in the browser: its graphs, ONNX Runtime Web and a few scripts."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from semantica import __version__
from semantica.discrete import CLASS
from semantica.engines.bundle import DECODE, NULL, WEIGHTS, Bundle
from semantica.errors import UserError
from semantica.export.web.runtime import FILES, contents
from semantica.export.write import new_folder
from semantica.inputs import SINGLE
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.kinds import usual_guidance

# html, styles and scripts, as they are served
PAGE = Path(__file__).parent / "page"
MODEL, RUNTIME = "model", "runtime"
# what a browser holds in one piece, and WebAssembly with 32-bit addresses beside its activations
MOST_BYTES = 2**31 - 1
# variations that are denoised at once: there are pictures sooner in small batches, latents are large
AT_ONCE, LATENTS_AT_ONCE = 4, 1


def write(bundle: Bundle, out: Path, runtime: Path | None = None) -> Path:
    """Write the page of a bundle: a folder for any server of static files; nothing is loaded from anywhere else.

    Args:
        bundle: one whose only input is a picture, in fp32 or fp16.
        out: folder to write; must not exist.
        runtime: the npm package onnxruntime-web, its folder or its tarball; by default npm fetches it.

    Raises:
        UserError: the bundle is not for browsers, the runtime is not to be had or another version, or the place is
            taken; nothing is written then.
    """
    if os.path.lexists(out):
        raise UserError(f"--web {out} exists: choose another folder")
    check(bundle)
    files = contents(runtime)
    with new_folder(out) as folder:
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        for name in (MODEL, RUNTIME):
            (folder / name).mkdir()
        for name, content in files.items():
            (folder / RUNTIME / served(name)).write_bytes(content)
        graphs = {Path(name).stem: bundle.for_onnx_runtime(name) for name in bundle.graphs}
        for path in (*graphs.values(), bundle.folder / WEIGHTS, bundle.folder / NULL):
            # not with its mode: weights of a bundle may be its owner's alone, and file servers are somebody else
            shutil.copyfile(path, folder / MODEL / path.name)
        facts = describe(bundle, folder, graphs)
        (folder / MODEL / "model.json").write_text(json.dumps(facts, indent=1))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"web page in {out}, {size / 1e6:.0f} MB; to look at it: python3 -m http.server -d {out}")
    return out


def check(bundle: Bundle) -> None:
    """Raises `UserError` for a bundle that no browser samples."""
    side = bundle.shapes["image"]
    if bundle.inputs != {SINGLE: (3, side, side)} or bundle.tokenizers:
        raise UserError(f"{bundle.folder} reads {' and '.join(bundle.inputs)}: a web page takes pictures alone")
    if bundle.precision == "bf16":
        raise UserError(f"{bundle.folder} is bf16, which browsers do not compute: export fp16 or fp32")
    size = (bundle.folder / WEIGHTS).stat().st_size
    if size > MOST_BYTES:
        less = "export fp16, or a smaller model" if bundle.precision == "fp32" else "export a smaller model"
        raise UserError(f"{bundle.folder / WEIGHTS} has {size} bytes, a browser holds {MOST_BYTES}: {less}")


def describe(bundle: Bundle, folder: Path, graphs: dict[str, Path]) -> dict[str, Any]:
    """What the page knows of its model, in model/model.json."""
    scheduler, latent = bundle.manifest["model"]["scheduler"], DECODE in bundle.graphs

    def entry(room: str, name: str) -> dict[str, Any]:
        return {"file": name, "bytes": (folder / room / name).stat().st_size}

    unet = bundle.manifest["model"]["unet"]
    return {
        "semantica": __version__,
        "precision": bundle.precision,
        "image": bundle.shapes["image"],
        "sample": bundle.shape_of("z", 1)[1:],
        "size": bundle.manifest.get("decode", bundle.shapes["latent"]),
        "streams": bundle.sizes,
        "schedule": scheduler,
        "guidance": usual_guidance(unet) if scheduler.get("class") == CLASS else VariationPipeline.guidance,
        "batch": LATENTS_AT_ONCE if latent else AT_ONCE,
        "graphs": {name: entry(MODEL, path.name) for name, path in graphs.items()},
        "weights": entry(MODEL, WEIGHTS),
        "empty": entry(MODEL, NULL),
        "runtime": {
            kind: {"module": entry(RUNTIME, served(module)), "binary": entry(RUNTIME, served(binary))}
            for kind, (module, binary) in FILES.items()
        },
    }


def served(name: str) -> str:
    """A file of the runtime under a name whose kind every server knows: not all know .mjs."""
    return name.replace(".mjs", ".js")
