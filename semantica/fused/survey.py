"""What `accelerate` would do to a folder of diffusers: from its configurations alone, no weight is read."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

from semantica.errors import UserError, first_line
from semantica.files import UNSAFE, read_json
from semantica.fused.accelerate import check
from semantica.fused.parts import walk

HOW = {
    "residual block": "fused: norms, SiLU, time embedding",
    "norm": "fused",
    "cross-attention": "fused on GPUs, PyTorch's on CPUs",
    "self-attention": "PyTorch's; in bf16 on CPUs with AVX-512 and no AMX by blocks of queries",
}


@dataclass(frozen=True)
class Row:
    """So many parts of one kind, in one component of the folder, and what becomes of them."""

    component: str
    kind: str
    parts: str
    count: int
    what: str


def survey(folder: Path) -> list[Row]:
    """Rows for every model of diffusers in a folder: a pipeline's, or one model's own.

    Raises:
        UserError: it is no such folder, holds no such model, or weights that are pickles.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a pipeline or a model that diffusers saved")
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        # a library and a class; nulls stand for what a pipeline does without
        places = {name: folder / name for name, entry in index.items() if pair(entry)}
        found = [row for name, place in places.items() for row in component(name, place, *index[name])]
    else:
        config = read_json(folder / "config.json")
        found = component(folder.name, folder, "diffusers", config.get("_class_name", ""))
    if not any(row.count for row in found):
        raise UserError(f"{folder} holds no model of diffusers with GroupNorms or cross-attention: nothing to replace")
    return found


def pair(entry: Any) -> bool:
    """Whether an entry of an index names a library and a class."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def component(name: str, place: Path, library: str, kind: str) -> list[Row]:
    known = getattr(diffusers, kind, None) if library == "diffusers" else None
    if not (isinstance(known, type) and issubclass(known, ModelMixin)):
        # text encoders, schedulers and the like have none of these layers; code of a folder's own is never run
        own = library not in ("diffusers", "transformers")
        return [Row(name, kind, "all", 0, f"not looked at: {library} is code of its own")] if own else []
    refuse_pickles(place)
    config = read_json(place / "config.json")
    try:
        with torch.device("meta"):
            model = known.from_config(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{place / 'config.json'} makes no {kind}: {first_line(error)}") from error
    return list(rows(name, model))


def refuse_pickles(place: Path) -> None:
    """Raises `UserError` where weights could only be read by executing what is in them."""
    files = sorted(place.iterdir()) if place.is_dir() else []
    pickles = [path for path in files if path.suffix.lower() in UNSAFE]
    if pickles and not any(path.suffix == ".safetensors" for path in files):
        raise UserError(
            f"{pickles[0]} is refused: only safetensors are read; load it where you trust it, and save it again "
            "with diffusers' save_pretrained(..., safe_serialization=True)"
        )


def rows(name: str, model: nn.Module) -> list[Row]:
    kind = type(model).__name__
    try:
        check(model)
    except UserError as error:
        return [Row(name, kind, "all", 0, f"as it was: {error}")]
    counts = Counter((part.kind, part.why and f"as it was: {part.why}") for part in walk(model))
    found = [Row(name, kind, parts, count, why or HOW[parts]) for (parts, why), count in counts.items()]
    return found or [Row(name, kind, "all", 0, "as it was: it has no GroupNorm and no attention")]
