"""Options of `semantica export`, `quantise` and `build`; light, so that `--help` imports no torch."""

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
    lora: Path | None = None
    """LoRA (.safetensors) that is added to the weights of a diffusers pipeline; needs the package peft."""
    lora_scale: float = 1.0
    """How much the LoRA weighs."""
    levels: int = 64
    """Noise levels at which the bundle is compared with the fp32 network."""
    steps: int = 20
    """Steps of the sampling runs that are compared."""

    def check(self) -> "ExportConfig":
        """Raises `UserError` for impossible numbers or a place that is taken."""
        for name in ("levels", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        if self.ip_adapter is None and self.ip_scale != 1:
            raise UserError("--ip-scale is nothing without --ip-adapter: give that too")
        if self.lora is None and self.lora_scale != 1:
            raise UserError("--lora-scale is nothing without --lora: give that too")
        if os.path.lexists(self.out):
            raise UserError(f"--out {self.out} exists: choose another folder")
        return self


@dataclass(frozen=True)
class QuantiseConfig:
    """Turn an fp32 or fp16 bundle into one whose denoiser multiplies int8 numbers, checked against the same network.

    NVIDIA ModelOpt calibrates on inputs of whole sampling runs. Each layer is then judged alone, and those that cost v
    little for what they compute are quantised. TensorRT takes an fp16 bundle (it has no fp32 attention), and multiplies
    convolutions and products in int8; ONNX Runtime on a CPU products alone.
    """

    bundle: Annotated[Path, tyro.conf.Positional]
    """Bundle folder made by `semantica export`."""
    out: Path
    """Bundle folder to write; must not exist."""
    mode: Literal["int8"] = "int8"
    """Of the numbers that are multiplied."""
    images: Path | None = None
    """Folder of pictures like those that will be varied, to calibrate on; drawn fields without it."""
    target: float = 45.0
    """dB of v over the error that the quantised layers may cost, added up; more leaves more layers as they are."""
    samples: int = 64
    """Inputs of the denoiser to calibrate on, as many from every noise level of the runs."""
    seed: int = 0
    """Of the noise that the runs start from, and of the draws."""

    def check(self) -> "QuantiseConfig":
        """Raises `UserError` for impossible numbers or a place that is taken."""
        if self.samples < 1:
            raise UserError(f"--samples is {self.samples}: give at least 1")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give 0 or more")
        if not self.target > 0:
            raise UserError(f"--target is {self.target}: give decibels above 0")
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
