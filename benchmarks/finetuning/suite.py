"""The rows of fine-tuning public UNets, raced in processes of their own; accuracy first.

Truth is stock diffusers in fp32, its first batch and its first steps. What computes in fp32 may be `EXACT` from it;
bf16 `LEEWAY` times as far as stock diffusers in bf16, measured first: predictions, and gradients of every parameter.
Losses too, and there at least as far as bf16's precision: sums of so much may agree by chance.
"""

import itertools
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from semantica.benchmarks.finetuning.contenders import CONTENDERS, Errors, errors, operations
from semantica.benchmarks.harness import process, store
from semantica.benchmarks.harness.process import Entrant, Process, Wrong
from semantica.benchmarks.harness.race import Protocol
from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.suite import Bench, Outcome, bench, pytest_generate_tests, test_row
from semantica.benchmarks.unets.models import folder_of, parameters
from semantica.benchmarks.unets.suite import WORKSPACE, heats, memory
from semantica.fused.published import MODELS
from semantica.progress import phase

__all__ = ["bench", "pytest_generate_tests", "test_row"]
# steps before the clock, whose losses are compared
WARMUP = 2
# largest relative errors of fp32; of bf16 as a multiple of stock bf16's, and of its losses at least so much
EXACT, LEEWAY, HALF = 1e-4, 1.5, 2.0**-8
OP = "finetune"


@dataclass(eq=False)
class Tuned(Entrant):
    """A contender, the losses of its first steps, and its errors."""

    losses: list[float] = field(default_factory=list)
    errors: Errors = field(default_factory=dict)


def judge(found: Errors, limits: Errors) -> None:
    """Raises `Wrong` for an error above its limit."""
    for what, error in found.items():
        # written so that NaN fails
        if not error <= limits[what]:
            raise Wrong(f"{what}: relative error {error:.2g}, the limit is {limits[what]:.2g}")


def limits_of(arithmetic: str, half: Errors) -> Errors:
    """half: errors of stock diffusers in bf16."""
    if arithmetic == "fp32":
        return dict.fromkeys(half, EXACT)
    least = {"loss": HALF, "losses": HALF}
    return {what: LEEWAY * max(error, least.get(what, 0.0)) for what, error in half.items()}


def apart(losses: Iterable[float], expected: Iterable[float]) -> float:
    """Largest relative difference of losses, step by step."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


@dataclass(eq=False)
class TuningBench(Bench):
    """Races of models, each trained in each way.

    Attributes:
        models: each with the side of the latents. ways: of `WAYS`. steps: timed ones of each contender.
    """

    models: dict[str, int]
    ways: tuple[str, ...]
    batch: int
    steps: int
    names: tuple[str, ...]
    device: str
    runs: dict[tuple[str, ...], tuple[str, str, int]] = field(default_factory=dict)

    def __post_init__(self):
        for (model, side), way in itertools.product(self.models.items(), self.ways):
            race = (f"{Path(model).name} {way}, {side}x{side} batch {self.batch}",)
            self.runs[race], self.races[race] = (model, way, side), list(self.names)
        self.place = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        self.count = itertools.count()

    def which(self, race: tuple[str]) -> dict:
        name, *_ = self.runs[race]
        return {} if name in MODELS else {"model": store.configured(Path(name))}

    def serves(self, row: dict) -> bool:
        return row["rounds"] == self.steps and super().serves(row)

    def start(self, name: str, race: tuple[str]) -> Tuned:
        """A process that has trained its first steps, or the reason why not."""
        model, way, side = self.runs[race]
        entrant = Tuned(Process("semantica.benchmarks.finetuning.worker", f"{name}-{next(self.count)}", self.place))
        self.closing.callback(entrant.process.close)
        with entrant.refusing():
            problem = dict(name=model, way=way, side=side, batch=self.batch, device=self.device)
            folder = str(folder_of(model, self.place))
            entrant.built = entrant.process.ask("build", contender=name, folder=folder, **problem)
            entrant.first = entrant.process.ask("examine")
            entrant.losses = entrant.process.ask("steps", count=WARMUP)["losses"]
        return entrant

    def examined(self, entrant: Tuned) -> dict[str, np.ndarray]:
        with np.load(entrant.process.folder / "made.npz") as file:
            return dict(file)

    def alone(self, name: str, race: tuple[str]) -> tuple[dict[str, np.ndarray], list[float]]:
        """What a contender makes, in a process that is gone afterwards."""
        entrant = self.start(name, race)
        entrant.process.close()
        if entrant.reason:
            raise Wrong(entrant.reason)
        return self.examined(entrant), entrant.losses

    def run(self, race: tuple[str], what: str) -> dict[str, Outcome]:
        names = self.races[race]
        try:
            with phase(f"{what}: stock diffusers in fp32 and bf16"):
                truth = self.alone("plain", race)
                half = self.errors_of(self.alone("plain-half", race), truth)
        except Wrong as error:
            return dict.fromkeys(names, f"nothing to compare with: {error}")
        found: dict[str, Outcome] = {}
        for heat in heats({name: self.need(name, race) for name in names}, memory(self.device)):
            found |= self.heat(heat, race, what, truth, half)
        return found

    @staticmethod
    def errors_of(made: tuple[dict[str, np.ndarray], list[float]], truth) -> Errors:
        return errors(made[0], truth[0]) | {"losses": apart(made[1], truth[1])}

    def need(self, name: str, race: tuple[str]) -> int:
        """Bytes: weights, their gradients and moments where they are trained, and room for activations."""
        model, way, side = self.runs[race]
        each = 16 if way == "full" else 2 if CONTENDERS[name].half else 4
        # of Stable Diffusion at 512 pixels in fp32, less in bf16
        return each * parameters(model, "unet") + WORKSPACE * (1 + self.batch * side**2 // 64**2)

    def heat(self, names: list[str], race: tuple[str], what: str, truth, half: Errors) -> dict[str, Outcome]:
        """Steps of some contenders in turn."""
        entrants: dict[str, Tuned] = {}
        with phase(f"{what}: build, first steps of {', '.join(names)}", len(names)) as done:
            for name in names:
                entrant = entrants[name] = self.start(name, race)
                with entrant.refusing():
                    if not entrant.reason:
                        entrant.errors = self.errors_of((self.examined(entrant), entrant.losses), truth)
                        judge(entrant.errors, limits_of(entrant.built["arithmetic"], half))
                done.update()

        def turn(entrant: Tuned, content: None) -> dict:
            return entrant.process.ask("steps", count=1)

        protocol = Protocol(warmup=0, least=self.steps, most=self.steps, seconds=0.0)
        ceilings = process.race(what, entrants.values(), protocol, self.device, lambda: None, turn)
        for entrant in entrants.values():
            entrant.process.close()
        return {
            name: entrant.reason or (entrant.all("seconds"), self.row(race, name, entrant, ceilings, half))
            for name, entrant in entrants.items()
        }

    def row(self, race: tuple[str], name: str, entrant: Tuned, ceilings: dict[str, float], half: Errors) -> dict:
        model, way, side = self.runs[race]
        named = (OP, name, *race, way, entrant.built["arithmetic"], "both")
        row = store.row(named, entrant.times, self.device, operations(model, way, side, self.batch), ceilings)
        row |= {"images_per_s": self.batch / entrant.times.quantile(0.5), "loss": entrant.losses[-1]}
        row |= {f"{what}_error": error for what, error in entrant.errors.items()}
        row |= {f"half_{what}_error": error for what, error in half.items()}
        return row | self.which(race) | entrant.facts | {"kernel_hash": None, **self.code(race, name)}

    def code(self, race: tuple[str], name: str) -> dict:
        arch = store.environment(self.device)["arch"]
        return {"op": OP, "arch": arch, "kernel_hash": source_hash(OP, arch)} if CONTENDERS[name].fused else {}
