"""Races of whole sampling runs: every implementation in a process of its own, in random order within rounds.

Accuracy first. Every call, timed or not, gets condition images and noise that no call had before, so that nothing kept
from an earlier one can be right. An implementation is refused when its images are further from the fp32 pipeline's than
the bound allows: in the first call, in one timed round that is chosen when the race is over, or in any round in which
contenders differ. Before that, the model itself is tested: its images must depend on the
condition by more than the bound, or ignoring it would go unnoticed.
"""

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from semantica.benchmarks.harness import race as timing
from semantica.benchmarks.harness.process import Ceilings, Process, Wrong
from semantica.benchmarks.sampling.models import contents

# dB to the fp32 images
BOUND = 35.0
# by how much less the images of two conditions must agree
MARGIN = 3.0
GUIDANCE = 1.5


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
    """An implementation of sampling."""

    def __init__(self, name: str, place: Path):
        super().__init__("semantica.benchmarks.sampling.worker", name, place)
        self.name = name

    def build(self, model: Path, device: str, quick: bool, bundle: Path | None) -> dict:
        bundle = None if bundle is None else str(bundle)
        return self.ask("build", name=self.name, model=str(model), device=device, quick=quick, bundle=bundle)

    def sample(self, content: tuple[np.ndarray, np.ndarray], steps: int) -> tuple[dict, np.ndarray]:
        """The worker's answer, and the images."""
        for name, array in zip(("images", "noise"), content):
            np.save(self.folder / f"{name}.npy", array)
        answer = self.ask("sample", steps=steps, guidance=GUIDANCE)
        return answer, np.load(self.folder / "made.npy")


@dataclass
class Result:
    """What a race found of one implementation; `reason` says why it was not timed, or no longer is."""

    arithmetic: str = ""
    build_seconds: float = 0.0
    first_seconds: float = 0.0
    peak_bytes: int = 0
    psnr: float = np.inf
    times: timing.Times = field(default_factory=timing.Times)
    reason: str = ""


class Field:
    """The implementations of one model, built once and raced in several shapes."""

    def __init__(
        self,
        model: Path,
        names: list[str],
        place: Path,
        device: str,
        quick: bool,
        bundles: dict[str, Path],
        failed: dict[str, str],
        make: Callable[[str, Path], Sampler] = Sampler,
    ):
        self.device = device
        self.image_size, self.condition_size = sizes(model)
        self.seeds = itertools.count()
        self.workers, self.built, self.failed = {}, {}, dict(failed)
        for name in ("reference", *(name for name in names if name not in failed)):
            worker = self.workers[name] = make(name, place)
            try:
                self.built[name] = worker.build(model, device, quick, bundles.get(name))
            except Wrong as error:
                self.failed[name] = str(error)
        self.names = names
        problem = self.failed.get("reference") or self.unfit()
        if problem:
            self.failed = dict.fromkeys(names, problem)

    def draw(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Contents that no call had before."""
        return contents(next(self.seeds), batch, self.image_size, self.condition_size)

    def truth(self, content: tuple[np.ndarray, np.ndarray], steps: int) -> np.ndarray:
        return self.workers["reference"].sample(content, steps)[1]

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

    def race(self, batch: int, steps: int, protocol: timing.Protocol) -> tuple[dict[str, Result], dict[str, float]]:
        """Results by name, and the ceilings in the same rounds."""
        results = {name: Result(reason=self.failed.get(name, "")) for name in self.names}
        if all(result.reason for result in results.values()):
            return results, {}
        content = self.draw(batch)
        expected = self.truth(content, steps)
        for name, result in results.items():
            if result.reason:
                continue
            with refusing(result):
                result.arithmetic = self.built[name]["arithmetic"]
                result.build_seconds = self.built[name]["seconds"]
                answer, made = self.workers[name].sample(content, steps)
                result.first_seconds = answer["seconds"]
                result.psnr = judge(made, expected, "first call")
        entered = [name for name in self.names if not results[name].reason]
        # every result is held against that of the most accurate contender
        anchor = max(entered, key=lambda name: results[name].psnr, default=None)
        ceilings = Ceilings(self.device)
        rng, kept = random.Random(), {}
        chosen, number, ends = None, 0, None
        while entered:
            timed = number >= protocol.warmup
            if timed and ends is None:
                ends = time.perf_counter() + protocol.seconds
            content, made = self.draw(batch), {}
            rng.shuffle(entered)
            for name in entered:
                # threads of the process before may still spin
                time.sleep(0.02)
                with refusing(results[name]):
                    answer, made[name] = self.workers[name].sample(content, steps)
                    results[name].peak_bytes = answer["peak_bytes"]
                    if timed:
                        results[name].times.device.append(answer["seconds"])
            if any(psnr(images, made[anchor]) < BOUND for images in made.values() if anchor in made):
                # somebody is wrong: the pipeline says who
                expected = self.truth(content, steps)
                for name in made:
                    with refusing(results[name]):
                        judge(made[name], expected, "timed call" if timed else "second call")
            entered = [name for name in entered if not results[name].reason]
            number += 1
            if not timed:
                continue
            ceilings.measure()
            rounds = number - protocol.warmup
            # each round is as likely to be the one that is examined
            if rng.randrange(rounds) == 0:
                chosen, kept = content, made
            if rounds >= protocol.most or (rounds >= protocol.least and time.perf_counter() > ends):
                break
        if kept:
            expected = self.truth(chosen, steps)
            for name in entered:
                with refusing(results[name]):
                    results[name].psnr = min(results[name].psnr, judge(kept[name], expected, "timed call"))
        return results, ceilings.rates()

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


@contextmanager
def refusing(result: Result) -> Iterator[None]:
    """What is wrong within is noted, the first fault only."""
    try:
        yield
    except Wrong as error:
        result.reason = result.reason or str(error)


def sizes(model: Path) -> tuple[int, int]:
    """Sides of the images that a run folder makes, and of those that condition it."""
    unet, encoder = (json.loads((model / part / "config.json").read_text()) for part in ("unet", "encoder"))
    return unet["image_size"], encoder["image_size"]
