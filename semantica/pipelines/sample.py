"""`semantica sample`: variations of pictures from the command line."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.extras import literal_type_from_choices

from semantica.engines import BACKENDS, load_engine
from semantica.errors import UserError
from semantica.files import write_text, written
from semantica.sampling.settings import Sampling
from semantica.solvers import SOLVERS

CHUNK = 64


@dataclass(frozen=True)
class SampleConfig:
    """Make variations of pictures."""

    model: Path
    """Run folder made by `semantica train`, or bundle made by `semantica export`."""
    image: tuple[Path, ...]
    """Condition pictures, one or more."""
    out: Path = Path("variations.png")
    """A .png gets one grid, each condition first in its row; any other name becomes a folder of single pictures."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """Variations of each picture."""
    steps: int = 20
    """Sampling steps."""
    guidance: float = 1.5
    """Classifier-free guidance, uncond + guidance * (cond - uncond); 1 = off."""
    seed: int = 0
    solver: literal_type_from_choices(SOLVERS) = "dpmpp_2m"
    engine: literal_type_from_choices(("auto", *BACKENDS)) = "auto"
    """What runs a bundle. A run folder runs in torch: eager in fp32 by default; torch-compile is several times faster
    (bf16 where the processor has it) once it has compiled, which takes from ten seconds to minutes."""
    device: str = "auto"

    def check(self) -> "SampleConfig":
        """Raises `UserError` for impossible numbers or a place that is taken."""
        for name in ("n", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        if not self.image:
            raise UserError("--image is empty: give at least one picture")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give 0 or more")
        if self.out.suffix != ".png" and self.out.exists():
            raise UserError(f"--out {self.out} exists: choose another folder, or a name that ends in .png")
        if self.out.suffix == ".png" and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder: choose another name")
        return self


def make_variations(config: SampleConfig, pictures: list) -> np.ndarray:
    """Variations from a run folder or a bundle, which start from the same noise: uint8 `[pictures, n, S, S, 3]`."""
    from semantica.engines.bundle import is_bundle

    if is_bundle(config.model):
        from semantica.memory import keep_freed_memory
        from semantica.pipelines.bundle import BundlePipeline

        keep_freed_memory()
        pipeline = BundlePipeline(load_engine(config.model, config.engine, config.device))
    elif config.engine not in ("auto", "torch", "torch-compile"):
        raise UserError(f"--engine {config.engine} runs a bundle, {config.model} is none: 'semantica export' first")
    else:
        pipeline = load_pipeline(config.model, config.device)
        if config.engine == "torch-compile":
            pipeline.accelerate()
    settings = Sampling(config.steps, config.solver, config.guidance, seed=config.seed)
    return variations(pipeline, pictures, config.n, settings)


def load_pipeline(model: Path, device_name: str):
    """A pipeline on a device, ready to sample. Raises `UserError` as `NetworkPipeline.load`."""
    import torch

    from semantica.device import pick_device
    from semantica.memory import keep_freed_memory
    from semantica.pipelines.networks import NetworkPipeline

    device = pick_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    pipeline = NetworkPipeline.load(model).to(device)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.max_samples = CHUNK
    return pipeline


def variations(pipeline, pictures: list, n: int, settings: Sampling) -> np.ndarray:
    """`n` variations of each picture: uint8 `[len(pictures), n, S, S, 3]`.

    The noise of variation j of picture i depends on (seed, i, j) alone, on no device or batch. What is done about
    pixels out of range is the model's own.
    """
    made = pipeline(
        pictures, n, settings.steps, settings.guidance,
        seed=settings.seed, solver=settings.solver, interval=settings.interval,
    ).images  # fmt: skip
    arrays = np.stack([np.asarray(image) for image in made])
    return arrays.reshape(len(pictures), n, *arrays.shape[1:])


def unconditional(pipeline, count: int, settings: Sampling) -> np.ndarray:
    """`count` images that ignore any condition: uint8 `[count, S, S, 3]`, a function of the seed."""
    import torch

    from semantica.images import to_uint8
    from semantica.sampling.loop import sample
    from semantica.solvers import noise

    unet, made = pipeline.unet, []
    config = {**pipeline.scheduler.config, "solver": settings.solver}
    alone = Sampling.of(config, steps=settings.steps, guidance=1.0)
    for start in range(0, count, CHUNK):
        shape = (min(CHUNK, count - start), *pipeline.sample_shape)
        z = torch.from_numpy(noise(settings.seed, shape, start)).to(unet.device)
        with torch.no_grad():
            made.append(to_uint8(sample(unet, z, unet.null(len(z)), None, pipeline.scheduler.schedule, alone)))
    return np.concatenate(made)


def sample(config: SampleConfig) -> Path:
    """Write the variations and, beside them, the resolved configuration; returns where they are.

    Raises:
        UserError: a picture or the model cannot be used, or impossible numbers; nothing is written then.
    """
    from semantica.images import fit, grid, load_image, save_png

    config.check()
    pictures = [load_image(path) for path in config.image]
    made = make_variations(config, pictures)
    record = json.dumps(dataclasses.asdict(config), indent=1, default=str)
    size = made.shape[2]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.out.suffix == ".png":
        rows = [[fit(picture, size), *row] for picture, row in zip(pictures, made, strict=True)]
        save_png(grid(rows, apart=4), config.out)
        write_text(config.out.with_suffix(".json"), record)
    else:
        with written(config.out, "refuse") as aside:
            aside.mkdir()
            for i, (path, row) in enumerate(zip(config.image, made, strict=True)):
                for j, picture in enumerate(row):
                    save_png(picture, aside / f"{i:03d}-{path.stem}-{j}.png")
            (aside / "config.json").write_text(record)
    print(f"{made.shape[0] * made.shape[1]} variations in {config.out}")
    return config.out
