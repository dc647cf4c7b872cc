"""`semantica edit`: a picture changed from one condition to another, from the command line."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from semantica.engines.bundle import is_bundle
from semantica.errors import UserError
from semantica.files import write_text
from semantica.images import fit, grid, load_image, save_png, to_uint8
from semantica.pipelines.kinds import foreign

if TYPE_CHECKING:
    from torch import Tensor

    from semantica.editing.scores import Editing

# pictures of a strip, the first and the last among them
STRIP = 9
# classifier-free guidance: the authors', and what `semantica demo` samples its run with
GUIDANCE_UNET, GUIDANCE_RUN = 7.5, 4.0


@dataclass(frozen=True)
class EditConfig:
    """Edit a picture by a model's scores, with no training: from one prompt, or one picture's content, to another.

    Score distillation (sds, arXiv 2209.14988), delta denoising score (dds, 2304.07090) and contrastive denoising score
    (cds, 2311.18608), which is to keep the layout.
    """

    model: Path
    """Run folder made by `semantica train`, or folder of a diffusers pipeline (Stable Diffusion, SDXL, image
    variations)."""
    image: Path
    """The picture to edit; the square in its middle is taken."""
    prompt_from: str | None = None
    """What it shows, for models that read text."""
    prompt_to: str | None = None
    """What it shall show."""
    to: Path | None = None
    """A picture of what it shall show, for models that read pictures."""
    method: Literal["cds", "dds", "sds"] = "cds"
    out: Path = Path("edited.png")
    """A .png; the resolved configuration is written beside it."""
    strip: Path | None = None
    """A .png with the picture as it changes, in steps from the first to the last."""
    iterations: int = 200
    guidance: float | None = None
    """Classifier-free guidance, uncond + guidance * (cond - uncond); by default 7.5 for diffusers pipelines, 4 for
    run folders."""
    rate: float = 0.1
    """Of gradient descent; the same change per iteration at any size."""
    w_dds: float = 1.0
    """Weight of the scores."""
    w_cut: float | None = None
    """Weight of the contrastive loss of cds: higher keeps more of the layout and edits less; by default 3."""
    patches: int | None = None
    """Patches that the contrastive loss compares in each layer; by default 256."""
    patch_sizes: tuple[int, ...] | None = None
    """Their sides, in places of the layer; by default 1 2."""
    temperature: float | None = None
    """Of the contrastive loss; by default 0.07."""
    levels: tuple[float, float] = (0.05, 0.95)
    """Noise levels that are drawn, as fractions of the training's times."""
    seed: int = 0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the network; the picture and its changes stay fp32. "auto" is bf16 on a GPU that has it, else fp32."""
    checkpoint: bool = False
    """Compute blocks again for the gradient of cds instead of storing them: less memory, more time."""
    device: str = "auto"

    def check(self) -> "EditConfig":
        """Raises `UserError` for options that say nothing, or a place that is taken."""
        for name in ("w_cut", "patches", "patch_sizes", "temperature"):
            if self.method != "cds" and getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is nothing for {self.method}: leave it out, or take cds")
        if self.method == "sds" and self.prompt_from is not None:
            raise UserError("--prompt-from is nothing for sds, which knows the target alone: leave it out")
        for name in ("guidance", "w_cut", "rate", "w_dds", "temperature", "levels"):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and not math.isfinite(value):
                    raise UserError(f"--{name.replace('_', '-')} is {value}: give a number")
        for name in ("out", "strip"):
            path = getattr(self, name)
            if path is not None and (path.suffix != ".png" or path.is_dir()):
                raise UserError(f"--{name} {path} is no name that ends in .png: give one")
        taken = {"--image": self.image, "--to": self.to, "--out": self.out, "--strip": self.strip}
        for name, others in (("out", ("--image", "--to")), ("strip", ("--image", "--to", "--out"))):
            path = getattr(self, name)
            for other in others:
                if path is not None and taken[other] is not None and path.resolve() == taken[other].resolve():
                    raise UserError(f"--{name} {path} is {other} too: give another name")
        if is_bundle(self.model):
            raise UserError(
                f"{self.model} is a bundle, whose engines give no gradients: give the run folder that it was made of"
            )
        return self

    def settings(self) -> "Editing":
        """What was asked for, and the defaults of the rest. Raises `UserError` for impossible numbers."""
        from semantica.editing.scores import Editing

        guidance = GUIDANCE_UNET if foreign(self.model) else GUIDANCE_RUN
        given = {
            "guidance": guidance if self.guidance is None else self.guidance,
            "w_cut": self.w_cut,
            "patches": self.patches,
            "sizes": self.patch_sizes,
            "temperature": self.temperature,
        }
        return Editing(
            self.method, self.iterations, self.rate, w_dds=self.w_dds, interval=self.levels, seed=self.seed,
            **{name: value for name, value in given.items() if value is not None},
        )  # fmt: skip


class Strip:
    """Pictures of an edit on its way, `STRIP` of them at equal distances, the last one the result.

    decode: what is edited `[1, C, S, S]` to images. iterations: of the edit.
    """

    def __init__(self, decode: "Callable[[Tensor], Tensor]", iterations: int):
        self.decode = decode
        self.kept = set(np.linspace(0, iterations, STRIP).round().astype(int)[1:] - 1)
        self.pictures: list[np.ndarray] = []

    def __call__(self, i: int, z: "Tensor") -> None:
        if i in self.kept:
            self.pictures.append(to_uint8(self.decode(z))[0])


def inputs_of(config: EditConfig, reads: Mapping[str, bool], picture: Image.Image) -> dict[str, list[Any]]:
    """What conditions the source and the target, by input.

    reads: for each input whether it takes pictures; else it takes texts.

    Raises:
        UserError: a prompt or a picture is missing, or there is nothing that reads it.
    """
    texts, pictures = not all(reads.values()), any(reads.values())
    given = {"--prompt-from": config.prompt_from, "--prompt-to": config.prompt_to}
    if not texts and any(value is not None for value in given.values()):
        raise UserError(
            f"{config.model} reads no text: give --to, a picture of what --image shall show, for the prompts"
        )
    if not pictures and config.to is not None:
        raise UserError(f"{config.model} reads no pictures: give --prompt-from and --prompt-to for --to")
    if texts:
        for name in ("--prompt-to",) if config.method == "sds" else given:
            if given[name] is None:
                raise UserError(f"{name} is missing: {config.model} reads text, and {config.method} needs it")
    elif config.to is None:
        raise UserError(f"--to is missing: {config.model} reads pictures, give one of what --image shall show")
    other = picture if config.to is None else load_image(config.to)
    # sds reads no source: any text that the model knows
    prompts = [config.prompt_to if config.prompt_from is None else config.prompt_from, config.prompt_to]
    return {name: [picture, other] if takes else prompts for name, takes in reads.items()}


def writable(name: str, folder: Path) -> None:
    """Before the work: whether a folder takes files, or can be made. Raises `UserError` where it does not."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{name}: nothing can be written in {there}: choose another place")


def edit(config: EditConfig) -> Path:
    """Write the edited picture, its configuration and the strip; returns where the picture is.

    Raises:
        UserError: a picture or the model cannot be used, a prompt or picture is missing or too many, impossible
            numbers, or the picture is finite no more; nothing is written then.
    """
    settings, picture = config.check().settings(), load_image(config.image)
    for name, path in (("--out", config.out), ("--strip", config.strip)):
        if path is not None:
            writable(name, path.parent)

    from semantica.device import pick_device
    from semantica.editing.pictures import edit_pictures, in_precision
    from semantica.model.conditioner import encoders_of
    from semantica.pipelines.sample import failures_of_the_gpu, load_pipeline

    if config.precision == "fp16" and pick_device(config.device).type == "cpu":
        raise UserError("--precision fp16 is for GPUs: take bf16 or fp32 on a CPU")
    with failures_of_the_gpu():
        pipeline = load_pipeline(config.model, config.device)
        reads = {name: hasattr(part, "image_size") for name, part in encoders_of(pipeline.encoder).items()}
        inputs = inputs_of(config, reads, picture)
        in_precision(pipeline, config.precision)
        if config.checkpoint:
            network = pipeline.denoiser
            getattr(network, "module", network).enable_gradient_checkpointing()
        strip = Strip(pipeline.decode, config.iterations) if config.strip else None
        with tqdm(total=config.iterations, desc=config.method, unit="it") as bar:

            def on_step(i: int, z: "Tensor") -> None:
                bar.update()
                if strip is not None:
                    strip(i, z)

            made = edit_pictures(pipeline, [picture], inputs, settings, on_step)[0]
    for path in (config.out, config.strip):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    save_png(made, config.out)
    write_text(config.out.with_suffix(".json"), json.dumps(dataclasses.asdict(config), indent=1, default=str))
    if strip is not None:
        save_png(grid([[fit(picture, len(made)), *strip.pictures]], apart=4), config.strip)
    print(
        f"{picture.width} x {picture.height} edited by {config.iterations} iterations of {config.method}: {config.out}"
    )
    return config.out
