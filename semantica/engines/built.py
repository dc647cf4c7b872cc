"""Engines that `semantica build` made: which are there, and whether one may be loaded here."""

from pathlib import Path
from typing import Any

from semantica.engines.bundle import MANIFEST, WEIGHTS, Bundle, check_files, read_manifest
from semantica.errors import UserError

FORMAT, VERSION = "semantica-engine", 1


def sources(bundle: Bundle) -> tuple[str, ...]:
    """Files of a bundle whose hashes an engine's manifest repeats: it was made from these."""
    return (*bundle.graphs, WEIGHTS)


def engine_folder(bundle: Bundle, backend: str, arch: str) -> Path:
    return bundle.folder / "engines" / f"{backend}-{arch}"


def open_built(bundle: Bundle, backend: str, arch: str, version: str) -> tuple[Path, dict[str, Any]]:
    """The folder and manifest of the engine for a backend, an architecture and that backend's version.

    arch: what this machine needs, such as "sm_89".

    Raises:
        UserError: there is none, it is for something else, was made from other graphs, or its files were altered.
    """
    folder = engine_folder(bundle, backend, arch)
    how = f"semantica build {bundle.folder} --backend {backend}"
    if folder.parent.is_symlink() or folder.is_symlink():
        raise UserError(f"{folder} leads elsewhere through a symbolic link: copy the folder in its place")
    if not (folder / MANIFEST).exists():
        there = sorted(p.name for p in folder.parent.glob(f"{backend}-*")) if folder.parent.is_dir() else []
        others = f" (built: {', '.join(there)})" if there else ""
        raise UserError(f"{bundle.folder} has no {backend} engine for {arch}{others}: {how}")
    manifest = read_manifest(folder / MANIFEST, FORMAT, VERSION)
    for key, expected in (("backend", backend), ("arch", arch), ("backend_version", version)):
        if manifest.get(key) != expected:
            raise UserError(f"{folder} was built for {key} {manifest.get(key)!r}, here it is {expected!r}: {how}")
    made_from, files = manifest.get("onnx"), bundle.manifest["files"]
    if not isinstance(made_from, dict) or any(made_from.get(name) != files[name]["sha256"] for name in sources(bundle)):
        raise UserError(f"{folder} was built from other graphs than {bundle.folder} holds now: {how}")
    profile, files = manifest.get("profile"), manifest.get("files")
    if not isinstance(files, dict) or not isinstance(profile, dict) or type(profile.get("max")) is not int:
        raise UserError(f"{folder / MANIFEST} is incomplete: {how}")
    check_files(folder, manifest["files"])
    return folder, manifest
