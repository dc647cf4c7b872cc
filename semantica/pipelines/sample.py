"""`semantica sample`: variations of pictures from the command line."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.extras import literal_type_from_choices

from semantica import cache
from semantica.condition import Array
from semantica.discrete import schedule_of
from semantica.engines import BACKENDS, load_engine
from semantica.engines.bundle import is_bundle
from semantica.errors import UserError, first_line
from semantica.files import write_text, written
from semantica.images import fit, grid, load_image, save_png, to_uint8
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.bundle import BundlePipeline
from semantica.pipelines.kinds import foreign
from semantica.ranges import marked, nvtx
from semantica.sampling.loop import sample as denoise
from semantica.sampling.settings import Sampling
from semantica.solvers import SOLVERS, noise

CHUNK = 64


@dataclass(frozen=True)
class SampleConfig:
    """Make variations of pictures, or pictures of prompts."""

    model: Path
    """Run folder made by `semantica train`, folder of a diffusers pipeline (Stable Diffusion, SDXL, image variations),
    or bundle made by `semantica export` of either."""
    image: tuple[Path, ...] = ()
    """Condition pictures, one or more; beside prompts one for all, or as many."""
    prompt: tuple[str, ...] = ()
    """What to show, for models that read text: one or more."""
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
    ip_adapter: Path | None = None
    """IP-Adapter (.safetensors) for a diffusers pipeline; it reads --image."""
    ip_scale: float = 1.0
    """How much the IP-Adapter's picture weighs."""
    engine: literal_type_from_choices(("auto", *BACKENDS)) = "auto"
    """What runs a bundle. A run folder runs in torch: eager in fp32 by default; torch-compile is several times faster
    (bf16 where the processor has it) once it has compiled, which takes from ten seconds to minutes."""
    device: str = "auto"
    """"auto" is a GPU where there is one; for ONNX Runtime, which "auto" runs fp32 and fp16 bundles in, the CPU."""
    nvtx: bool = False
    """Mark what a run does as ranges for NVIDIA's profilers: nsys profile -t cuda,nvtx semantica sample ... --nvtx."""

    def check(self) -> "SampleConfig":
        """Raises `UserError` for impossible numbers or a place that is taken."""
        for name in ("n", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        for name in ("guidance", "ip_scale"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number")
        if not self.image and not self.prompt:
            raise UserError("--image and --prompt are empty: give at least one picture or prompt")
        if self.image and self.prompt and len(self.image) not in (1, len(self.prompt)):
            raise UserError(
                f"--image has {len(self.image)} pictures for {len(self.prompt)} prompts: give one, or as many"
            )
        if self.ip_adapter is None and self.ip_scale != 1:
            raise UserError("--ip-scale is nothing without --ip-adapter: give that too")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give 0 or more")
        if self.out.suffix != ".png" and self.out.exists():
            raise UserError(f"--out {self.out} exists: choose another folder, or a name that ends in .png")
        if self.out.suffix == ".png" and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder: choose another name")
        return self


def load_pipeline(
    model: Path, device: str = "auto", engine: str = "auto", ip_adapter: Path | None = None, ip_scale: float = 1.0
) -> VariationPipeline:
    """A run folder, a folder of a diffusers pipeline or a bundle, ready to sample.

    Args:
        device: see `semantica.device.pick_device`; for a bundle `semantica.engines.load_engine`.
        engine: what runs a bundle; for the folders "torch", which "auto" is, or "torch-compile".
        ip_adapter, ip_scale: see `semantica.pipelines.unets.UNetPipeline.load`; for such folders only.

    Raises:
        UserError: as `SemanticaPipeline.from_pretrained`, `UNetPipeline.load` and `load_engine`, or an engine or an
            adapter for something else.
    """
    from semantica.memory import keep_freed_memory

    if engine == "torch-compile":
        cache.keep_compiled()
    other = foreign(model)
    if ip_adapter is not None and not other:
        raise UserError(f"--ip-adapter goes with the folder of a diffusers pipeline, {model} is none")
    if is_bundle(model):
        keep_freed_memory()
        return BundlePipeline(load_engine(model, engine, device))
    if engine not in ("auto", "torch", "torch-compile"):
        raise UserError(f"--engine {engine} runs a bundle, {model} is none: 'semantica export' first")

    import torch

    from semantica.device import pick_device
    from semantica.pipelines.networks import NetworkPipeline

    place = pick_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    if other:
        from semantica.pipelines.unets import UNetPipeline

        pipeline: NetworkPipeline = UNetPipeline.load(model, ip_adapter, ip_scale).to(place)
    else:
        pipeline = NetworkPipeline.load(model).to(place)
    pipeline.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    pipeline.max_samples = CHUNK
    return pipeline.accelerate() if engine == "torch-compile" else pipeline


def variations(pipeline: VariationPipeline, inputs: list | dict[str, list], n: int, settings: Sampling) -> np.ndarray:
    """`n` variations of each picture, or of each of the values of several inputs: uint8 `[count, n, S, S, 3]`.

    The noise of variation j of picture i depends on (seed, i, j) alone, on no device or batch. What is done about
    pixels out of range is the model's own.
    """
    options = {"seed": settings.seed, "solver": settings.solver, "interval": settings.interval}
    made = pipeline(inputs, n, settings.steps, settings.guidance, **options).images
    arrays = np.stack([np.asarray(image) for image in made])
    return arrays.reshape(-1, n, *arrays.shape[1:])


def given(pictures: list, prompts: Sequence[str]) -> list | dict[str, list]:
    """Pictures and prompts as a pipeline takes them."""
    if not prompts:
        return pictures
    whole = pictures * len(prompts) if len(pictures) == 1 else pictures
    return {"text": list(prompts), **({"image": whole} if pictures else {})}


def unconditional(pipeline: VariationPipeline, count: int, settings: Sampling) -> np.ndarray:
    """`count` images that ignore any condition: uint8 `[count, S, S, 3]`, a function of the seed."""
    config, denoiser, made = pipeline.scheduler_config, pipeline.denoiser, []
    schedule = schedule_of(config)
    alone = Sampling.of({**config, "solver": settings.solver}, steps=settings.steps, guidance=1.0)
    for start in range(0, count, CHUNK):
        shape = (min(CHUNK, count - start), *pipeline.sample_shape)
        z, null = pipeline.array(noise(settings.seed, shape, start)), denoiser.null(shape[0])

        def fresh(step: int, shape: tuple[int, ...] = shape, start: int = start) -> Array:
            return pipeline.array(noise(settings.seed, shape, start, step + 1))

        made.append(to_uint8(denoise(denoiser, z, null, None, schedule, alone, fresh)))
    return np.concatenate(made)


def names(config: SampleConfig) -> list[str]:
    """What single pictures are named after: the condition's file, or the first words of the prompt."""
    if not config.prompt:
        return [path.stem for path in config.image]
    return ["-".join(re.findall(r"\w+", prompt)[:6])[:60] or "empty" for prompt in config.prompt]


@contextmanager
def failures_of_the_gpu() -> Iterator[None]:
    """What torch raises for a full or failing GPU becomes one line; torch itself may not be installed."""
    try:
        yield
    except RuntimeError as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "OutOfMemoryError" in kinds:
            raise UserError(f"no memory left ({first_line(error)}): lower -n, or --device cpu") from error
        if "AcceleratorError" in kinds or "CUDA error" in first_line(error):
            raise UserError(f"the GPU failed ({first_line(error)}): see nvidia-smi, or --device cpu") from error
        raise


def sample(config: SampleConfig) -> Path:
    """Write the variations and, beside them, the resolved configuration; returns where they are.

    Raises:
        UserError: a picture or the model cannot be used, or impossible numbers; nothing is written then.
    """
    config.check()
    pictures = [load_image(path) for path in config.image]
    settings = Sampling(config.steps, config.solver, config.guidance, seed=config.seed)
    with marked(nvtx() if config.nvtx else None), failures_of_the_gpu():
        pipeline = load_pipeline(config.model, config.device, config.engine, config.ip_adapter, config.ip_scale)
        inputs = given(pictures, config.prompt)
        made = variations(pipeline, inputs, config.n, settings)
    record = json.dumps(dataclasses.asdict(config), indent=1, default=str)
    size = made.shape[2]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.out.suffix == ".png":
        shown = inputs["image"] if isinstance(inputs, dict) and pictures else pictures
        rows = [[fit(picture, size), *row] for picture, row in zip(shown, made, strict=True)] if shown else list(made)
        save_png(grid(rows, apart=4), config.out)
        write_text(config.out.with_suffix(".json"), record)
    else:
        with written(config.out, "refuse") as aside:
            aside.mkdir()
            for i, (name, row) in enumerate(zip(names(config), made, strict=True)):
                for j, picture in enumerate(row):
                    save_png(picture, aside / f"{i:03d}-{name}-{j}.png")
            (aside / "config.json").write_text(record)
    print(f"{made.shape[0] * made.shape[1]} variations in {config.out}")
    return config.out
