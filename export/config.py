"""Options of `semantica export` and `semantica build`; light, so that `--help` imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from semantica.errors import UserError


@dataclass(frozen=True)
class ExportConfig:
    """Turn a trained run folder into a bundle: ONNX graphs, weights and a manifest, checked against the network."""

    model: Path
    """Run folder made by `semantica train`."""
    out: Path
    """Bundle folder to write; must not exist."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of weights and activations. Latents, noise levels and the statistics of norms stay fp32."""
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
