"""The rows of training: the ladder from a plain loop to the trainer, raced in turns of a few steps.

Run by `semantica bench train`, or by plain pytest: a small batch, without what compiles. Accuracy first: each rung
trains from the same weights on the same samples and noise, so that its first losses must be those of the plain loop,
within what the precision costs.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from semantica.benchmarks.harness import process
from semantica.benchmarks.harness.process import Entrant, Process, Wrong
from semantica.benchmarks.harness.progress import phase
from semantica.benchmarks.harness.race import Protocol
from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.store import measured
from semantica.benchmarks.harness.suite import Bench, Outcome, bench, pytest_generate_tests, test_row
from semantica.benchmarks.harness.table import cells, heads
from semantica.benchmarks.training.scaling import Scaled
from semantica.benchmarks.training.tables import SCALED, SCALING, SHARES, shares
from semantica.report import Part

__all__ = ["bench", "pytest_generate_tests", "test_row"]
# steps before the clock: compiled, allocated and cached by then; their losses are compared
WARMUP = 3
# steps of a rung before the next has its turn
TURN = 2
# largest relative difference of a loss from the plain loop's
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}


def compare_losses(losses: list[float], plain: list[float], arithmetic: str) -> None:
    """Raises `Wrong` where a loss is not the plain loop's."""
    for i, (loss, expected) in enumerate(zip(losses, plain, strict=True)):
        # written so that NaN fails
        if not abs(loss - expected) <= TOLERANCE[arithmetic] * abs(expected):
            raise Wrong(f"loss {loss:.6g} in step {i + 1}, the plain loop's is {expected:.6g}")


class TrainingBench(Bench):
    """One race: all rungs on one preset and batch."""

    def __init__(self, preset: str, batch: int, steps: int, device: str, workers: int, rungs: Sequence[str]):
        """
        steps: timed ones of each rung. workers: processes that load data, for each rung.
        """
        super().__init__()
        self.preset, self.batch, self.steps, self.device = preset, batch, steps, device
        self.workers, self.rungs = workers, list(rungs)
        self.shares: dict = {}
        self.scaling: list[Scaled] = []

    @property
    def problem(self) -> str:
        return f"{self.preset} batch {self.batch}"

    def races(self) -> dict[str, list[str]]:
        return {self.problem: self.rungs}

    def label(self, race: str) -> dict[str, str]:
        return {"problem": race}

    def run(self, race: str, what: str) -> dict[str, Outcome]:
        place = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        entrants = self.start(place, what)
        turns = -(-self.steps // TURN)
        protocol = Protocol(warmup=0, least=turns, most=turns, seconds=0.0)

        def turn(entrant: Entrant, content: None) -> dict:
            return entrant.process.ask("steps", count=TURN)

        ceilings = process.race(what, entrants.values(), protocol, self.device, lambda: None, turn)
        last = self.rungs[-1]
        with phase(f"{what}: profile of {last!r}"), entrants[last].refusing():
            if not entrants[last].reason:
                self.shares = {"rung": last, **entrants[last].process.ask("shares", count=TURN)}
        return {rung: self.outcome_of(rung, entrant, ceilings) for rung, entrant in entrants.items()}

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
                with entrant.refusing():
                    entrant.built = entrant.process.ask("build", rung=rung, **arguments)
                    entrant.first = entrant.process.ask("steps", count=WARMUP)
                    if plain.reason:
                        raise Wrong(f"nothing to compare with: {plain.reason}")
                    compare_losses(entrant.first["losses"], plain.first["losses"], entrant.built["arithmetic"])
                done.update()
        return entrants

    def outcome_of(self, rung: str, entrant: Entrant, ceilings: dict[str, float]) -> Outcome:
        """Images per second and MFU are of all timed steps, waiting for data included."""
        if entrant.reason:
            return Outcome(reason=entrant.reason)
        times, arithmetic, flops = entrant.times, entrant.built["arithmetic"], entrant.built["flops_per_image"]
        total, row = sum(times.device), measured(times, self.device)
        rate = self.batch * len(times.device) / total
        peak = ceilings["matrix_tflops" if arithmetic == "bf16" else "matrix_tflops_fp32"]
        fields = {
            "op": "train",
            "impl": rung,
            "shape": self.problem,
            "layout": "step",
            "dtype": arithmetic,
            "direction": "both",
            "uses": rung,
            "images_per_s": rate,
            "mfu": rate * flops / 1e12 / peak,
            "flops": flops * self.batch,
            "tflops": rate * flops / 1e12,
            "data_wait": sum(entrant.all("waits")) / total,
            "first_s": entrant.first["seconds"][0],
            "peak_bytes": entrant.last["peak_bytes"],
            "loss": entrant.first["losses"][-1],
            "kernel_hash": source_hash("train", row["arch"]),
        }
        return Outcome(seconds=times.device, row={**fields, **ceilings, **row})

    def more(self) -> dict:
        return {"shares": self.shares, "scaling": [asdict(row) for row in self.scaling]}

    def parts(self) -> list[Part]:
        found = []
        if self.shares:
            heading = f"A step of {self.shares['rung']!r}"
            found.append(Part(heading, columns=SHARES, rows=tuple(shares(self.shares))))
        if self.scaling:
            body = cells(SCALED, [asdict(row) for row in self.scaling])
            found.append(Part(SCALING, columns=heads(SCALED), rows=tuple(body)))
        return found


def DEFAULT() -> TrainingBench:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainingBench("tiny", 2, 4, device, 0, ("plain", "+ channels last", "+ fused group norm"))
