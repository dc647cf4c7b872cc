"""Runs of all steering tasks on one model: weights searched, tasks scored, energies turned off."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from tqdm import tqdm

from semantica.benchmarks.quality.controls import TASKS, Outcome, Steering, captions, unguided
from semantica.pipelines.base import VariationPipeline

WORDS = ("shape", "colour")
# of energies by task, where the search begins
WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "move": {"position": 4000.0, "size": 0.0, "shape": 4000.0, "appearance": 0.0},
    "half": {"shape": 4000.0, "size": 500.0, "position": 300.0, "appearance": 0.0},
    "double": {"shape": 4000.0, "size": 500.0, "position": 300.0, "appearance": 0.0},
    "layout": {"shape": 18000.0},
    "appearance": {"appearance": 10.0},
}
# what the search multiplies all weights of a task with
FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0)
Means = Mapping[str, float]


def resizing(factor: float) -> Callable[[Means], float]:
    """How near the mean area comes to `factor` times what it was: 0 at best."""
    return lambda means: -abs(float(np.log(max(means["ratio"], 1e-3) / factor)))


# what the search makes as large as it can; objects that are lost weigh as much as half of their way
SCORES: Mapping[str, Callable[[Means], float]] = {
    "move": lambda m: 0.5 * (m["on topic after"] - m["on topic before"]) - m["distance after"],
    "half": resizing(0.5),
    "double": resizing(2.0),
    "layout": lambda m: m["IoU after"],
    "appearance": lambda m: m["palette after"],
}


def means(outcome: Outcome) -> dict[str, float]:
    return {figure: float(every.mean()) for figure, every in outcome.figures.items()}


def best_layers(pointed: list[dict]) -> dict[str, tuple[str, ...]]:
    """The layer where each word points best, over all levels of the pointing game."""
    made = {}
    for word in WORDS:
        total: dict[str, float] = {}
        for row in pointed:
            if row["word"] == word and row["layer"] != "all":
                total[row["layer"]] = total.get(row["layer"], 0.0) + row["hits"]
        made[word] = (max(total, key=total.__getitem__),)
    return made


def best_word(pointed: list[dict]) -> str:
    """Which of an object's words points better, each in its best layer, over all levels of the pointing game."""
    layers = best_layers(pointed)
    total = dict.fromkeys(WORDS, 0.0)
    for row in pointed:
        if row["layer"] in layers[row["word"]]:
            total[row["word"]] += row["hits"]
    return max(total, key=total.__getitem__)


def search(pipe: VariationPipeline, how: Steering, seed: int, samples: int) -> tuple[Steering, dict]:
    """The best of `FACTORS` for each task's weights, and what each of them gave: `{task: {factor: {figure: mean}}}`."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tqdm(total=len(TASKS) * len(FACTORS), desc="search", unit="run") as bar:
        for name, (things, open, run) in TASKS.items():
            batch, made = unguided(pipe, captions(samples, things, seed, open), how, seed), {}
            for factor in FACTORS:
                made[factor] = means(run(pipe, batch, how.scaled(name, factor)))
                bar.update()
            how = how.scaled(name, max(made, key=lambda factor: SCORES[name](made[factor])))
            figures[name] = {f"{factor:g}": row for factor, row in made.items()}
    return how, figures


def steer(
    pipe: VariationPipeline, how: Steering, seeds: Iterable[int], samples: int
) -> tuple[dict, dict[str, Outcome]]:
    """Figures of each task, `{task: {figure: {mean, error, seeds}}}`: over all samples, their standard error, and the
    means of single seeds; and the outcomes of the first seed."""
    figures, shown, seeds = {}, {}, list(seeds)
    with tqdm(total=len(TASKS) * len(seeds), desc="steer", unit="batch") as bar:
        for name, (things, open, run) in TASKS.items():
            outcomes = []
            for seed in seeds:
                batch = unguided(pipe, captions(samples, things, seed, open), how, seed)
                outcomes.append(run(pipe, batch, how))
                bar.update()
            shown[name], figures[name] = outcomes[0], {}
            for figure in outcomes[0].figures:
                rows = [outcome.figures[figure] for outcome in outcomes]
                every = np.concatenate(rows)
                error = float(every.std(ddof=1) / np.sqrt(len(every))) if len(every) > 1 else 0.0
                by_seed = [float(row.mean()) for row in rows]
                figures[name][figure] = {"mean": float(every.mean()), "error": error, "seeds": by_seed}
    return figures, shown


def ablate(pipe: VariationPipeline, how: Steering, seed: int, samples: int) -> dict:
    """Means of each task's figures with all energies, and with each of them off: `{task: {way: {figure: mean}}}`."""
    figures: dict[str, dict] = {}
    for name, (things, open, run) in tqdm(TASKS.items(), desc="ablate", unit="task"):
        weights = how.weights[name]
        batch = unguided(pipe, captions(samples, things, seed, open), how, seed)
        ways = {"all energies": how} | {f"no {off}": how.without(name, off) for off in weights if weights[off]}
        figures[name] = {way: means(run(pipe, batch, changed)) for way, changed in ways.items()}
    return figures
