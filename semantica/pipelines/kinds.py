"""Which kind of pipeline a folder holds, and how such are usually sampled; light, so that asking imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semantica.files import read_json

INDEX = "model_index.json"
# what the classes of pipelines that are known here begin with
FAMILIES = ("StableDiffusion", "VersatileDiffusion")
# samples that are denoised at once, and latent pixels: 16 samples of Stable Diffusion 1.5, 4 of SDXL
CHUNK, PIXELS = 64, 16 * 64**2


def foreign(folder: Path) -> bool:
    """Whether it is a pipeline of diffusers' own, of the Stable Diffusion family."""
    index = folder / INDEX
    return index.is_file() and str(read_json(index).get("_class_name", "")).startswith(FAMILIES)


def usual_guidance(unet: Mapping[str, Any]) -> float:
    """The default of diffusers' pipelines over a UNet of this configuration: SDXL's, or Stable Diffusion's."""
    return 5.0 if unet.get("addition_embed_type") == "text_time" else 7.5


def at_once(side: int) -> int:
    """How many samples of latents `[side, side]` are denoised at once: activations grow with their pixels."""
    return max(1, min(CHUNK, PIXELS // side**2))
