"""`semantica build`: engines from a bundle's graphs, each in a folder of its own, or nothing."""

import importlib
import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from semantica import solvers
from semantica.engines import BACKENDS, Bundle, open_bundle
from semantica.engines.built import FORMAT, SOURCES, VERSION, engine_folder
from semantica.engines.bundle import CONDITION, DENOISE, MANIFEST, REFERENCE, entries
from semantica.errors import ArtifactError, UserError
from semantica.export.config import BuildConfig
from semantica.export.write import aside

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# what does the work; its results must be in the bundle's type
COMPUTE = ("CONVOLUTION", "MATRIX_MULTIPLY", "ATTENTION_INPUT", "ATTENTION_OUTPUT")
TYPES = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}
UNVERIFIED = "not compared with the network: there is no such GPU here"


def build(config: BuildConfig) -> Path:
    """Build for one backend and architecture; returns the engine's folder.

    Raises:
        UserError: no usable bundle, something that the backend cannot do, or a missing package.
        ArtifactError: the builder failed or crashed, or what it made is not what was asked for; nothing is kept.
    """
    config.check()
    bundle = open_bundle(config.bundle)
    backend = BACKENDS[config.backend]
    if backend.packages[0] in backend.missing():
        raise UserError(f"{config.backend} is not installed here: {backend.install}")
    arch = architecture(config)
    check_precision(config.backend, bundle)
    out = engine_folder(bundle, config.backend, arch)
    if out.exists():
        raise UserError(f"{out} exists: remove it to build again")
    began = time.perf_counter()
    with tidy(out.parent), aside(out) as folder:
        if config.backend == "inductor":
            from semantica.export.builders.inductor import compile_packages

            record = compile_packages(bundle, folder)
        else:
            record = build_tensorrt(config, bundle, arch, folder)
        manifest = {
            "format": FORMAT, "version": VERSION, "backend": config.backend, "arch": arch, **record,
            "onnx": {name: bundle.manifest["files"][name]["sha256"] for name in SOURCES},
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        manifest["files"] = entries(folder, sorted(path.name for path in folder.iterdir()))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        manifest |= verify(bundle, folder, manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{config.backend} engine for {arch} in {out}, {size / 2**20:.1f} MiB, {manifest['seconds']} s")
    row = manifest["parity"]
    if row:
        print(f"v max error {row['v_max_error']:.2g}, images {row['psnr_db']:.1f} dB, in {row['arithmetic']}")
    else:
        print(f"unverified: {manifest['unverified']}")
    return out


@contextmanager
def tidy(parent: Path) -> Iterator[None]:
    """Leave no empty folder of engines behind."""
    try:
        yield
    finally:
        with suppress(OSError):
            parent.rmdir()


def architecture(config: BuildConfig) -> str:
    """What is built for. Raises `UserError` where the backend has no such target."""
    if config.backend == "inductor":
        from semantica.engines.inductor import architecture as here

        if config.arch not in ("auto", here()):
            raise UserError(f"--arch {config.arch}: inductor compiles for this machine, {here()}; leave --arch out")
        return here()
    present = present_gpu()
    arch = present if config.arch == "auto" else config.arch
    if config.backend == "tensorrt":
        if present is None or arch != present:
            raise UserError(f"tensorrt builds on the GPU that it is for, {arch or 'any'} is not here: build there")
        return arch
    names = [name for name in dir(importlib.import_module("tensorrt_rtx").ComputeCapability) if name.startswith("SM")]
    known = sorted((name.replace("SM", "sm_") for name in names), key=lambda name: int(name[3:]))
    if arch is None:
        raise UserError(f"there is no GPU here: give --arch, one of {', '.join(known)}")
    if arch not in known:
        raise UserError(f"--arch {arch}: TensorRT-RTX builds for {', '.join(known)}; elsewhere use tensorrt or torch")
    return arch


def present_gpu() -> str | None:
    """Architecture of the GPU that is here, such as "sm_89"."""
    import torch

    from semantica.kernels.launch import architecture

    return architecture(torch.device("cuda")) if torch.cuda.is_available() else None


def check_precision(backend: str, bundle: Bundle) -> None:
    """Raises `UserError` for a precision that the backend cannot do, or does slowly enough to be a mistake."""
    attention = bundle.manifest["graphs"][DENOISE]["nodes"].get("Attention", 0)
    if backend != "inductor" and bundle.precision == "fp32" and attention:
        raise UserError(f"{bundle.folder} is fp32, for which {backend} has no attention: export fp16 or bf16")
    if backend == "inductor" and bundle.precision == "fp16":
        raise UserError(f"{bundle.folder} is fp16, for which a CPU has no fast arithmetic: export fp32 or bf16")


def build_tensorrt(config: BuildConfig, bundle: Bundle, arch: str, folder: Path) -> dict[str, Any]:
    """Both engines, each in a process of its own; the record holds the layers of the parsed networks."""
    profile = dict(zip(("min", "opt", "max"), config.batches))
    here = present_gpu() == arch
    # not in the bundle, which may come from others: the builder would read what they wrote
    timings = Path.home() / ".cache" / "semantica" / f"{config.backend}-{arch}.timings"
    if config.backend == "tensorrt":
        timings.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"profile": profile, "layers": {}}
    for name in (CONDITION, DENOISE):
        made = run_worker(
            {
                "module": MODULES[config.backend], "onnx": str((bundle.folder / name).resolve()), "profile": profile,
                "engine": str(folder / name.replace(".onnx", ".engine")),
                "arch": None if config.backend == "tensorrt" else arch,
                # TensorRT-RTX finishes its kernels where they run, and keeps no timings
                "timings": str(timings) if config.backend == "tensorrt" else None,
                "layers": str(folder / name.replace(".onnx", ".layers.json")) if here else None,
            },
            folder / "request.json", config.backend, name,
        )  # fmt: skip
        check_types(made["layers"], bundle.precision, name)
        record["layers"][name], record["backend_version"] = made["layers"], made["backend_version"]
    return record


def run_worker(request: dict[str, Any], place: Path, backend: str, name: str) -> dict[str, Any]:
    """Run the builder's process. Raises `ArtifactError`, in one line, where it crashes or refuses."""
    place.write_text(json.dumps(request))
    answer = place.with_suffix(".result")
    # -P: nothing from the folder that the user stands in is imported
    command = [sys.executable, "-P", "-m", "semantica.export.builders.tensorrt_worker", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode < 0:
            fault = signal.Signals(-done.returncode).name
            raise ArtifactError(f"{backend} crashed on {name} ({fault}); nothing is kept")
        if done.returncode or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise ArtifactError(f"{backend} failed on {name}: {last}; nothing is kept")
        made = json.loads(answer.read_text())
    finally:
        place.unlink(missing_ok=True)
    answer.unlink()
    if "error" in made:
        logged = " ".join(done.stdout.split() + done.stderr.split())[:300]
        raise ArtifactError(f"{backend} cannot build {name}: {made['error']} {logged}; nothing is kept")
    return made


def check_types(layers: dict[str, dict[str, int]], precision: str, name: str) -> None:
    """Raises `ArtifactError` where the parsed network computes in another type than the bundle's."""
    for kind in COMPUTE:
        strangers = {dtype: count for dtype, count in layers.get(kind, {}).items() if dtype != TYPES[precision]}
        if strangers:
            said = ", ".join(f"{count} in {dtype}" for dtype, count in strangers.items())
            raise ArtifactError(f"{name} is {precision}, but of its {kind} layers {said}; nothing is kept")


def verify(bundle: Bundle, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Compare a built engine with the fp32 network, where this machine can run it. Raises `ArtifactError`."""
    import torch

    backend = manifest["backend"]
    if backend != "inductor":
        if present_gpu() != manifest["arch"]:
            return {"parity": {}, "unverified": UNVERIFIED}
    if REFERENCE not in bundle.manifest["files"]:
        raise UserError(f"{bundle.folder} has no {REFERENCE} to compare with: export the bundle again")
    from semantica.export import parity

    problem = parity.load_problem(bundle, solvers.Schedule.of(bundle.manifest["model"]["scheduler"]))
    if backend == "inductor":
        from semantica.engines.inductor import InductorEngine

        engine = InductorEngine(bundle, folder, manifest)
    else:
        from semantica.engines.trt import TensorRTEngine

        engine = TensorRTEngine(bundle, folder, manifest, torch.device("cuda"))
    row = parity.compare(engine, problem, engine.arithmetic)
    said = parity.failures(row, parity.BOUNDS[bundle.precision])
    if said:
        raise ArtifactError(f"the {backend} engine differs from the fp32 network: {'; '.join(said)}; not kept")
    return {"parity": row}
