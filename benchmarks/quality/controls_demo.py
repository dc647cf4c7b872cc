"""`semantica demo --controls`: draw captioned scenes, train on them, steer held-out captions, measure, report."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semantica.errors import UserError
from semantica.files import write_json

if TYPE_CHECKING:
    from semantica.pipelines.base import VariationPipeline

# training steps by default; noise levels (log-SNR) of the pointing game
STEPS, LEVELS = 4500, (-5.0, -3.0, -1.0, 1.0, 3.0)
# drawn scenes to train on, and held-out ones; of these in the pointing game
PICTURES, HELD_OUT, POINTED = 16_000, 240, 90
# samples and seeds of each task; samples of the search for weights, and of the ablations; sampling steps
SAMPLES, SEEDS, SEARCHED, ABLATED, SAMPLING_STEPS = 16, 2, 16, 8, 32


@dataclass(frozen=True)
class Goal:
    """A figure of a task that has to be reached: `value` is made of the means of its figures."""

    task: str
    meaning: str
    least: float
    value: Callable[[dict[str, float]], float]


def share(before: str, after: str) -> Callable[[dict[str, float]], float]:
    return lambda means: 1 - means[after] / max(means[before], 1e-9)


GOALS = (
    Goal("move", "distance to the place asked for, taken off", 2 / 3, share("distance before", "distance after")),
    # a difference of rates over all samples, no share of those before
    Goal("move", "on topic: 1 - (before - after)", 0.95, lambda m: 1 - (m["on topic before"] - m["on topic after"])),
    Goal("half", "direction right", 0.9, lambda m: m["right direction"]),
    Goal("double", "direction right", 0.9, lambda m: m["right direction"]),
    Goal("half", "mean area within 30 %", 0.7, lambda m: 1 - abs(m["ratio"] / 0.5 - 1)),
    Goal("double", "mean area within 30 %", 0.7, lambda m: 1 - abs(m["ratio"] / 2 - 1)),
    Goal("layout", "IoU with the source's masks", 0.6, lambda m: m["IoU after"]),
    Goal("appearance", "palette as in the source", 0.9, lambda m: m["palette after"]),
)
# of the pointing game, at each word's best layer and level
POINTING = 0.8


def train_options(out: Path, steps: int, seed: int, compile: bool) -> dict:
    """What the demo trains with: words as the only condition, attention on a grid of 8 x 8."""
    return dict(
        data=out / "web" / "train", val=out / "web" / "val", out=out / "run", mode="reconstruct", condition_on="text",
        text_encoder=("phrases",), steps=steps, preset="tiny", channels=(64,), depths=(1,), width=128, depth=3, heads=4,
        batch=32, lr=2e-3, warmup=100, decay=0.4, ema=0.998, loss="x", reference=16, flip=False, crop="centre",
        compile=compile, seed=seed, workers=1, log_every=100, eval_every=max(1, steps // 5), sample_every=steps,
        save_every=max(1, steps // 3),
    )  # fmt: skip


def demo_controls(out: Path, steps: int | None, seed: int, compile: bool) -> dict:
    """Run it; returns the figures that controls.json holds.

    Raises:
        UserError: impossible options, or a folder that holds something else.
    """
    from semantica.benchmarks.quality.controls import Steering
    from semantica.benchmarks.quality.controls_page import report
    from semantica.benchmarks.quality.controls_runs import WEIGHTS, WORDS, ablate, best_layers, best_word, search, steer
    from semantica.benchmarks.quality.scenes import draw_scenes
    from semantica.memory import keep_freed_memory
    from semantica.pipelines.sample import load_pipeline
    from semantica.train.config import TrainConfig
    from semantica.train.loop import train

    steps = STEPS if steps is None else steps
    if steps < 1 or seed < 0:
        raise UserError("--steps must be at least 1, --seed at least 0")
    keep_freed_memory()
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        seconds[name] = time.perf_counter() - began
        return result

    print(f"1/4 drawing scenes with captions in {out / 'web'}")
    timed("draw", draw_scenes, out / "web", seed, PICTURES, HELD_OUT)
    print(f"2/4 training {steps} steps on their words in {out / 'run'}")
    run = timed("train", train, TrainConfig(**train_options(out, steps, seed, compile)))
    pipe = load_pipeline(run, "cpu")
    print("3/4 pointing game: does a word's attention lie on its object?")
    pointed = timed("point", pointing_game, pipe, seed)
    how = Steering(WEIGHTS, SAMPLING_STEPS, word=best_word(pointed), layers=best_layers(pointed))
    print(f"4/4 steering held-out captions: {SAMPLES} samples, {SEEDS} seeds")
    # weights are chosen on captions and noise of another seed than those that are scored
    how, searched = timed("search weights", search, pipe, how, seed + SEEDS, SEARCHED)
    tasks, shown = timed("steer", steer, pipe, how, range(seed, seed + SEEDS), SAMPLES)
    ablations = timed("ablate", ablate, pipe, how, seed, ABLATED)
    reached = []
    for word in WORDS:
        best = max((row for row in pointed if row["word"] == word), key=lambda row: row["hits"])
        where = f"{word} words, {best['layer'].removesuffix('.cross')}, log-SNR {best['logsnr']:g}"
        value = best["hits"]
        reached.append(
            {"task": "pointing", "meaning": where, "goal": POINTING, "value": value, "reached": value >= POINTING}
        )
    for goal in GOALS:
        value = goal.value({name: figure["mean"] for name, figure in tasks[goal.task].items()})
        reached.append(
            {"task": goal.task, "meaning": goal.meaning, "goal": goal.least, "value": value,
             "reached": value >= goal.least}
        )  # fmt: skip
    figures = {
        "goals": reached, "pointing": pointed, "word": how.word, "layers": how.layers, "weights": how.weights,
        "tasks": tasks, "searched": searched, "ablations": ablations, "seconds": seconds, "steps": steps,
    }  # fmt: skip
    write_json(out / "controls.json", figures)
    report(out, pipe, figures, shown, seed)
    for row in reached:
        mark = "reached" if row["reached"] else "MISSED"
        print(f"  {row['value']:6.1%}  (goal {row['goal']:.0%}, {mark})  {row['task']}: {row['meaning']}")
    print(f"open {out / 'controls.html'}")
    return figures


def pointing_game(pipe: "VariationPipeline", seed: int) -> list[dict]:
    from semantica.benchmarks.quality.pointing import pointing
    from semantica.benchmarks.quality.scenes import picture_of, scene_of

    scenes = [scene_of("val", seed, i) for i in range(POINTED)]
    pictures = np.stack([picture_of("val", seed, i) for i in range(POINTED)])
    return pointing(pipe, scenes, pictures, LEVELS, seed)
