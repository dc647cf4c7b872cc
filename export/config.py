"""Options of `semantica export` and `semantica build`; light, so that `--help` imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantica.errors import UserError
from semantica.export.builders import BUILDERS


@dataclass(frozen=True)
class ExportConfig:
    """Turn a trained run folder, or a folder of a diffusers pipeline, into a bundle: ONNX graphs, weights and a
    manifest, checked against the network."""

    model: Path
    """Run folder made by `semantica train`, or folder of a diffusers pipeline: Stable Diffusion, SDXL, image
    variations."""
    out: Path
    """Bundle folder to write; must not exist."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of weights and activations. Latents, noise levels and the statistics of norms stay fp32."""
    ip_adapter: Path | None = None
    """IP-Adapter (.safetensors) that goes into the graphs, of a diffusers pipeline."""
    ip_scale: float = 1.0
    """How much the IP-Adapter's picture weighs."""
    levels: int = 64
    """Noise levels at which the bundle is compared with the fp32 network."""
    steps: int = 20
    """Steps of the sampling runs that are compared."""

    def check(self) -> "ExportConfig":
        """Raises `UserError` for impossible numbers or a place that is taken."""
        for name in ("levels", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        if os.path.lexists(self.out):
            raise UserError(f"--out {self.out} exists: choose another folder")
        return self


@dataclass(frozen=True)
class BuildConfig:
    """Build engines from a bundle's graphs and put them into it.

    tensorrt-rtx serves consumer and workstation cards (sm_75 to sm_89, sm_120, sm_121) and builds for any of them
    without a GPU; no such target fits an H100 or H200 (sm_90): take tensorrt there, on the machine itself. inductor
    compiles for the CPU that it runs on; packages with the fused Triton kernels for CUDA are not made yet.
    """

    bundle: Annotated[Path, tyro.conf.Positional]
    """Bundle folder made by `semantica export`."""
    backend: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(BUILDERS)}}}")]
    """What the engine is for."""
    arch: str = "auto"
    """GPU architecture to build for, such as sm_89; "auto" is the GPU, or for inductor the CPU, of this machine."""
    batches: tuple[int, int, int] = (1, 2, 8)
    """Smallest, usual and largest batch of one call (TensorRT); guidance takes two for each image."""
    refittable: bool = False
    """Engines that other weights of the same network may be put into later, see --like (tensorrt); somewhat slower."""
    like: Path | None = None
    """A bundle of the same network with a refittable engine: take that, put this bundle's weights into it, compare."""

    def check(self) -> "BuildConfig":
        """Raises `UserError` for an unknown backend or impossible numbers."""
        if self.backend not in BUILDERS:
            raise UserError(f"--backend {self.backend}: expected one of {', '.join(BUILDERS)}")
        low, usual, high = self.batches
        if not 1 <= low <= usual <= high:
            raise UserError(f"--batches is {low} {usual} {high}: give smallest, usual and largest, from 1 up")
        return self
