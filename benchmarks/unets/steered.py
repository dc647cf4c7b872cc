"""One way to a guided step in a process of its own; the other side is `semantica.benchmarks.unets.steering`."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semantica.benchmarks.harness.process import peak_memory, serve
from semantica.benchmarks.unets import stored_maps
from semantica.benchmarks.unets.models import Content, load_unet, scheduler_of
from semantica.condition import Stream
from semantica.discrete import DiscreteSchedule
from semantica.fused.accelerate import accelerate
from semantica.fused.denoiser import UNetDenoiser
from semantica.steering.guider import SelfGuidance
from semantica.steering.objects import Objects
from semantica.steering.sources import EVERYTHING, Recording, looked_at
from semantica.steering.taps import Reader, Taps, default_activations, default_layers
from semantica.steering.terms import Change, Term

# objects of two tokens and of one, an energy of all four properties, and the timestep
SETS = {"one": (2, 3), "other": (5,)}
WEIGHTS = {"position": 4.0, "size": 0.7, "shape": 6.0, "appearance": 12.0}
TIMESTEP = 600


def stream(content: Content, prefix: str = "") -> Stream:
    return Stream(*(torch.from_numpy(content[prefix + n]) if n in content else None for n in ("text", "pooled")))


class Denoised:
    """A denoiser over an accelerated UNet. `step` is one guided step: gradient of the energy, and both branches."""

    def __init__(self, folder: Path):
        unet = accelerate(load_unet(folder, ""))
        schedule = DiscreteSchedule.from_scheduler(scheduler_of(folder), unet.config.sample_size, "ddim")
        self.denoiser = UNetDenoiser(unet, schedule).eval()
        self.level = torch.tensor([schedule.levels[TIMESTEP]], dtype=torch.float32)

    def target(self, z: Tensor, content: Content) -> Any:
        """What the step is steered to: what the network sees in another picture."""

    def step(self, z: Tensor, content: Content, target: Any) -> Tensor:
        with torch.no_grad():
            for prefix in ("", "null_"):
                self.denoiser(z, self.level, self.denoiser.condition({"text": stream(content, prefix)}))
        return torch.zeros_like(z)


class Trained(Denoised):
    """A plain training step, the gradients of all weights included: what memory is compared with."""

    def step(self, z: Tensor, content: Content, target: Any) -> Tensor:
        self.denoiser.requires_grad_(True)
        v = self.denoiser(z, self.level, self.denoiser.condition({"text": stream(content)}))
        torch.autograd.grad(v.square().mean(), [*self.denoiser.parameters()], allow_unused=True)
        return torch.zeros_like(z)


class Steered(Denoised):
    """This package's: statistics are read on the way. recompute: blocks run again for the gradient."""

    def __init__(self, folder: Path, recompute: bool):
        super().__init__(folder)
        terms = [Term(what, weight, (), Change("other")) for what, weight in WEIGHTS.items()]
        self.objects = Objects.of(SETS)
        # what this source would show is given at each step
        source = Recording(self.objects)
        self.guider = SelfGuidance(terms, self.objects, {"other": source}, recompute=recompute)
        self.reader = Reader(self.denoiser, Taps(), self.objects, [part for term in terms for part in term.reads])
        self.everything = Reader(self.denoiser, Taps(), self.objects, EVERYTHING)

    def target(self, z: Tensor, content: Content) -> Any:
        condition = self.denoiser.condition({"text": stream(content)})
        return looked_at(self.denoiser, self.everything, z.flip(-1), self.level, condition)[1]

    def step(self, z: Tensor, content: Content, target: Any) -> Tensor:
        own, null = (self.denoiser.condition({"text": stream(content, prefix)}) for prefix in ("", "null_"))
        shown = {"other": (target, self.objects)}
        gradient, _ = self.guider.gradient(self.denoiser, self.reader, z, self.level, own, shown)
        with torch.no_grad():
            self.denoiser(z, self.level, null)
        return gradient


class StoredMaps:
    """Stock diffusers, attention maps of the same layers stored whole. recompute: with gradient checkpointing."""

    def __init__(self, folder: Path, recompute: bool):
        unet = load_unet(folder, "")
        denoiser = UNetDenoiser(unet, DiscreteSchedule.from_scheduler(scheduler_of(folder), unet.config.sample_size))
        layers, psi = default_layers(denoiser), default_activations(denoiser)
        del denoiser
        if recompute:
            unet.enable_gradient_checkpointing()
        self.run = stored_maps.storing(unet, [*SETS.values()], layers, psi)

    def seen(self, z: Tensor, content: Content, prefix: str = "") -> stored_maps.Properties:
        given, added = stream(content, prefix), None
        if given.pooled is not None:
            side = 8.0 * z.shape[-1]
            added = {"text_embeds": given.pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]])}
        return self.run(z, torch.tensor(TIMESTEP), given.tokens, added_cond_kwargs=added)

    @torch.no_grad()
    def target(self, z: Tensor, content: Content) -> Any:
        return self.seen(z.flip(-1), content)

    def step(self, z: Tensor, content: Content, target: Any) -> Tensor:
        gradient = stored_maps.gradient(lambda z: self.seen(z, content), z, WEIGHTS, target)
        with torch.no_grad():
            self.seen(z, content, "null_")
        return gradient


# an unguided step and one of training first, for comparison: they have no gradient of the energy
PLAIN = ("unguided", "training")
WAYS = {
    "unguided": Denoised,
    "training": Trained,
    "steered": lambda folder: Steered(folder, recompute=True),
    "steered, blocks kept": lambda folder: Steered(folder, recompute=False),
    "stored maps, checkpointing": lambda folder: StoredMaps(folder, recompute=True),
    "stored maps": lambda folder: StoredMaps(folder, recompute=False),
}


class Server:
    """Builds a way, then runs it as often as it is told to."""

    def __init__(self, folder: Path):
        self.folder = folder

    def build(self, way: str, model: str) -> dict:
        self.way = WAYS[way](Path(model))
        return {"resident_bytes": peak_memory()}

    def run(self) -> dict:
        with np.load(self.folder / "content.npz") as file:
            content = dict(file)
        z = torch.from_numpy(content["z"])
        target = self.way.target(z, content)
        began = time.perf_counter()
        made = self.way.step(z, content, target)
        answer = {"seconds": time.perf_counter() - began, "peak_bytes": peak_memory()}
        np.save(self.folder / "made.npy", made.numpy())
        return answer


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]))
    serve({"build": server.build, "run": server.run})
