"""`semantica build`: engines from a bundle's graphs, each in a folder of its own, or nothing."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from semantica.engines import BACKENDS, Bundle, open_bundle
from semantica.engines.built import FORMAT, VERSION, engine_folder, sources
from semantica.engines.bundle import DECODE, MANIFEST, REFERENCE
from semantica.errors import ArtifactError, UserError
from semantica.export import builders
from semantica.export.config import BuildConfig
from semantica.export.write import new_folder
from semantica.files import entries
from semantica.progress import phase

UNVERIFIED = "not compared with the network: there is no such GPU here"


def build(config: BuildConfig) -> Path:
    """Build for one backend and architecture; returns the engine's folder.

    Raises:
        UserError: no usable bundle, something that the backend cannot do, or a missing package.
        ArtifactError: the builder failed or crashed, or what it made is not what was asked for; nothing is kept.
    """
    config.check()
    bundle, backend = open_bundle(config.bundle), config.backend
    if BACKENDS[backend].missing():
        raise UserError(f"{backend} is not installed here: {BACKENDS[backend].install}")
    builder = builders.find(backend)
    arch = builder.architecture(config.arch)
    builder.check(bundle)
    for name in ("refittable", "like"):
        if getattr(config, name) and not builder.refits:
            raise UserError(f"--{name}: {backend} builds no engines that take other weights; tensorrt does")
    if config.like is not None:
        make = partial(builder.refit, bundle, open_bundle(config.like))
    else:
        more = {"refittable": True} if config.refittable else {}
        make = partial(builder.build, bundle, arch, config.batches, **more)
    out = engine_folder(bundle, backend, arch)
    if out.exists():
        raise UserError(f"{out} exists: remove it to build again")
    began = time.perf_counter()
    with tidy(out.parent), new_folder(out) as folder:
        with phase(f"build: {backend} for {arch}"):
            built = make(folder)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "backend": backend,
            "arch": arch,
            **built,
            "onnx": {name: bundle.manifest["files"][name]["sha256"] for name in sources(bundle)},
            "seconds": round(time.perf_counter() - began, 1),
        }
        manifest["files"] = entries(folder, sorted(path.name for path in folder.iterdir()))
        with phase("build: compare with the network"):
            manifest |= verify(builder, bundle, folder, manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{backend} engine for {arch} in {out}, {size / 2**20:.1f} MiB, {manifest['seconds']} s")
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


def verify(builder: builders.Builder, bundle: Bundle, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Compare a built engine with the fp32 network, where this machine can run it. Raises `ArtifactError`."""
    engine = builder.load(bundle, folder, manifest)
    if engine is None:
        return {"parity": {}, "unverified": UNVERIFIED}
    if REFERENCE not in bundle.manifest["files"]:
        raise UserError(f"{bundle.folder} has no {REFERENCE} to compare with: export the bundle again")
    from semantica.export import parity

    problem = parity.load_problem(bundle)
    if DECODE in bundle.graphs and problem.images is None:
        raise UserError(f"{bundle.folder} has no pictures to compare its decoder with: export the bundle again")
    row = parity.compare(engine, problem, engine.arithmetic)
    said = parity.failures(row, parity.bounds_of(bundle))
    if said:
        backend = manifest["backend"]
        raise ArtifactError(f"the {backend} engine differs from the fp32 network: {'; '.join(said)}; not kept")
    return {"parity": row}
