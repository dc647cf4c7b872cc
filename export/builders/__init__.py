"""What builds engines from bundles: a module for each backend, and the table of them.

A module of this folder is the builder of the backend that it is named after, as `BUILDER`; it is imported when it is
asked for. Others are added by `register_builder`.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from semantica.engines import Bundle, Engine


class Builder(ABC):
    """Builds the engines of one backend of `semantica.engines.BACKENDS`.

    refits: whether `build` takes a further `refittable`, for engines that other weights may be put into, and there is
        `refit(bundle, old, folder)`, which writes the engines of an old bundle with the weights of another.
    """

    refits = False

    @abstractmethod
    def architecture(self, asked: str) -> str:
        """What is built for, such as "sm_89"; "auto" is this machine. Raises `UserError` for an impossible target."""

    @abstractmethod
    def check(self, bundle: Bundle) -> None:
        """Raises `UserError` for a bundle that the backend cannot do, or does slowly enough to be a mistake."""

    @abstractmethod
    def build(self, bundle: Bundle, arch: str, batches: tuple[int, int, int], folder: Path) -> dict[str, Any]:
        """Write the engine's files.

        Args:
            batches: smallest, usual and largest batch of one call.
            folder: is there, and empty.

        Returns:
            What the engine's manifest says of it: at least `profile`, its batches as min, opt and max, and
            `backend_version`.

        Raises:
            ArtifactError: the builder failed, or what it made is not what was asked for.
        """

    @abstractmethod
    def load(self, bundle: Bundle, folder: Path, manifest: dict[str, Any]) -> Engine | None:
        """The engine that was built, or None where this machine cannot run it."""


# backend -> its builder, or the module that holds it
BUILDERS: dict[str, Builder | str] = {
    module.name.replace("_", "-"): f"{__name__}.{module.name}"
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
}


def register_builder(name: str, builder: Builder) -> None:
    """Let `semantica build --backend NAME` build for one more backend."""
    BUILDERS[name] = builder


def find(name: str) -> Builder:
    """The builder of a backend in the table."""
    found = BUILDERS[name]
    return importlib.import_module(found).BUILDER if isinstance(found, str) else found
