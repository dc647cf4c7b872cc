"""How fast this machine trains the demo's model, and so how long the demo takes or how many steps fit into a time."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from semantica.errors import UserError
from semantica.files import read_json
from semantica.progress import spelled
from semantica.train.config import TrainConfig
from semantica.train.loop import train
from semantica.train.preemption import Stop
from semantica.train.run.checkpoint import folders, number

# steps that are not counted, since the first ones compile, and those that are
WARM, COUNTED = 12, 24
# what comes before and after training takes as long as so many steps: 45 s where a step took 0.18 s, and the same share
# on a machine half as fast
REST = 250
# fewer steps teach nothing, and counts come in these
LEAST, UNIT = 100, 50


class Pace(Stop):
    """Times steps of a training, which asks it in each whether to stop; says once what it found.

    Args:
        found: called with the seconds of a step and those before the first that counted.
        ends: whether to stop then.
    """

    def __init__(self, found: Callable[[float, float], None], ends: bool = False):
        self.found, self.ends, self.asked = found, ends, 0
        self.made, self.began = time.perf_counter(), 0.0

    def __call__(self) -> bool:
        self.asked += 1
        now = time.perf_counter()
        if self.asked == WARM:
            self.began = now
        if self.asked == WARM + COUNTED:
            self.found((now - self.began) / COUNTED, self.began - self.made)
        return self.ends and self.asked >= WARM + COUNTED


def announced(steps: int, done: int = 0) -> Pace:
    """Says after the first steps of a training of so many how long all will take. done: steps that it goes on from."""

    def say(step: float, start: float) -> None:
        left = (steps - done - WARM - COUNTED + REST) * step
        # beside the bar of the training, not behind it
        speed = f"{1 / step:.1f} steps a second on this machine"
        tqdm.write(f"  {speed}: about {spelled(left)} to go, training and the rest")

    return Pace(say)


def steps_within(minutes: float, rehearsed: TrainConfig, spent: float) -> int:
    """Steps of the demo that fit into a time: a few are trained in a folder of their own, which is removed.

    Args:
        minutes: for the whole demo. rehearsed: what would be trained. spent: seconds that are gone by now.

    Raises:
        UserError: not even `LEAST` steps fit.
    """
    measured: list[tuple[float, float]] = []
    place = Path(rehearsed.out).with_name(".pace")
    shutil.rmtree(place, ignore_errors=True)
    began = time.perf_counter()
    never = WARM + COUNTED + 1
    try:
        train(
            dataclasses.replace(
                rehearsed, out=place, val=None, steps=never, eval_every=never, sample_every=never, save_every=never
            ),
            Pace(lambda *found: measured.append(found), ends=True),
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    step, start = measured[0]
    spent += time.perf_counter() - began
    # what was compiled once is found again, but a start is a start
    fit = int((60 * minutes - spent - start / 2) / step) - REST
    if fit < LEAST:
        least = (spent + start / 2 + (LEAST + REST) * step) / 60
        raise UserError(
            f"--minutes {minutes:g} is too short for this machine, which makes {1 / step:.1f} steps a second: "
            f"give at least {least + 0.05:.1f}"
        )
    steps = fit // UNIT * UNIT
    print(f"  {1 / step:.1f} steps a second on this machine: {steps} steps fit, the same as with --steps {steps}")
    return steps


def steps_made(run: Path) -> int:
    """Steps of a run's newest checkpoint; 0 where there is none."""
    return max(map(number, folders(run / "checkpoints")), default=0)


def steps_before(run: Path) -> int | None:
    """Steps of a run that is there and goes on; None where there is none."""
    return read_json(path).get("train", {}).get("steps") if (path := run / "config.json").is_file() else None
