"""`semantica export`: a bundle, and what else is made of one; light, so that `--help` imports no torch."""

import os
import pkgutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from semantica.engines.bundle import Bundle, is_bundle, open_bundle
from semantica.errors import UserError
from semantica.export.config import ExportConfig
from semantica.export.write import check_packages, export


@dataclass(frozen=True)
class Product:
    """What is made of a bundle.

    write: "module:function" of `(bundle: Bundle, out: Path, **options) -> Path`, imported when it runs. It writes whole
        or not at all, and refuses an `out` that is there. options: fields of `ProductsConfig` that it takes.
    ready: "module:function" of these options: raises `UserError` where it could not write, before a bundle is made.
    """

    write: str
    options: tuple[str, ...] = ()
    ready: str = ""


# by the field that says where each is written
PRODUCTS = {
    "one_file": Product("semantica.export.one_file:write", ("solver",)),
    "triton": Product("semantica.export.repository:write"),
    "web": Product("semantica.export.web:write", ("runtime",), "semantica.export.web.runtime:contents"),
}


@dataclass(frozen=True)
class ProductsConfig(ExportConfig):
    """Turn a trained run folder, or a folder of a diffusers pipeline, into a bundle: ONNX graphs, weights and a
    manifest, checked against the network; and bundles into what needs no Python of ours."""

    model: Path
    """Run folder made by `semantica train`, folder of a diffusers pipeline (Stable Diffusion, SDXL, image variations),
    or a bundle that was exported before."""
    out: Path | None = None
    """Bundle folder to write; must not exist. What else is made of a model keeps no bundle without it."""
    one_file: Path | None = None
    """One ONNX file to write, with the whole sampling run in it: image, noise, steps, guidance -> images. Weights above
    2 GB lie beside it, in one more file."""
    solver: Literal["ddim", "dpmpp_2m"] = "ddim"
    """Of --one-file."""
    triton: Path | None = None
    """Model repository of NVIDIA Triton Inference Server to write; must not exist."""
    web: Path | None = None
    """Static web page to write, a folder that samples in the browser; must not exist."""
    runtime: Path | None = None
    """Of --web: the npm package onnxruntime-web, its folder or tarball. By default npm fetches it, once."""

    def check(self) -> "ProductsConfig":
        """Raises `UserError` for impossible numbers, options that go with nothing, or a place that is taken."""
        wanted = self.wanted()
        if self.out is None and not wanted:
            raise UserError(f"nothing to write: give some of --out, {', '.join(map(option, PRODUCTS))}")
        for name, place in wanted.items():
            if os.path.lexists(place):
                raise UserError(f"{option(name)} {place} exists: choose another name")
        for product, row in PRODUCTS.items():
            for name in row.options:
                if product not in wanted and getattr(self, name) != default(name):
                    raise UserError(f"{option(name)} is nothing without {option(product)}: give that too")
        if is_bundle(self.model):
            for field in fields(ExportConfig):
                if field.name != "model" and getattr(self, field.name) != default(field.name):
                    raise UserError(f"{option(field.name)}: {self.model} is a bundle already, leave that out")
        else:
            self.of_bundle(self.out or next(iter(wanted.values()))).check()
        return self

    def wanted(self) -> dict[str, Path]:
        """Where products are asked for, by name."""
        return {name: getattr(self, name) for name in PRODUCTS if getattr(self, name) is not None}

    def of_bundle(self, out: Path) -> ExportConfig:
        """The options of a bundle alone, written to a place."""
        return ExportConfig(**{field.name: getattr(self, field.name) for field in fields(ExportConfig)} | {"out": out})


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def default(name: str) -> Any:
    return next(field.default for field in fields(ProductsConfig) if field.name == name)


def run(config: ProductsConfig) -> None:
    """Write the bundle that was asked for and what is made of one, each whole or not at all.

    Raises:
        UserError: impossible options, a model or bundle that cannot be used, or a missing package.
        ArtifactError: what was made computes something else than the network; it is not kept.
    """
    wanted = config.check().wanted()
    check_packages()
    options = {name: {one: getattr(config, one) for one in PRODUCTS[name].options} for name in wanted}
    for name in wanted:
        if PRODUCTS[name].ready:
            pkgutil.resolve_name(PRODUCTS[name].ready)(**options[name])
    with bundle_of(config, next(iter(wanted.values()), None)) as bundle:
        if wanted:
            check_sight(bundle, map(option, wanted))
        for name, place in wanted.items():
            pkgutil.resolve_name(PRODUCTS[name].write)(bundle, place, **options[name])


def check_sight(bundle: Bundle, products: Iterable[str]) -> None:
    """Raises `UserError` for an encoder with a view of its own: what is made of bundles gives it the middle square."""
    for name, sight in bundle.manifest.get("sight", {}).items():
        raise UserError(
            f"the encoder of {name} sees {sight['size']} pixels cut out of {sight['resize']}, which "
            f"{', '.join(products)} cannot do: use the bundle itself, or an encoder that sees the whole square"
        )


@contextmanager
def bundle_of(config: ProductsConfig, beside: Path | None) -> Iterator[Bundle]:
    """The bundle that is given, or is exported: to stay, or in a folder beside a product for the while."""
    if is_bundle(config.model):
        yield open_bundle(config.model)
    elif config.out is not None:
        yield open_bundle(export(config.of_bundle(config.out)))
    else:
        try:
            beside.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent)
        except OSError as error:
            raise UserError(f"cannot write {beside}: {error.strerror or error}; give a place with room") from error
        with folder as place:
            yield open_bundle(export(config.of_bundle(Path(place, "bundle"))))
