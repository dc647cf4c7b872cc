"""Which kind of pipeline a folder holds; light, so that asking imports no torch."""

from pathlib import Path

from semantica.files import read_json

INDEX = "model_index.json"


def foreign(folder: Path) -> bool:
    """Whether it is a pipeline of diffusers' own, of the Stable Diffusion family."""
    index = folder / INDEX
    return index.is_file() and str(read_json(index).get("_class_name", "")).startswith("StableDiffusion")
