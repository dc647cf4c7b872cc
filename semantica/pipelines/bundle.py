"""Pictures in, variations out, over any engine; numpy and Pillow only where the engine is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from semantica import solvers
from semantica.condition import concatenate
from semantica.engines.base import Engine
from semantica.errors import UserError
from semantica.images import fit, to_planes, to_uint8

OUTPUTS = ("pil", "np", "pt")
# samples of one call, where the engine sets no limit
CHUNK = 64


@dataclass(frozen=True)
class Variations:
    """images: Pillow images, or an array `[B * n, S, S, 3]` ("np") or tensor `[B * n, 3, S, S]` ("pt") in [0, 1]."""

    images: Any


class BundlePipeline:
    """Image variations from a bundle, called like `SemanticaPipeline`.

    Args:
        engine: from `semantica.engines.load_engine`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        config = dict(engine.manifest["model"]["scheduler"])
        if config.pop("class", None) != "SemanticaScheduler":
            raise UserError(f"{engine.bundle.folder} has another kind of scheduler: export the bundle again")
        self.solver = config["solver"]
        self.thresholding = config["thresholding"], config["clip_range"], config["dynamic_thresholding_ratio"]
        self.schedule = solvers.Schedule(
            config["image_size"], config["reference"], config["logsnr_min"], config["logsnr_max"]
        )

    @property
    def image_size(self) -> int:
        """Side in pixels of what is made."""
        return self.engine.bundle.shapes["latent"]

    def __call__(
        self,
        image: Image.Image | Sequence[Image.Image],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        seed: int = 0,
        latents: Any = None,
        output_type: str = "pil",
        solver: str | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Variations:
        """Make variations.

        Args:
            image: a picture, or a list of pictures, one sample each.
            num_images_per_prompt: variations of each picture; they follow one another in the result.
            num_inference_steps: sampling steps.
            guidance_scale: classifier-free guidance, uncond + scale * (cond - uncond); 1 = off.
            seed: of the noise; that of variation j of picture i depends on (seed, i, j) alone, on no engine or batch.
            latents: float32 `[B * num_images_per_prompt, 3, S, S]` starting noise instead of drawing it.
            output_type: "pil", "np" or "pt", see `Variations`.
            solver: another one than the run's: dpmpp_2m, ddim or ddpm.
            interval: fractions of the run between which guidance is on (arXiv 2404.07724).

        Raises:
            UserError: impossible numbers, latents of the wrong shape, or a batch that the engine does not take.
        """
        if output_type not in OUTPUTS:
            raise UserError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUTS)}")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt={num_images_per_prompt} must be at least 1")
        pictures = [image] if isinstance(image, Image.Image) else list(image)
        if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
            raise UserError("image must be a picture or a list of pictures, one for each sample")
        n, size = num_images_per_prompt, self.image_size
        shape = (self.engine.bundle.shapes["channels"], size, size)
        samples = [(i, j) for i in range(len(pictures)) for j in range(n)]
        if latents is None:
            latents = np.stack([solvers.noise(seed, shape, *sample) for sample in samples])
        elif tuple(latents.shape) != (len(samples), *shape):
            raise UserError(f"latents have shape {tuple(latents.shape)}: expected {[len(samples), *shape]}")
        plan = solvers.make_plan(solver or self.solver, self.schedule.grid(num_inference_steps)[1])
        limit = self.limit(guidance_scale)
        group = max(1, limit // n)
        side, made = self.engine.bundle.shapes["image"], []
        for first in range(0, len(pictures), group):
            part = pictures[first : first + group]
            planes = to_planes([fit(picture.convert("RGB"), side) for picture in part])
            condition = self.engine.condition(self.array(planes))
            last = (first + len(part)) * n
            for start in range(first * n, last, limit):
                stop = min(last, start + limit)
                rows = [i - first for i, _ in samples[start:stop]]
                source = Noise(self.array, seed, shape, samples[start:stop])
                made.append(self.sample(latents[start:stop], condition, rows, plan, guidance_scale, interval, source))
        return Variations(finish(concatenate(made), output_type))

    def limit(self, guidance: float) -> int:
        """How many samples one call of the engine takes. Raises `UserError` where that is none."""
        branches = 1 if guidance == 1 else 2
        limit = CHUNK if self.engine.max_batch is None else self.engine.max_batch // branches
        if limit < 1:
            raise UserError(f"this engine takes a batch of {self.engine.max_batch}, guidance needs 2: set it to 1")
        return limit

    def sample(self, latents, condition, rows: list[int], plan, guidance: float, interval, source: "Noise") -> Any:
        """One run of the loop: the rows of a condition, one for each of the latents."""
        own = condition.map(lambda a: a[rows])
        return self.engine.sample(self.array(latents), own, plan, guidance, interval, *self.thresholding, source)

    def array(self, values: Any) -> Any:
        """Float32 values as the engine takes them, on its device."""
        if self.engine.array == "numpy":
            return np.asarray(values, np.float32)
        import torch

        return torch.as_tensor(values, dtype=torch.float32, device=self.engine.device)


@dataclass(frozen=True)
class Noise:
    """Fresh noise of each step, for solvers that add it: a function of (seed, sample, step) alone."""

    array: Callable[[Any], Any]
    seed: int
    shape: tuple[int, ...]
    samples: Sequence[tuple[int, int]]

    def __call__(self, step: int) -> Any:
        return self.array(np.stack([solvers.noise(self.seed, self.shape, *s, step + 1) for s in self.samples]))


def finish(z: Any, output_type: str) -> Any:
    """Images `[B, 3, S, S]` around [-1, 1] in the form that was asked for."""
    if output_type == "pil":
        return [Image.fromarray(array) for array in to_uint8(z)]
    unit = ((z + 1) / 2).clip(0, 1)
    if output_type == "pt":
        import torch

        return torch.as_tensor(unit)
    unit = unit if isinstance(unit, np.ndarray) else unit.float().cpu().numpy()
    return unit.transpose(0, 2, 3, 1)
