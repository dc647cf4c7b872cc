"""The rows of public UNets and decoders, raced in processes of their own; accuracy first.

Truth is stock diffusers in fp32. bf16 may be `LEEWAY` times as far from it as stock diffusers in bf16, measured first.
As many implementations are raced side by side, in random order within rounds, as memory holds; the others follow.
Each round has noise that no call had before. The first results and those of one round chosen beforehand are held
against the truth, those of other rounds against the most accurate of their heat. What an IP-Adapter costs is the
difference to the same UNet without it, run beside it in every round.
"""

import itertools
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from semantica.benchmarks.harness import process, store
from semantica.benchmarks.harness.process import Entrant, Process, Wrong, fair
from semantica.benchmarks.harness.race import Ceilings, Protocol, quantile
from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.suite import Bench, Outcome, bench, pytest_generate_tests, test_row
from semantica.benchmarks.kernels.public import split
from semantica.benchmarks.unets import bundles
from semantica.benchmarks.unets.contenders import runs, stock_of, switches_of
from semantica.benchmarks.unets.engines import ENGINES
from semantica.benchmarks.unets.models import TEXTS, Content, contents, folder_of, operations, parameters, size_of
from semantica.fused.published import MODELS
from semantica.progress import phase

__all__ = ["bench", "pytest_generate_tests", "test_row"]
# guidance of Stable Diffusion's pipeline unless told otherwise
GUIDANCE = 7.5
# largest relative error of fp32, and of bf16 as a multiple of stock bf16's own
EXACT, LEEWAY = 1e-3, 1.5
# by how much more two conditions must differ
MARGIN = 3.0
# bytes of activations, libraries and compilers of a process
WORKSPACE = 2 << 30
QUICK = Protocol(warmup=0, least=2, most=2, seconds=0.0)


def protocol(rounds: int, seconds: float) -> Protocol:
    """Two rounds of warm-up after the first calls: tuned and frozen graphs are slow in their second and third, too."""
    return Protocol(warmup=2, least=rounds, most=max(rounds, 50), seconds=seconds)


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative error; infinite for results of another shape or with NaN."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return np.inf
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected))


def error_of_median(values: list[float]) -> float:
    """Standard error of a median, from quantiles, as of a normal distribution: 1.2533 standard deviations by root n,
    and these 1 / 1.683 of what lies between the 20th and 80th percentile."""
    return 1.2533 / 1.683 * (quantile(values, 0.8) - quantile(values, 0.2)) / len(values) ** 0.5


class Runner(Process):
    """An implementation of one stage of a model."""

    def __init__(self, name: str, place: Path):
        super().__init__("semantica.benchmarks.unets.worker", name, place)

    def run(self, content: Content, steps: int) -> tuple[dict, np.ndarray]:
        np.savez(self.folder / "content.npz", **content)
        answer = self.ask("run", steps=steps, guidance=GUIDANCE)
        return answer, np.load(self.folder / "made.npy")

    def run_without(self, steps: int) -> list[float]:
        """Seconds of the same content without the adapter."""
        return self.ask("run_without", steps=steps, guidance=GUIDANCE)["seconds"]


@dataclass(eq=False)
class Raced(Entrant):
    """An implementation in a race: its latest result, its largest error, and the limit of that."""

    made: np.ndarray | None = None
    error: float = 0.0
    limit: float = EXACT

    def judge(self, made: np.ndarray, expected: np.ndarray, what: str, more: float = 0.0) -> None:
        with self.refusing():
            found = distance(made, expected)
            # written so that NaN fails
            if not found <= self.limit + more:
                raise Wrong(f"{what}: relative error {found:.2g}, the limit is {self.limit + more:.2g}")
            if not more:
                self.error = max(self.error, found)


def memory(device: str) -> int:
    """Bytes that are free, less those of the ceilings beside a race."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] - Ceilings.bytes(device)
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return (int(line.split()[1]) << 10) - Ceilings.bytes(device)


def heats(needs: dict[str, int], room: int) -> list[list[str]]:
    """Names in their order, as many together as there is room for, and at least one."""
    found: list[list[str]] = []
    left = 0
    for name, need in needs.items():
        if not found or need > left:
            found.append([])
            left = room
        found[-1].append(name)
        left -= need
    return found


@dataclass(eq=False)
class UNetBench(Bench):
    """Races of a model's stage ("unet" or "decoder"), a batch and a number of steps each."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    names: tuple[str, ...]
    device: str
    ladder: bool = False
    quick: bool = False
    stages: tuple[str, ...] = ("unet", "decoder")
    protocol: Protocol = QUICK
    runs: dict[tuple[str, ...], tuple] = field(default_factory=dict)

    def __post_init__(self):
        for model, stage, batch in itertools.product(self.models, self.stages, self.batches):
            names = [name for name in self.names if runs(name, stage)]
            for steps in (self.steps if stage == "unet" else (1,)) if names else ():
                side, called = size_of(model), Path(model).name
                what = f"UNet {side}x{side}, {steps} steps" if stage == "unet" else f"decoder {side}x{side}"
                race = (f"{called} {what} batch {batch}",)
                self.runs[race], self.races[race] = (model, stage, batch, steps), names
        self.place = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        self.count = itertools.count()

    def start(self, name: str, model: str, stage: str) -> Raced:
        """A process with the implementation built in it."""
        entrant = Raced(Runner(name, self.place / f"race-{next(self.count)}"))
        self.closing.callback(entrant.process.close)
        with entrant.refusing():
            asked = dict(name=name, stage=stage, adapter=split(model)[1], device=self.device)
            bundle = str(self.bundle(name, model)) if name in ENGINES else None
            entrant.built = entrant.process.ask(
                "build", **asked, model=str(folder_of(model, self.place)), bundle=bundle
            )
        return entrant

    def bundle(self, name: str, model: str) -> Path:
        """Where an engine's bundle is, made once for all races; raises `Wrong` where that fails."""
        # both branches of guidance count
        batches = (1, 2 * min(self.batches), 2 * max(self.batches))
        request = dict(folder=str(folder_of(model, self.place)), name=model, adapter=split(model)[1], batches=batches)
        backend = name if ENGINES[name].built else ""
        return bundles.made(self.place, **request, backend=backend, precision=ENGINES[name].bundle)

    def without_bundle(self, names: list[str], model: str, what: str) -> dict[str, Outcome]:
        """Engines whose bundle cannot be made, and why. Nothing else holds memory while the others' are made."""
        engines, failed = [name for name in names if name in ENGINES], {}
        with phase(f"{what}: export for {', '.join(engines)}", len(engines)) as done:
            for name in engines:
                try:
                    self.bundle(name, model)
                except Wrong as error:
                    failed[name] = str(error)
                done.update()
        return failed

    def paired(self, name: str, race: tuple[str]) -> bool:
        """Whether what an adapter costs is measured: each run beside one without it."""
        model, stage, *_ = self.runs[race]
        return bool(split(model)[1]) and stage == "unet" and switches_of(name, stage) is not None and not self.ladder

    def truths(self, name: str, race: tuple[str], asked: list[Content]) -> list[np.ndarray]:
        """What an implementation makes of contents, in a process that is gone afterwards."""
        model, stage, _, steps = self.runs[race]
        entrant = self.start(name, model, stage)
        try:
            if entrant.reason:
                raise Wrong(entrant.reason)
            return [entrant.process.run(content, steps)[1] for content in asked]
        finally:
            entrant.process.close()

    def which(self, race: tuple[str]) -> dict:
        base, _ = split(self.runs[race][0])
        return {} if base in MODELS else {"model": store.configured(Path(base))}

    def serves(self, row: dict) -> bool:
        return row["rounds"] >= self.protocol.least and super().serves(row)

    def run(self, race: tuple[str], what: str) -> dict[str, Outcome]:
        model, stage, batch, steps = self.runs[race]
        names = self.races[race]
        first, chosen = (contents(model, stage, seed, seed % TEXTS, batch) for seed in (0, 1))
        other = contents(model, stage, 0, 1, batch) if stage == "unet" else contents(model, stage, 2, 0, batch)
        try:
            with phase(f"{what}: stock diffusers in fp32 and bf16"):
                truth, later, elsewhere = self.truths("plain", race, [first, chosen, other])
                (half,) = self.truths("plain-half", race, [first])
            limit = max(LEEWAY * distance(half, truth), EXACT)
            if not distance(elsewhere, truth) > MARGIN * limit:
                raise Wrong("the model ignores its condition: its results prove nothing")
        except Wrong as error:
            return dict.fromkeys(names, f"nothing to compare with: {error}")
        size, found = parameters(model, stage), self.without_bundle(names, model, what)
        raced = [name for name in names if name not in found]
        needs = {name: self.need(name, stage, size) * (1 + self.paired(name, race)) for name in raced}
        for heat in heats(needs, memory(self.device) - 4 * size):
            found |= self.heat(heat, race, what, limit, (first, truth), (chosen, later))
        return found

    def need(self, name: str, stage: str, size: int) -> int:
        """Bytes that an implementation keeps: weights, and once more what compilers and denoisers make of them."""
        switches = switches_of(name, stage)
        if switches is None:
            return 8 * size + WORKSPACE
        bytes_each = (2 if switches.half else 4) * (2 if switches.compile or switches.condition_once else 1)
        return bytes_each * size + WORKSPACE

    def heat(self, names, race, what, limit, first, chosen) -> dict[str, Outcome]:
        """Rounds of some implementations side by side."""
        model, stage, batch, steps = self.runs[race]
        entrants = {}
        with phase(f"{what}: build, first calls of {', '.join(names)}", len(names)) as done:
            for name in names:
                entrant = entrants[name] = self.start(name, model, stage)
                with entrant.refusing():
                    if not entrant.reason:
                        entrant.limit = EXACT if entrant.built["arithmetic"] == "fp32" else limit
                        entrant.first, made = entrant.process.run(first[0], steps)
                        entrant.judge(made, first[1], "first call")
                        if self.paired(name, race):
                            entrant.process.run_without(steps)
                done.update()
        pairs = {id(entrants[name]) for name in names if self.paired(name, race)}
        anchor = min(fair(entrants.values()), key=lambda entrant: entrant.error, default=None)
        examined, seeds = random.Random().randrange(max(self.protocol.least, 1)) + 1, itertools.count(TEXTS)
        rounds = itertools.count(1 - self.protocol.warmup)

        def draw() -> Content:
            seed = next(seeds)
            return chosen[0] if next(rounds) == examined else contents(model, stage, seed, seed % TEXTS, batch)

        def turn(entrant: Raced, content: Content) -> dict:
            answer, entrant.made = entrant.process.run(content, steps)
            return answer | ({"without": entrant.process.run_without(steps)} if id(entrant) in pairs else {})

        def judge(ran: list[Raced], content: Content, number: int) -> None:
            for entrant in ran:
                if content is chosen[0]:
                    entrant.judge(entrant.made, chosen[1], "timed call")
                elif anchor in ran:
                    entrant.judge(entrant.made, anchor.made, "timed call beside another", anchor.limit)

        ceilings = process.race(what, entrants.values(), self.protocol, self.device, draw, turn, judge)
        for entrant in entrants.values():
            entrant.process.close()
        return {
            name: entrant.reason or (entrant.all("seconds"), self.row(race, name, entrant, ceilings, limit))
            for name, entrant in entrants.items()
        }

    def row(self, race: tuple[str], name: str, entrant: Raced, ceilings: dict[str, float], limit: float) -> dict:
        model, stage, batch, steps = self.runs[race]
        direction = f"guidance {GUIDANCE}" if stage == "unet" else "decode"
        named = (self.op(race), name, *race, f"batch {batch}", entrant.built["arithmetic"], direction)
        row = store.row(named, entrant.times, self.device, steps * operations(model, stage, batch), ceilings)
        row |= {"evaluation_us": row["median_us"] / steps, "rel_error": entrant.error, "half_error": limit / LEEWAY}
        row |= {"build_s": entrant.built["seconds"], **entrant.facts}
        if self.paired(name, race):
            added = [one - other for one, other in zip(entrant.all("seconds"), entrant.all("without"), strict=True)]
            found = {"added_us": quantile(added, 0.5), "added_error_us": error_of_median(added)}
            row |= {key: value * 1e6 / steps for key, value in found.items()} | {"stock": stock_of(name, stage)}
        row |= {"quick": True} if self.quick else {}
        return row | self.which(race) | {"kernel_hash": None, **self.code(race, name)}

    def op(self, race: tuple[str]) -> str:
        _, stage, *_ = self.runs[race]
        return f"{stage}_ladder" if self.ladder else stage

    def code(self, race: tuple[str], name: str) -> dict:
        op, arch = self.op(race), store.environment(self.device)["arch"]
        switches = switches_of(name, self.runs[race][1])
        # of the user's own functions nobody knows what they are made of
        ours = ENGINES[name].ours if name in ENGINES else self.ladder or switches is None or switches.fused
        return {"op": op, "arch": arch, "kernel_hash": source_hash(op, arch, name)} if ours else {}
