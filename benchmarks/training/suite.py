"""The rows of training: the ladder from a plain loop to the trainer, raced in turns of a few steps.

Run by `semantica bench train`, or by plain pytest: a small batch, without what compiles. Accuracy first: each rung
trains from the same weights on the same samples and noise, so that its first losses must be those of the plain loop,
within what the precision costs.
"""

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from semantica.benchmarks.harness import process, store
from semantica.benchmarks.harness.process import Entrant, Process, Wrong
from semantica.benchmarks.harness.race import Protocol
from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.suite import Bench, Outcome, bench, pytest_generate_tests, test_row
from semantica.benchmarks.harness.table import cells, heads
from semantica.benchmarks.training.tables import SCALED, SCALING, SHARES, shares
from semantica.progress import phase

__all__ = ["bench", "pytest_generate_tests", "test_row"]
# steps before the clock: compiled, allocated and cached by then; their losses are compared
WARMUP = 3
# steps of a rung before the next has its turn; a GPU's are timed together
TURN = {"cpu": 2, "cuda": 5}
# largest relative difference of a loss from the plain loop's
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}


def compare_losses(losses: list[float], plain: list[float], arithmetic: str) -> None:
    """Raises `Wrong` where a loss is not the plain loop's."""
    for i, (loss, expected) in enumerate(zip(losses, plain, strict=True)):
        # written so that NaN fails
        if not abs(loss - expected) <= TOLERANCE[arithmetic] * abs(expected):
            raise Wrong(f"loss {loss:.6g} in step {i + 1}, the plain loop's is {expected:.6g}")


@dataclass(eq=False)
class TrainingBench(Bench):
    """One race: all rungs on one preset and batch.

    Attributes:
        steps: timed ones of each rung. workers: processes that load data, for each rung.
        parks: whether a rung that waits for its turn keeps its weights on the host and nothing on the device. All rungs
            of "base" at a batch of 16 would take some 160 GiB of a GPU: 16 bytes a parameter, and activations.
        shares: of operators in a step of the last rung. scaling: what was measured before, to be shown with it.
    """

    preset: str
    batch: int
    steps: int
    device: str
    workers: int
    rungs: tuple[str, ...]
    parks: bool | None = None
    shares: dict = field(default_factory=dict)
    scaling: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.races = {(f"{self.preset} batch {self.batch}",): list(self.rungs)}
        self.parks = self.device == "cuda" if self.parks is None else self.parks

    @property
    def turns(self) -> int:
        return -(-self.steps // TURN[self.device])

    def serves(self, row: dict) -> bool:
        # as many steps as are asked for now
        return row["rounds"] == self.turns * TURN[self.device] and super().serves(row)

    def run(self, race: tuple[str], what: str) -> dict[str, Outcome]:
        place = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        entrants = self.start(place, what)
        count, turns = TURN[self.device], self.turns
        protocol = Protocol(warmup=0, least=turns, most=turns, seconds=0.0)

        def turn(entrant: Entrant, content: None) -> dict:
            with self.awake(entrant):
                return entrant.process.ask("steps", count=count)

        ceilings = process.race(what, entrants.values(), protocol, self.device, lambda: None, turn)
        last = self.rungs[-1]
        with phase(f"{what}: profile of {last!r}"), entrants[last].refusing():
            if not entrants[last].reason:
                with self.awake(entrants[last]):
                    self.shares = {"rung": last, **entrants[last].process.ask("shares", count=count)}
        return {
            rung: entrant.reason or (entrant.all("seconds"), self.row(race, rung, entrant, ceilings))
            for rung, entrant in entrants.items()
        }

    @contextmanager
    def awake(self, entrant: Entrant) -> Iterator[None]:
        """An entrant has the device to itself, from its start or from where it was parked; after a fault it is gone."""
        try:
            if self.parks and entrant.built.get("parked"):
                entrant.process.ask("wake")
            yield
            if self.parks:
                entrant.built |= {"parked": True, **entrant.process.ask("park")}
        except Wrong:
            entrant.process.close()
            raise

    def start(self, place: Path, what: str) -> dict[str, Entrant]:
        """Build every rung and let it take its first steps, one after the other."""
        from semantica.benchmarks.quality.web import draw_web

        draw_web(place / "web", groups=16, images_per_group=16)
        arguments = {"data": str(place / "web" / "train"), "preset": self.preset, "batch": self.batch}
        arguments |= {"device": self.device, "workers": self.workers}
        entrants = {r: Entrant(Process("semantica.benchmarks.training.worker", r, place)) for r in self.rungs}
        plain = entrants[self.rungs[0]]
        for entrant in entrants.values():
            self.closing.callback(entrant.process.close)
        with phase(f"{what}: build, first steps", len(entrants)) as done:
            for rung, entrant in entrants.items():
                with entrant.refusing(), self.awake(entrant):
                    entrant.built = entrant.process.ask("build", rung=rung, **arguments)
                    entrant.first = entrant.process.ask("steps", count=1)
                    entrant.first["losses"] += entrant.process.ask("steps", count=WARMUP - 1)["losses"]
                    if plain.reason:
                        raise Wrong(f"nothing to compare with: {plain.reason}")
                    compare_losses(entrant.first["losses"], plain.first["losses"], entrant.built["arithmetic"])
                done.update()
        return entrants

    def row(self, race: tuple[str], rung: str, entrant: Entrant, ceilings: dict[str, float]) -> dict:
        """Images per second and MFU are of all timed steps, waiting for data included."""
        times, flops = entrant.times, self.batch * entrant.built["flops_per_image"]
        arithmetic, total = entrant.built["arithmetic"], sum(times.device)
        row = store.row(("train", rung, *race, "step", arithmetic, "both"), times, self.device, flops, ceilings)
        rate = len(times.device) / total
        row |= {"images_per_s": self.batch * rate, "tflops": flops * rate / 1e12}
        row["mfu"] = store.share(row["tflops"], store.matrix_rate(ceilings, arithmetic))
        row["data_wait"] = sum(entrant.all("waits")) / total
        row |= {"loss": entrant.first["losses"][-1], **entrant.facts}
        row |= {"parked": self.parks, "parked_bytes": entrant.built.get("parked_bytes", 0)}
        return row | self.code(race, rung)

    def code(self, race: tuple[str], name: str) -> dict:
        arch = store.environment(self.device)["arch"]
        return {"op": "train", "arch": arch, "kernel_hash": source_hash("train", arch)}

    def more(self) -> dict:
        return {"shares": self.shares, "scaling": self.scaling}

    def tables(self, rows: list[dict]) -> dict:
        found = {}
        if self.shares:
            rung = repr(self.shares["rung"])
            heading = f"a step of {rung}, by kind of work and by operator (PyTorch's profiler)"
            found[heading] = SHARES, shares(self.shares)
        if self.scaling:
            found[SCALING] = heads(SCALED), cells(SCALED, self.scaling)
        return found


DEFAULT = functools.partial(TrainingBench, "tiny", 2, 4, "cpu", 0, ("plain", "+ channels last", "+ fused group norm"))
