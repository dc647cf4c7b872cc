"""Weights by the loaders of diffusers and transformers: all of them or none, and without their remarks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import diffusers.utils.logging
import transformers
import transformers.utils.logging
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from semantica.errors import UserError, first_line


@contextmanager
def quiet() -> Iterator[None]:
    """What loaders log is raised as well, or of old formats; and files that are there load in seconds."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, shown) in zip(libraries, before):
            library.set_verbosity(level)
            if shown:
                library.enable_progress_bar()


def load_model(kind: str, folder: Path, **options: Any) -> nn.Module:
    """A model of diffusers or transformers by the name of its class, from the safetensors of a folder.

    Raises:
        UserError: a configuration that makes no such model; or a weight is missing or of another shape, for which both
            libraries would draw one at random. What is there besides is left.
    """
    library, dtype = (diffusers, "torch_dtype") if hasattr(diffusers, kind) else (transformers, "dtype")
    options = {dtype if name == "dtype" else name: value for name, value in options.items()}
    # weights of another shape are named below
    options |= {"use_safetensors": True, "local_files_only": True, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            made, found = getattr(library, kind).from_pretrained(folder, output_loading_info=True, **options)
    except (StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} makes no {kind}: {first_line(error)}") from error
    if found["mismatched_keys"]:
        name, *shapes = sorted(found["mismatched_keys"])[0]
        other, own = map(list, shapes)
        raise UserError(f"{folder} has {name} of shape {other}, its config.json says {own}: download both again")
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{folder} has no {missing[0]}, one of {len(missing)} missing weights: download it whole")
    return made
