"""`semantica sample`: variations of pictures from the command line."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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
from semantica.inputs import TEXT
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.bundle import BundlePipeline
from semantica.pipelines.guiding import GuiderOptions, Guiding
from semantica.pipelines.kinds import CHUNK, foreign
from semantica.ranges import marked, nvtx
from semantica.sampling.guiders import Call, Guider
from semantica.sampling.loop import sample as denoise
from semantica.sampling.settings import Sampling
from semantica.solvers import SOLVERS, noise


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
    guidance: float | None = None
    """How far v is led away from that of --guider: weak + guidance * (own - weak); 1 = off. By default 1.5 for models
    of this package, 7.5 for Stable Diffusion and image variations, 5 for SDXL; with tsg 2.5, with auto 2.1."""
    seed: int = 0
    solver: literal_type_from_choices(SOLVERS) = "dpmpp_2m"
    guiding: Guiding = GuiderOptions()
    ip_adapter: Path | None = None
    """IP-Adapter (.safetensors) for a diffusers pipeline; it reads --image."""
    ip_scale: float = 1.0
    """How much the IP-Adapter's picture weighs."""
    lora: Path | None = None
    """LoRA (.safetensors) that is added to the weights of a diffusers pipeline; needs the package peft."""
    lora_scale: float = 1.0
    """How much the LoRA weighs."""
    steer: Path | None = None
    """Self-guidance: a .json file of objects and what shall become of them, see `semantica.steering.file`."""
    engine: literal_type_from_choices(("auto", *BACKENDS)) = "auto"
    """What runs a bundle. A run folder runs in torch: eager in fp32 by default; torch-compile is several times faster
    (bf16 where the processor has it) once it has compiled, which takes from ten seconds to minutes."""
    device: str = "auto"
    """"auto" is a GPU where there is one; for ONNX Runtime, which "auto" runs fp32 and fp16 bundles in, the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of a diffusers pipeline's UNet in torch, or of --engine torch-compile. "auto" is fp32 whatever the files hold,
    for torch-compile bf16 where the processor has it. Encoders and autoencoder of diffusers stay fp32."""
    nvtx: bool = False
    """Mark what a run does as ranges for NVIDIA's profilers: nsys profile -t cuda,nvtx semantica sample ... --nvtx."""

    def check(self) -> "SampleConfig":
        """Raises `UserError` for impossible numbers or a place that is taken."""
        for name in ("n", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        for name in ("guidance", "ip_scale", "lora_scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number")
        self.guiding.check()
        if not self.image and not self.prompt:
            raise UserError("--image and --prompt are empty: give at least one picture or prompt")
        if self.image and self.prompt and len(self.image) not in (1, len(self.prompt)):
            raise UserError(
                f"--image has {len(self.image)} pictures for {len(self.prompt)} prompts: give one, or as many"
            )
        if self.ip_adapter is None and self.ip_scale != 1:
            raise UserError("--ip-scale is nothing without --ip-adapter: give that too")
        if self.lora is None and self.lora_scale != 1:
            raise UserError("--lora-scale is nothing without --lora: give that too")
        if self.steer is not None and (is_bundle(self.model) or self.engine == "torch-compile"):
            what = self.model if is_bundle(self.model) else "--engine torch-compile"
            raise UserError(f"{what} gives no gradients, which --steer needs: sample the run folder, or --engine torch")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give 0 or more")
        if self.out.suffix != ".png" and self.out.exists():
            raise UserError(f"--out {self.out} exists: choose another folder, or a name that ends in .png")
        if self.out.suffix == ".png" and self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder: choose another name")
        return self


def load_pipeline(
    model: Path, device: str = "auto", engine: str = "auto", precision: str = "auto", **additions: Any
) -> VariationPipeline:
    """A run folder, a folder of a diffusers pipeline or a bundle, ready to sample.

    Args:
        device: see `semantica.device.pick_device`; for a bundle `semantica.engines.load_engine`.
        engine: what runs a bundle; for the folders "torch", which "auto" is, or "torch-compile".
        precision: see `SampleConfig`.
        additions: what `semantica.pipelines.unets.UNetPipeline.load` takes besides; None for nothing.

    Raises:
        UserError: as `SemanticaPipeline.from_pretrained`, `UNetPipeline.load` and `load_engine`; or an engine, a
            precision or an addition for something else.
    """
    from semantica.memory import keep_freed_memory

    if engine == "torch-compile":
        cache.keep_compiled()
    other = foreign(model)
    for name in ("ip_adapter", "lora"):
        if additions.get(name) is not None and not other:
            option = name.replace("_", "-")
            raise UserError(f"--{option} goes with the folder of a diffusers pipeline, {model} is none")
    if is_bundle(model):
        if precision != "auto":
            raise UserError(f"--precision {precision}: {model} has the precision that it was exported in")
        keep_freed_memory()
        return BundlePipeline(load_engine(model, engine, device))
    if engine not in ("auto", "torch", "torch-compile"):
        raise UserError(f"--engine {engine} runs a bundle, {model} is none: 'semantica export' first")

    import torch

    from semantica.device import pick_device, pick_precision
    from semantica.pipelines.networks import NetworkPipeline

    place, compiled = pick_device(device), engine == "torch-compile"
    dtype = pick_precision("fp32" if precision == "auto" and not compiled else precision, place)
    if place.type == "cpu":
        if dtype == torch.float16:
            raise UserError("--precision fp16 is for GPUs: take bf16 or fp32 on a CPU")
        keep_freed_memory()
    if other:
        from semantica.pipelines.unets import UNetPipeline

        pipeline: NetworkPipeline = UNetPipeline.load(model, **additions).to(place)
    elif dtype != torch.float32 and not compiled:
        raise UserError(f"--precision {precision} of a run folder goes with --engine torch-compile: give both")
    else:
        pipeline = NetworkPipeline.load(model).to(place)
        pipeline.max_samples = CHUNK
    if dtype != torch.float32 and not compiled:
        pipeline.unet = pipeline.unet.in_precision(dtype)
    pipeline.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    return pipeline.accelerate(dtype) if compiled else pipeline


def variations(
    pipeline: VariationPipeline,
    inputs: list | dict[str, list],
    n: int,
    settings: Sampling,
    guider: Guider | None = None,
    on_step: Callable[[int], object] | None = None,
) -> np.ndarray:
    """`n` variations of each picture, or of each of the values of several inputs: uint8 `[count, n, S, S, 3]`.

    The noise of variation j of picture i depends on (seed, i, j) alone, on no device or batch. What is done about
    pixels out of range is the model's own. on_step: called after each step with the number of samples that made it.
    """
    options = dict(seed=settings.seed, solver=settings.solver, interval=settings.interval, guider=guider)
    if on_step is not None:

        def callback(pipeline: Any, step: int, timestep: Any, state: dict) -> dict:
            on_step(len(state["latents"]))
            return state

        options["callback_on_step_end"] = callback
    made = pipeline(inputs, n, settings.steps, settings.guidance, **options).images
    arrays = np.stack([np.asarray(image) for image in made])
    return arrays.reshape(-1, n, *arrays.shape[1:])


def given(pipeline: VariationPipeline, pictures: list, prompts: Sequence[str]) -> list | dict[str, list | None]:
    """Pictures and prompts as a pipeline takes them. Raises `UserError` where it does not read them."""
    if not prompts and TEXT not in pipeline.inputs:
        return pictures
    whole = pictures * len(prompts) if len(pictures) == 1 and prompts else pictures
    return pipeline.named(whole or None, list(prompts) or None)


def unconditional(
    pipeline: VariationPipeline,
    count: int,
    settings: Sampling,
    guider: Guider | None = None,
    on_step: Callable[[int], object] | None = None,
) -> np.ndarray:
    """`count` images that ignore any condition: uint8 `[count, S, S, 3]`, a function of the seed.

    guider: one that needs no condition leads them by the guidance and interval of the settings; without, both are off.
    on_step: as in `variations`.
    """
    config, denoiser, made = pipeline.scheduler_config, pipeline.denoiser, []
    schedule = schedule_of(config)
    changes = dict(steps=settings.steps, seed=settings.seed, interval=settings.interval)
    alone = Sampling.of({**config, "solver": settings.solver}, guidance=settings.guidance if guider else 1.0, **changes)
    levels = schedule.grid(alone.steps)[1][: alone.steps].astype(np.float32)
    branch = guider.begin(Call(pipeline, None, {}, 1, alone, levels)) if guider else None
    most = pipeline.limit(any(alone.guided())) or CHUNK

    def counted(step: int, z: Array) -> Array:
        if on_step is not None:
            on_step(len(z))
        return z

    for start in range(0, count, most):
        shape = (min(most, count - start), *pipeline.sample_shape)
        z, null = pipeline.array(noise(settings.seed, shape, start)), denoiser.null(shape[0])

        def fresh(step: int, shape: tuple[int, ...] = shape, start: int = start) -> Array:
            return pipeline.array(noise(settings.seed, shape, start, step + 1))

        weak = branch and branch(range(start, start + shape[0]), null)
        z = denoise(denoiser, z, null, None, schedule, alone, fresh, on_step=counted if on_step else None, weak=weak)
        made.append(to_uint8(pipeline.decode(z)))
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
    added = {name: getattr(config, name) for name in ("ip_adapter", "ip_scale", "lora", "lora_scale")}
    steering = None
    if config.steer is not None:
        # here, as bundles are sampled where torch is not
        from semantica.steering.file import read_steering

        steering = read_steering(config.steer)
        steering.pattern.steps(config.steps)
    with marked(nvtx() if config.nvtx else None), failures_of_the_gpu():
        pipeline = load_pipeline(config.model, config.device, config.engine, config.precision, **added)
        if config.guidance is None:
            usual = config.guiding.named.guidance
            config = dataclasses.replace(config, guidance=pipeline.guidance if usual is None else usual)
        settings = Sampling(config.steps, config.solver, config.guidance, config.guiding.interval, seed=config.seed)
        guider = config.guiding.make(
            pipeline, lambda model: load_pipeline(model, config.device, config.engine, config.precision)
        )
        inputs = given(pipeline, pictures, config.prompt)
        if steering is None:
            made = variations(pipeline, inputs, config.n, settings, guider)
        else:
            from semantica.pipelines.steered import steered

            made = steered(pipeline, inputs, config.n, settings, steering, guider)
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
