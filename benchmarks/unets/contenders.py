"""Who is raced on public UNets and decoders: stock diffusers, `semantica.accelerate`, the denoiser made of it, engines.

Each is `(content, steps, guidance) -> array`: from noise and tokens to latents by DDIM, or from latents to pictures,
float32 numpy in and out, so that whatever a call costs is inside what is timed.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from semantica.benchmarks.harness.ladder import cumulative
from semantica.benchmarks.harness.process import resolve
from semantica.benchmarks.unets.engines import ENGINES
from semantica.benchmarks.unets.models import Content, load_unet, scheduler_of
from semantica.condition import Stream
from semantica.device import pick_precision
from semantica.discrete import DiscreteSchedule
from semantica.fused.accelerate import accelerate
from semantica.fused.denoiser import UNetDenoiser
from semantica.pipelines.unets import part_of
from semantica.sampling.compiled import CompiledDenoiser
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling

Call = Callable[[Content, int, float], np.ndarray]


@dataclass(frozen=True)
class Switches:
    """In the order of the ladder: each rung has all switches up to its own."""

    channels_last: bool = False
    half: bool = False
    """bf16, where the processor has instructions for it."""
    compile: bool = False
    fused: bool = False
    """`semantica.accelerate`."""
    condition_once: bool = False
    """`UNetDenoiser`: keys and values of a run made before its first step. Of UNets only."""
    autotune: bool = False
    """The compiler's search for the fastest kernels, with the weights as constants on a CPU: many minutes."""


@dataclass(frozen=True)
class Build:
    """Where an implementation finds its model, and where it is to run; stage: "unet" or "decoder".

    bundle: of the same model, for those of `ENGINES`.
    """

    folder: Path
    stage: str
    adapter: str
    device: str
    bundle: Path | None = None


@dataclass(frozen=True)
class Contender:
    """An implementation by its switches; raced: unless others are asked for."""

    switches: Switches
    raced: bool = True
    unet_only: bool = False


STRONG = Switches(channels_last=True, half=True, compile=True)
CONTENDERS = {
    "plain": Contender(Switches()),
    "plain-half": Contender(Switches(channels_last=True, half=True), raced=False),
    "strong-fp32": Contender(Switches(channels_last=True, compile=True), raced=False),
    "accelerate-fp32": Contender(Switches(fused=True)),
    "accelerate": Contender(Switches(channels_last=True, half=True, fused=True)),
    "denoiser-eager": Contender(Switches(True, True, False, True, True), raced=False, unet_only=True),
    # side by side: what is compared most is raced in the same rounds
    "strong": Contender(STRONG),
    "accelerate-compile": Contender(Switches(True, True, True, True)),
    "denoiser": Contender(Switches(True, True, True, True, True), unet_only=True),
    "strong-tuned": Contender(Switches(True, True, True, autotune=True), raced=False),
    "accelerate-tuned": Contender(Switches(True, True, True, True, autotune=True), raced=False),
    "denoiser-tuned": Contender(Switches(True, True, True, True, True, True), raced=False, unet_only=True),
}


def rungs(stage: str) -> dict[str, Switches]:
    """The ladder of a stage; whether it is worth its minutes, the search for kernels is asked for by name."""
    return cumulative(Switches, ("autotune", *(() if stage == "unet" else ("condition_once",))))


def switches_of(name: str, stage: str) -> Switches | None:
    """Of a contender or a rung; None for "module:function"."""
    ladder = rungs(stage)
    return ladder[name] if name in ladder else CONTENDERS[name].switches if name in CONTENDERS else None


def stock_of(name: str, stage: str) -> str:
    """The contender that is stock diffusers with the same switches; empty where there is none."""
    switches = switches_of(name, stage)
    if switches is None:
        return ""
    stock = replace(switches, fused=False, condition_once=False)
    return next((other for other, contender in CONTENDERS.items() if contender.switches == stock), "")


def runs(name: str, stage: str) -> bool:
    """Whether an implementation has a stage."""
    return stage == "unet" or not (name in CONTENDERS and CONTENDERS[name].unet_only or name == "+ condition once")


def builder_of(name: str) -> Callable[[Build], tuple[Call, str]]:
    """By name, or "module:function" that takes a `Build` and returns a call and the name of its arithmetic.

    Raises:
        UserError: no such module or function.
    """
    if name in ENGINES:
        return ENGINES[name].build
    if name not in CONTENDERS and name not in rungs("unet"):
        return resolve(name)

    def build(where: Build) -> tuple[Call, str]:
        switches = switches_of(name, where.stage)
        dtype = pick_precision("auto", torch.device(where.device)) if switches.half else torch.float32
        make = decoder if where.stage == "decoder" else denoiser if switches.condition_once else stock
        with torch.no_grad():
            call = make(where, switches, dtype)

        @torch.no_grad()
        def run(content: Content, steps: int, guidance: float) -> np.ndarray:
            with constant_weights(switches, where.device):
                return call(content, steps, guidance)

        return run, {torch.bfloat16: "bf16"}.get(dtype, "fp32")

    return build


def ready(model: nn.Module, where: Build, switches: Switches, dtype: torch.dtype) -> nn.Module:
    """A model as the switches have it, on its device."""
    # not the mixin's own `to`, which warns of modules that are kept in fp32 where there are none
    model = nn.Module.to(model, where.device, dtype).requires_grad_(False)
    if switches.channels_last:
        model.to(memory_format=torch.channels_last)
    return accelerate(model) if switches.fused else model


def compiled(model: nn.Module, switches: Switches) -> nn.Module:
    """In place, as one graph."""
    if switches.compile:
        model.compile(
            fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs" if switches.autotune else "default"
        )
    return model


def constant_weights(switches: Switches, device: str) -> contextlib.AbstractContextManager:
    """What PyTorch's guide to CPUs asks for: templates of matrix products need it."""
    wanted = switches.autotune and device == "cpu"
    return torch._inductor.config.patch(freezing=True) if wanted else contextlib.nullcontext()


def stock(where: Build, switches: Switches, dtype: torch.dtype) -> Call:
    """The loop of diffusers' pipelines, on latents in fp32: both branches in one batch, DDIM by its own scheduler."""
    unet = ready(load_unet(where.folder, where.adapter), where, switches, dtype)
    network, config = compiled(unet, switches), scheduler_of(where.folder)
    layout = torch.channels_last if switches.channels_last else torch.contiguous_format

    def run(content: Content, steps: int, guidance: float) -> np.ndarray:
        given = {name: torch.from_numpy(array).to(where.device) for name, array in content.items()}
        z = given["z"]
        # the unconditional branch first, as diffusers has it
        both = {
            name: torch.cat((given[f"null_{name}"].expand_as(given[name]), given[name])).to(dtype)
            for name in ("text", "pooled", "image") if name in given
        }  # fmt: skip
        added = {}
        if "pooled" in both:
            side = 8.0 * unet.config.sample_size
            sizes = torch.tensor([[side, side, 0, 0, side, side]] * (2 * len(z)), device=z.device)
            added = {"text_embeds": both["pooled"], "time_ids": sizes}
        if "image" in both:
            pictures = both["image"]
            # pooled: a token for each picture; else the tokens of one picture
            added["image_embeds"] = [pictures if pictures.shape[1] == 1 else pictures[:, None]]
        scheduler = DDIMScheduler.from_config(config)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = torch.cat((z, z)).to(dtype).contiguous(memory_format=layout)
            given = {"encoder_hidden_states": both["text"], "added_cond_kwargs": added or None}
            null, own = network(x, t.to(z.device), **given, return_dict=False)[0].float().chunk(2)
            z = scheduler.step(null + guidance * (own - null), t, z, return_dict=False)[0]
        return z.cpu().numpy()

    return run


def denoiser(where: Build, switches: Switches, dtype: torch.dtype) -> Call:
    """`UNetDenoiser` in this package's loop, both branches joined and keys and values made once a run."""
    unet = ready(load_unet(where.folder, where.adapter), where, switches, dtype)
    side = unet.config.sample_size
    schedule = DiscreteSchedule.from_scheduler(scheduler_of(where.folder), side, "ddim")
    made = UNetDenoiser(unet, schedule).eval()
    fast = CompiledDenoiser(made, dtype, "none")
    compiled(fast.network, switches)
    device = torch.device(where.device)

    def streams(content: Content, prefix: str) -> dict[str, Stream]:
        def tensor(name: str) -> Tensor | None:
            array = content.get(prefix + name)
            return None if array is None else torch.from_numpy(array).to(device)

        image = tensor("image")
        return {"text": Stream(tensor("text"), tensor("pooled"))} | ({} if image is None else {"image": Stream(image)})

    def run(content: Content, steps: int, guidance: float) -> np.ndarray:
        z = torch.from_numpy(content["z"]).to(device)
        null = made.condition(streams(content, "null_")).repeat(len(z))
        settings = Sampling.of(schedule.config, steps=steps, guidance=guidance, solver="ddim")
        return sample(fast, z, made.condition(streams(content, "")), null, schedule, settings).cpu().numpy()

    return run


class Decode(nn.Module):
    """Latents of unit size to pictures."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z / self.vae.config.scaling_factor, return_dict=False)[0]


def decoder(where: Build, switches: Switches, dtype: torch.dtype) -> Call:
    vae = ready(part_of(where.folder, "vae"), where, switches, dtype)
    network = compiled(Decode(vae), switches)
    layout = torch.channels_last if switches.channels_last else torch.contiguous_format

    def run(content: Content, steps: int, guidance: float) -> np.ndarray:
        z = torch.from_numpy(content["z"]).to(where.device, dtype)
        return network(z.contiguous(memory_format=layout)).float().cpu().numpy()

    return run
