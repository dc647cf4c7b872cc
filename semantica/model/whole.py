"""Are all weights of a model from its files? diffusers and transformers draw what these lack at random, and warn."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from semantica.errors import UserError


@contextmanager
def unsaid() -> Iterator[None]:
    """Without diffusers' warning of weights that files lack: `require_whole` refuses them."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def names_of(module: nn.Module) -> set[str]:
    """Names of the tensors that a folder of it has to hold; quantised ones come with more, which follow from these."""
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return tensors & module.state_dict().keys()


def stored(folder: Path) -> set[str]:
    """Names of the tensors in a folder's files of weights."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def require_whole(module: nn.Module, folder: Path) -> None:
    """Raises `UserError` for a weight of a module that the folder which it was loaded from lacks."""
    if missing := sorted(names_of(module) - stored(folder)):
        raise UserError(f"{folder} has no {missing[0]}, one of {len(missing)} missing weights: copy it whole")


def complete(kind: type[nn.Module], source: str | Path, **options: Any) -> nn.Module:
    """A tower of transformers in fp32 from safetensors, all of whose weights are there: the library draws others at
    random and reports it in a table.

    Raises:
        UserError: a weight is missing. OSError, RuntimeError, ValueError: as the library.
    """
    from transformers.utils import logging

    options |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        tower, found = kind.from_pretrained(source, dtype=torch.float32, **options)
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{source} has no {missing[0]}, one of {len(missing)} missing weights: download it whole")
    return tower
