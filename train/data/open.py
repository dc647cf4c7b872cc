"""Which source of pictures lies at a path or URL: a table that others can add to."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from semantica.train.data.folders import FolderData, open_folder
from semantica.train.data.lsun import LsunData, is_lsun, open_lsun
from semantica.train.data.published import is_imagenet, is_sun, open_imagenet, open_sun
from semantica.train.data.shards import ShardData, is_shards, open_shards
from semantica.train.data.source import Source
from semantica.train.data.tokens import attach


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    holds: whether this path or URL is one. mode: what a pair is there, where nothing else is asked for.
    open: from (path or URL, mode, smallest and largest similarity); raises `UserError` for what it does not take.
    """

    holds: Callable[[str], bool]
    mode: str
    open: Callable[[str, str, float | None, float | None], Source]


KINDS: dict[str, Kind] = {}


def register_source(name: str, holds: Callable[[str], bool], mode: str, open: Callable[..., Source]) -> None:
    """Let `--data` take a further kind of source; it is asked before those that are there already. See `Kind`."""
    KINDS[name] = Kind(holds, mode, open)


def open_data(
    root: str | os.PathLike,
    mode: str = "auto",
    low: float | None = None,
    high: float | None = None,
    tokens: str | os.PathLike | None = None,
    captions: bool = False,
) -> Source:
    """Open the source at a path or URL.

    Args:
        root: a folder of label folders, shards in a folder or behind an fsspec URL, ImageNet, SUN397 or LSUN as they
            are distributed, or what was registered.
        mode: "folders", "pages", "reconstruct"; "auto" is the source's own.
        low, high: similarity that a pair must have, for shards.
        tokens: folder of what a frozen encoder made of these pictures.
        captions: read the texts of the pictures too.

    Raises:
        UserError: as `scan`, `open_shards`, `semantica.train.data.tokens.attach` and `Source.captioned`; thresholds for
            folders.
    """
    root = os.fspath(root)
    *others, fallback = reversed(KINDS.values())
    holding = (kind for kind in others if kind.holds(root))
    # pages are asked of shards, which say what is missing
    named = (kind for kind in others if kind.mode == mode != fallback.mode)
    kind = next(holding, None) or next(named, fallback)
    data = kind.open(root, kind.mode if mode == "auto" else mode, low, high)
    data = data.captioned() if captions else data
    return data if tokens is None else attach(data, tokens)


# asked last: it takes every path
register_source(FolderData.kind, lambda root: True, "folders", open_folder)
register_source(ShardData.kind, is_shards, "pages", open_shards)
register_source("imagenet", is_imagenet, "folders", open_imagenet)
register_source("sun397", is_sun, "folders", open_sun)
register_source(LsunData.kind, is_lsun, "folders", open_lsun)
