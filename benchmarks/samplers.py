"""Who is raced in sampling: how each implementation is built from a run folder, and from its exported bundle.

Every implementation is `(images, noise, steps, guidance) -> images`, float32 numpy arrays `[B, 3, S, S]` in and out,
so that encoding, copies between devices and waiting for the device are inside whatever is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantica.benchmarks.compile_only import resolve

Call = Callable[[np.ndarray, np.ndarray, int, float], np.ndarray]


@dataclass(frozen=True)
class Build:
    """Where an implementation finds its model, and where it is to run.

    bundle: of the same model, in the precision that the implementation asks for; None where nothing was exported.
    """

    folder: Path
    device: str
    quick: bool
    bundle: Path | None = None


def load(build: Build):
    """The pipeline in fp32, on its device."""
    from semantica.pipeline import SemanticaPipeline

    return SemanticaPipeline.from_pretrained(build.folder).to(build.device)


def reference(build: Build) -> tuple[Call, str]:
    """The public pipeline in fp32, through diffusers' scheduler and guider: what the others are compared with."""
    import torch

    pipeline = load(build)
    pipeline.set_progress_bar_config(disable=True)

    def run(images, noise, steps, guidance):
        out = pipeline(
            torch.from_numpy(images), num_inference_steps=steps, guidance_scale=guidance,
            latents=torch.from_numpy(noise), output_type="pt",
        )  # fmt: skip
        return out.images.cpu().numpy() * 2 - 1

    return run, "fp32"


def ladder(rung: str) -> Callable[[Build], tuple[Call, str]]:
    """A rung of the ladder."""

    def builder(build: Build) -> tuple[Call, str]:
        from semantica.benchmarks.stock import rungs, stock_sampler

        switches = rungs(build.device)[rung]
        return stock_sampler(load(build), switches), "bf16" if switches.bf16 else "fp32"

    return builder


def strong(build: Build) -> tuple[Call, str]:
    import dataclasses

    from semantica.benchmarks.stock import STRONG, stock_sampler

    return stock_sampler(load(build), dataclasses.replace(STRONG, autotune=not build.quick)), "bf16"


def fast(compile: str, graphs: bool = False, half: bool = True) -> Callable[[Build], tuple[Call, str]]:
    """Ours in PyTorch."""

    def builder(build: Build) -> tuple[Call, str]:
        import torch

        from semantica.fast_sampler import FastSampler
        from semantica.solvers import make_plan

        pipeline = load(build)
        dtype = torch.bfloat16 if half else torch.float32
        unet, encoder, scheduler = pipeline.unet, pipeline.encoder, pipeline.scheduler
        sampler = FastSampler(unet, dtype, compile, graphs)

        @torch.no_grad()
        def run(images, noise, steps, guidance):
            tokens = encoder(torch.from_numpy(images).to(build.device))
            condition = unet.condition(dict.fromkeys(unet.stream_names, tokens))
            plan = make_plan(scheduler.config.solver, scheduler.schedule.grid(steps)[1])
            z = torch.from_numpy(noise).to(build.device)
            return sampler(z, condition, unet.null_condition(len(noise)), plan, guidance).cpu().numpy()

        return run, "bf16" if half else "fp32"

    return builder


OURS = "+ rearranged"
IMPLEMENTATIONS: dict[str, Callable[[Build], tuple[Call, str]]] = {
    "reference": reference,
    "plain": ladder("plain"),
    "strong": strong,
    "torch": fast("network", graphs=True),
    "torch-blocks": fast("blocks", graphs=True),
    "torch-eager": fast("none"),
}
RACED = ("plain", "strong", "torch")
# what implementations need that may not be installed
PACKAGES: dict[str, str] = {}


def ladder_names(device: str) -> list[str]:
    from semantica.benchmarks.stock import rungs

    return [*rungs(device), OURS, *(["+ graph"] if device == "cuda" else [])]


def builder_of(name: str) -> Callable[[Build], tuple[Call, str]]:
    """By name: raced, a rung of the ladder, or "module:function" that is called as the builders here are.

    Raises:
        UserError: no such module or function.
    """
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    if name == OURS:
        return fast("network")
    if name == "+ graph":
        return fast("network", graphs=True)
    return ladder(name) if name.startswith("+") else resolve(name)
