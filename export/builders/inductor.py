"""AOTInductor packages from a bundle's weights: compiled for this machine's CPU, model code not needed to run them."""

from pathlib import Path
from typing import Any

import torch

from semantica.engines import Bundle, network
from semantica.engines.inductor import PACKAGES
from semantica.errors import ArtifactError
from semantica.export.program import MAX_BATCH, capture, quiet


def compile_packages(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """Compile both halves. Raises `ArtifactError` where the compiler fails."""
    unet, encoder = network.build(bundle, torch.device("cpu"))
    captured = capture(unet, encoder, bundle.precision)
    for name, file in PACKAGES.items():
        try:
            with quiet(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(getattr(captured, name), package_path=str(folder / file))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"inductor cannot compile {file} ({type(error).__name__}: {reason})") from error
    return {"profile": {"min": 1, "opt": 2, "max": MAX_BATCH}, "backend_version": torch.__version__}
