"""AOTInductor packages: compiled by PyTorch ahead of time, run without the model's code."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from semantica.engines.base import GraphEngine
from semantica.engines.built import open_built
from semantica.engines.bundle import NULL, Bundle
from semantica.errors import UserError

PACKAGES = {"encode": "condition.pt2", "denoise": "denoise.pt2", "decode": "decode.pt2"}


def architecture() -> str:
    """What a package is compiled for: processor family and the vector instructions that this torch uses."""
    return f"cpu-{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}"


def load(bundle: Bundle, backend: str, device: str) -> "InductorEngine":
    """Raises `UserError` as `open_built`, and for another device than the CPU."""
    if device not in ("auto", "cpu"):
        raise UserError(f"engine 'inductor' is built for the CPU, not for {device!r}: use --device cpu")
    return InductorEngine(bundle, *open_built(bundle, backend, architecture(), torch.__version__))


class InductorEngine(GraphEngine):
    """Packages: native code, so load only what you built or trust."""

    backend, array = "inductor", "torch"

    def __init__(self, bundle: Bundle, folder: Path, manifest: dict[str, Any]):
        super().__init__(bundle)
        self.arithmetic = bundle.precision
        self.max_batch = manifest["profile"]["max"]
        there = {name: folder / file for name, file in PACKAGES.items() if file in manifest["files"]}
        self.packages = {name: torch._inductor.aoti_load_package(str(path)) for name, path in there.items()}
        self.null_arrays = load_file(bundle.folder / NULL)

    @torch.inference_mode()
    def encoder(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pairs, emb = self.packages["encode"](*(inputs[name] for name in self.bundle.inputs))
        return {"emb": emb, **{f"{kind}.{i}": a for i, pair in enumerate(pairs) for kind, a in zip("kv", pair)}}

    @torch.inference_mode()
    def denoiser(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pairs = [(inputs[f"k.{i}"], inputs[f"v.{i}"]) for i in range(self.bundle.shapes["blocks"])]
        return {"v": self.packages["denoise"](inputs["z"], inputs["logsnr"], pairs, inputs["emb"])}

    @torch.inference_mode()
    def decoder(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"images": self.packages["decode"](inputs["latents"])}
