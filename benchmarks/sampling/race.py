"""Races of whole sampling runs: every implementation in a process of its own, in random order within rounds.

Accuracy first. Every call, timed or not, gets condition images and noise that no call had before, so that nothing kept
from an earlier one can be right. An implementation is refused when its images are further from the fp32 pipeline's than
the bound allows: in the first call, in one timed round that is chosen when the race is over, or in any round in which
contenders differ. Before that, the model itself is tested: its images must depend on the
condition by more than the bound, or ignoring it would go unnoticed.
"""

import functools
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semantica.benchmarks.harness import process
from semantica.benchmarks.harness.process import Entrant, Process, Wrong, fair
from semantica.benchmarks.harness.race import Protocol
from semantica.benchmarks.sampling import BOUND, GUIDANCE, MARGIN
from semantica.benchmarks.sampling.models import contents
from semantica.errors import UserError
from semantica.progress import phase


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """dB between images in [-1, 1], cut to it; -inf for results of another shape or with NaN."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return -np.inf
    error = np.square(actual.clip(-1, 1).astype(np.float64) - expected.clip(-1, 1)).mean()
    return float(10 * np.log10(4 / max(error, 1e-20)))


def judge(actual: np.ndarray, expected: np.ndarray, what: str) -> float:
    """The PSNR, or `Wrong`."""
    if actual.shape != expected.shape:
        raise Wrong(f"{what}: images have shape {actual.shape}, expected {expected.shape}")
    if not np.isfinite(actual).all():
        raise Wrong(f"{what}: images with NaN or infinity")
    found = psnr(actual, expected)
    if found < BOUND:
        raise Wrong(f"{what}: {found:.1f} dB, the bound is {BOUND:g} dB")
    return found


class Sampler(Process):
    """An implementation of sampling. nvtx: whether it marks its ranges for NVIDIA's profilers."""

    def __init__(self, name: str, place: Path, nvtx: bool = False):
        super().__init__("semantica.benchmarks.sampling.worker", name, place)
        self.name, self.nvtx = name, nvtx

    def build(self, model: Path, device: str, quick: bool, bundle: Path | None) -> dict:
        bundle = None if bundle is None else str(bundle)
        asked = dict(name=self.name, model=str(model), device=device, quick=quick, bundle=bundle, nvtx=self.nvtx)
        return self.ask("build", **asked)

    def sample(self, content: tuple[np.ndarray, np.ndarray], steps: int) -> tuple[dict, np.ndarray]:
        """The worker's answer, and the images."""
        for name, array in zip(("images", "noise"), content):
            np.save(self.folder / f"{name}.npy", array)
        answer = self.ask("sample", steps=steps, guidance=GUIDANCE)
        return answer, np.load(self.folder / "made.npy")


@dataclass(eq=False)
class Sampled(Entrant):
    """An implementation in a race; its images: the latest, and how near they came at the worst."""

    images: np.ndarray | None = None
    psnr: float = np.inf

    def judge(self, images: np.ndarray, expected: np.ndarray, what: str) -> None:
        with self.refusing():
            self.psnr = min(self.psnr, judge(images, expected, what))


class ModelRace:
    """The implementations of one model, built once and raced in several shapes."""

    def __init__(
        self,
        model: Path,
        names: tuple[str, ...],
        place: Path,
        device: str,
        quick: bool,
        bundles: dict[str, Path],
        failed: dict[str, str],
        make: Callable[[str, Path], Sampler] = Sampler,
    ):
        """
        bundles: of those that run one, by name. failed: why others do not start.
        """
        self.device, self.names = device, names
        self.image_size, self.condition_size = sizes(model)
        self.seeds = itertools.count()
        self.samplers, self.built, self.failed = {}, {}, dict(failed)
        # raced, too, where it is asked for
        entered = list(dict.fromkeys(("reference", *(name for name in names if name not in failed))))
        with phase(f"{model.name}: build {len(entered)} implementations", len(entered)) as done:
            for name in entered:
                sampler = self.samplers[name] = make(name, place)
                try:
                    self.built[name] = sampler.build(model, device, quick, bundles.get(name))
                except Wrong as error:
                    self.failed[name] = str(error)
                done.update()
        problem = self.failed.get("reference") or self.unfit()
        if problem:
            self.failed = dict.fromkeys(names, problem)

    def draw(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Contents that no call had before."""
        return contents(next(self.seeds), batch, self.image_size, self.condition_size)

    def truth(self, content: tuple[np.ndarray, np.ndarray], steps: int) -> np.ndarray:
        return self.samplers["reference"].sample(content, steps)[1]

    def unfit(self) -> str:
        """Why races with this model would prove nothing, if so: images of two conditions from the same noise agree."""
        (first, noise), (second, _) = self.draw(1), self.draw(1)
        try:
            found = psnr(*(self.truth((images, noise), 4) for images in (first, second)))
        except Wrong as error:
            return f"the fp32 pipeline: {error}"
        if found < BOUND - MARGIN:
            return ""
        return f"the model ignores its condition ({found:.1f} dB between two of them): its images prove nothing"

    def race(
        self, batch: int, steps: int, protocol: Protocol, what: str = ""
    ) -> tuple[dict[str, Sampled], dict[str, float]]:
        """What was found of each by name, and the ceilings in the same rounds."""
        entrants = {
            name: Sampled(self.samplers.get(name), self.built.get(name, {}), reason=self.failed.get(name, ""))
            for name in self.names
        }
        if not fair(entrants.values()):
            return entrants, {}

        def run(entrant: Sampled, content: tuple[np.ndarray, np.ndarray]) -> dict:
            answer, entrant.images = entrant.process.sample(content, steps)
            return answer

        content = self.draw(batch)
        expected = self.truth(content, steps)
        with phase(f"{what}: first calls", len(fair(entrants.values()))) as done:
            for entrant in fair(entrants.values()):
                with entrant.refusing():
                    entrant.first = run(entrant, content)
                    entrant.judge(entrant.images, expected, "first call")
                done.update()
        # every result is held against that of the most accurate contender
        anchor = max(fair(entrants.values()), key=lambda entrant: entrant.psnr, default=None)
        rng, chosen = random.Random(), None

        def compare(ran: list[Sampled], content: tuple[np.ndarray, np.ndarray], rounds: int) -> None:
            nonlocal chosen
            made = [(entrant, entrant.images) for entrant in ran]
            if anchor in ran and any(psnr(images, anchor.images) < BOUND for _, images in made):
                # somebody is wrong: the pipeline says who
                expected = self.truth(content, steps)
                for entrant, images in made:
                    entrant.judge(images, expected, "timed call" if rounds else "second call")
            # each round is as likely to be the one that is examined
            if rounds and rng.randrange(rounds) == 0:
                chosen = content, made

        draw = functools.partial(self.draw, batch)
        ceilings = process.race(what, entrants.values(), protocol, self.device, draw, run, compare)
        if chosen is not None:
            content, made = chosen
            expected = self.truth(content, steps)
            for entrant, images in made:
                entrant.judge(images, expected, "timed call")
        return entrants, ceilings

    def close(self) -> None:
        for sampler in self.samplers.values():
            sampler.close()


def sizes(model: Path) -> tuple[int, int]:
    """Sides of the images that a run folder makes, and of those that condition it."""
    unet, encoder = (json.loads((model / part / "config.json").read_text()) for part in ("unet", "encoder"))
    if "image_size" not in encoder:
        raise UserError(f"{model} has several encoders: models that pictures alone condition are raced")
    return unet["image_size"], encoder["image_size"]
