"""Is a folder a pipeline of this package, and safe to read? Everything is checked before anything is loaded."""

import json
from pathlib import Path

from semantica.errors import UserError

PIPELINE = "SemanticaPipeline"
# component -> the (module, class) pairs that may stand there; an index that names any other is refused
COMPONENTS = {
    "unet": (("semantica.model.uvit", "UViT"), ("semantica.uvit", "UViT")),
    "encoder": (
        *(("semantica.model.encoders", name) for name in ("ViTEncoder", "PretrainedEncoder")),
        *(("semantica.encoder", name) for name in ("ViTEncoder", "PretrainedEncoder")),
    ),
    "scheduler": (
        ("semantica.sampling.scheduler", "SemanticaScheduler"),
        ("semantica.scheduler", "SemanticaScheduler"),
    ),
}
CONFIGS = {"unet": "config.json", "encoder": "config.json", "scheduler": "scheduler_config.json"}
UNSAFE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npz", ".h5", ".msgpack", ".py"}
PATTERNS = ["model_index.json", *(f"{name}/*.{ext}" for name in COMPONENTS for ext in ("json", "safetensors"))]


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing, no JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__}): restore or remake it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    return content


def check_run(folder: Path) -> list[str]:
    """Make sure that a folder is a complete pipeline of this package that needs neither pickles nor remote code.

    Returns the modules of this package that it names.

    Raises:
        UserError: it is missing, half written, of another kind, or holds a file that could execute code.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a run folder made by 'semantica train'")
    for path in sorted(
        p for part in (folder, *(folder / n for n in COMPONENTS)) if part.is_dir() for p in part.iterdir()
    ):
        if path.suffix.lower() in UNSAFE:
            raise UserError(f"{path} is refused: only safetensors and JSON are read from a run folder; remove it")
        if path.is_symlink() and folder.resolve() not in path.resolve().parents:
            raise UserError(f"{path} leads outside the run folder: copy the file in its place")
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} has no model_index.json: not a run folder, or its training has not saved a model yet"
        )
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != PIPELINE:
        raise UserError(f"{folder} holds a {index.get('_class_name')!r}: expected {PIPELINE!r}")
    named = {key: value for key, value in index.items() if not key.startswith("_")}
    if set(named) != set(COMPONENTS):
        raise UserError(f"{folder}/model_index.json names {sorted(named)}: expected {sorted(COMPONENTS)}")
    for name, classes in COMPONENTS.items():
        if not isinstance(named[name], list) or tuple(named[name]) not in classes:
            raise UserError(f"{folder}/model_index.json asks for {named[name]} as {name}: other code is never loaded")
        config = read_json(folder / name / CONFIGS[name])
        if config.get("_class_name") != named[name][1]:
            raise UserError(f"{folder}/{name} is a {config.get('_class_name')!r}: expected {named[name][1]!r}")
        if "auto_map" in config or "auto_map" in (config.get("vision") or {}):
            raise UserError(
                f"{folder}/{name}/{CONFIGS[name]} names code to run (auto_map): remote code is never loaded"
            )
        if name != "scheduler" and not any((folder / name).glob("*.safetensors")):
            raise UserError(f"{folder}/{name} has no safetensors weights: the folder is half written, remake it")
    return [module for module, _ in named.values()]
