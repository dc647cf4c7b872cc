"""How far a sweep is and what is left of it, by what its files say: so it is the same for other nodes' cells."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from semantica.benchmarks.quality.sweep.kept import evaluation_at, steps_of, written_by
from semantica.progress import time_left

Pace = dict[str, list[float]]


@dataclass(eq=False)
class Work:
    """What there is to do for a cell.

    Attributes:
        kind: cells of one kind differ in their seed alone.
        place: of what is known of it. request: what is asked of it.
        started: when its process was, in seconds of `time.monotonic`; 0 before. first: its steps by then.
    """

    kind: str
    place: Path
    request: dict
    started: float = 0.0
    first: int = 0

    @property
    def run(self) -> Path:
        return Path(self.request["train"]["out"])

    @property
    def steps(self) -> int:
        return self.request["train"]["steps"]

    def begin(self) -> None:
        self.started, self.first = time.monotonic(), min(self.steps, steps_of(self.run))

    def done(self) -> tuple[int, int]:
        """Steps and evaluations that are there since it was started, or before."""
        made = sum(evaluation_at(self.place, g).exists() for g in self.request["guidance"])
        return min(self.steps, steps_of(self.run)), made


class Estimate:
    """Seconds of a step and of an evaluation, by kind of cell: of those that ended, now or in an earlier sweep, and for
    kinds that are new the mean of all; before the first has ended, of the steps of those that run."""

    def __init__(self, together: int):
        self.together = together
        self.steps: Pace = {}
        self.evaluations: Pace = {}

    def learn(self, work: Work) -> None:
        """From what a cell's process wrote."""
        trained = written_by(work.place / "trained.json") or {}
        add(self.steps, work.kind, trained.get("seconds", 0.0), trained.get("steps", 0))
        for guidance in work.request["guidance"]:
            made = (written_by(evaluation_at(work.place, guidance)) or {}).get("sweep", {})
            add(self.evaluations, work.kind, made.get("seconds", 0.0), int("seconds" in made))

    def left(self, todo: Iterable[Work]) -> str:
        """What is left of cells that run or wait, in words."""
        now, works = time.monotonic(), list(todo)
        if not works:
            return ""
        done = [work.done() for work in works]
        guess = dict(self.steps)
        if not guess:
            for work, (steps, _) in zip(works, done):
                if work.started and steps > work.first:
                    add(guess, work.kind, now - work.started, steps - work.first)
        step, evaluation = rates(guess), rates(self.evaluations)
        if not step:
            return ""
        each = [
            (work.steps - steps) * step.get(work.kind, step[""])
            + (len(work.request["guidance"]) - made) * evaluation.get(work.kind, evaluation.get("", 0.0))
            for work, (steps, made) in zip(works, done)
        ]
        # no cell is shared among processes
        seconds = max(sum(each) / min(self.together, len(each)), max(each))
        return time_left(seconds) + ("" if evaluation else ", evaluations not counted")


def add(pace: Pace, kind: str, seconds: float, units: int) -> None:
    if units > 0:
        had = pace.get(kind, [0.0, 0.0])
        pace[kind] = [had[0] + seconds, had[1] + units]


def rates(pace: Pace) -> dict[str, float]:
    """Seconds of a unit by kind, and of all together under ""; empty where nothing is known."""
    if not pace:
        return {}
    seconds, units = (sum(each) for each in zip(*pace.values()))
    return {kind: s / n for kind, (s, n) in pace.items()} | {"": seconds / units}
