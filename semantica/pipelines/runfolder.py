"""Is a folder a pipeline of this package, and safe to read? Everything is checked before anything is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

import semantica
from semantica.errors import UserError, first_line
from semantica.files import read_json, refuse_unsafe
from semantica.model.conditioner import Conditioner, read_streams
from semantica.model.encoders import ENCODERS, read_class, refuse_code

PIPELINE = "SemanticaPipeline"
# where classes of this package are found, whatever file they move to; the other form is that of version 0.1
PUBLIC = "semantica"
UNET = ((PUBLIC, "UViT"), ("semantica.uvit", "UViT"))
SCHEDULER = ((PUBLIC, "SemanticaScheduler"), ("semantica.scheduler", "SemanticaScheduler"))
OLD_ENCODERS = (("semantica.encoder", "ViTEncoder"), ("semantica.encoder", "PretrainedEncoder"))
CONFIGS = {"unet": "config.json", "encoder": "config.json", "scheduler": "scheduler_config.json"}
# of files, and of configurations that diffusers and transformers check little
UNREADABLE = (SafetensorError, StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError,
              OSError, RuntimeError, TypeError, ValueError)  # fmt: skip
PATTERNS = ["model_index.json", *(f"{name}/*.{ext}" for name in CONFIGS for ext in ("json", "safetensors"))]


def address(module: str, name: str) -> tuple[str, str]:
    """What a run folder says of a class: its public place in this package, which no move changes, or its own module."""
    own = module.partition(".")[0] == PUBLIC and name in semantica.__all__
    return (PUBLIC if own else module), name


def components() -> dict[str, tuple[tuple[str, str], ...]]:
    """Component -> the (module, class) pairs that may stand there; an index that names any other is refused."""
    encoders = [address(kind.__module__, kind.__name__) for kind in (Conditioner, *ENCODERS.values())]
    return {"unet": UNET, "encoder": (*encoders, *OLD_ENCODERS), "scheduler": SCHEDULER}


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What the readers of a folder's weights and configurations raise becomes one line."""
    try:
        yield
    except UNREADABLE as error:
        # it may say which of its files
        if isinstance(error, UserError) and str(folder) in str(error):
            raise
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from error


def check_run(folder: Path) -> None:
    """Make sure that a folder is a complete pipeline of this package that needs neither pickles nor remote code.

    Raises:
        UserError: it is missing, half written, of another kind, or holds a file that could execute code.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a run folder made by 'semantica train'")
    parts = [folder, *(folder / name for name in CONFIGS)]
    parts += [path for path in sorted((folder / "encoder").glob("*")) if path.is_dir()]
    refuse_unsafe(*parts)
    for path in (path for part in parts if part.is_dir() for path in sorted(part.iterdir())):
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
    if set(named) != set(CONFIGS):
        raise UserError(f"{folder}/model_index.json names {sorted(named)}: expected {sorted(CONFIGS)}")
    for name, classes in components().items():
        if not isinstance(named[name], list) or tuple(named[name]) not in classes:
            raise UserError(f"{folder}/model_index.json asks for {named[name]} as {name}: other code is never loaded")
        config = read_json(folder / name / CONFIGS[name])
        if config.get("_class_name") != named[name][1]:
            raise UserError(f"{folder}/{name} is a {config.get('_class_name')!r}: expected {named[name][1]!r}")
        refuse_code(config, folder / name / CONFIGS[name])
        if named[name][1] == Conditioner.__name__:
            for part in read_streams(folder / name).values():
                read_class(folder / name / part)
        elif name != "scheduler" and not any((folder / name).glob("*.safetensors")):
            raise UserError(f"{folder}/{name} has no safetensors weights: the folder is half written, remake it")
