"""The page of `semantica demo --controls`: what words look at, samples before and after steering, figures."""

import json
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semantica import __version__
from semantica.benchmarks.quality.controls import Outcome
from semantica.benchmarks.quality.pointing import attention
from semantica.benchmarks.quality.scenes import SIDE, picture_of, scene_of
from semantica.images import grid, save_png
from semantica.pipelines.base import VariationPipeline
from semantica.report import Part, picture, plot, write_page

# noise level (log-SNR) whose maps are shown; scenes and samples that are
SHOWN, ROWS = -1.0, 12
ABOUT = {
    "move": "The first object is to go to the place marked in the second picture of each three.",
    "half": "The first object is to take half its area.",
    "double": "The first object is to take twice its area.",
    "layout": "Objects are to lie as in a drawn picture of the same shapes in other colours, the second of each three.",
    "appearance": "The caption names no colours; they are to be those of a drawn picture, the second of each three.",
}


def attention_sheet(pipe: VariationPipeline, seed: int, count: int = ROWS) -> Image.Image:
    """Rows of a held-out picture of two objects and the maps of "shape 0", "colour 0", "shape 1", "colour 1"."""
    chosen = [i for i in range(200) if len(scene_of("val", seed, i).things) == 2][:count]
    scenes = [scene_of("val", seed, i) for i in chosen]
    pictures = np.stack([picture_of("val", seed, i) for i in chosen])
    maps = np.mean([found.numpy() for found in attention(pipe, scenes, pictures, SHOWN, seed).values()], 0)
    grey = (255 * maps / maps.max((-2, -1), keepdims=True)).astype(np.uint8)
    large = grey.repeat(SIDE // grey.shape[-1], -1).repeat(SIDE // grey.shape[-2], -2)
    rows = [[p, *np.repeat(row[..., None], 3, -1)] for p, row in zip(pictures, large, strict=True)]
    # two scenes to a row
    return grid([[*a, *b] for a, b in zip(rows[::2], rows[1::2], strict=False)])


def task_sheet(outcome: Outcome) -> Image.Image:
    """Threes of pictures, unguided, what was asked for, guided; three of them a row."""
    threes = [list(three) for three in zip(outcome.before, outcome.wanted, outcome.after, strict=True)]
    return grid([sum(threes[i : i + 3], []) for i in range(0, min(len(threes), ROWS), 3)], gap=2)


def compared(text: str, ways: dict[str, dict[str, float]]) -> Part:
    """A table of figures, a row for each way."""
    names = tuple(next(iter(ways.values())))
    rows = tuple((way, *[f"{row[name]:.3f}" for name in names]) for way, row in ways.items())
    return Part(text=text, columns=("", *names), rows=rows)


def report(out: Path, pipe: VariationPipeline, figures: dict, shown: dict[str, Outcome], seed: int) -> None:
    """controls.html and its pictures."""
    save_png(attention_sheet(pipe, seed), out / "attention.png")
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    held = [r for r in rows if "held_out_loss" in r]
    at = [r["step"] for r in held]
    curves = {
        "training": ([r["step"] for r in rows if "loss" in r], [r["loss"] for r in rows if "loss" in r]),
        "held out, right text": (at, [r["held_out_loss"] for r in held]),
        "held out, another text": (at, [r["held_out_loss_shuffled"] for r in held]),
    }
    goals = tuple(
        (f"{g['task']}: {g['meaning']}", f"{g['value']:.1%}", f"{g['goal']:.0%}", "yes" if g["reached"] else "no")
        for g in figures["goals"]
    )
    pointed = tuple(
        (f"{r['word']}, log-SNR {r['logsnr']:g}, {r['layer'].removesuffix('.cross')}", f"{r['hits']:.0%}",
         f"{r['chance']:.0%}", f"{r['distance']:.3f}")
        for r in figures["pointing"]
    )  # fmt: skip
    parts = [
        Part(
            text="A small model learned pictures from captions alone, through cross-attention to their words. It was "
            "never trained to be steered: each sample below follows the gradient of an energy of what its words look "
            "at. Every figure is measured in the pictures, on captions with a crossing of shape and colour that "
            "training never showed."
        ),
        Part("Goals", columns=("", "value", "goal", "reached"), rows=goals),
        Part(
            "Where words look",
            f"A held-out picture, and in it noised to log-SNR {SHOWN:g} the attention of its words, averaged over "
            "layers and heads: shape and colour of the first object, of the second. Brightest is most.",
            True,
            png=picture(out / "attention.png"),
            alt="attention of words",
        ),
    ]
    for name, outcome in shown.items():
        save_png(task_sheet(outcome), out / f"{name}.png")
        table = tuple(
            (figure, f"{f['mean']:.3f} ± {f['error']:.3f}", ", ".join(f"{mean:.3f}" for mean in f["seeds"]))
            for figure, f in figures["tasks"][name].items()
        )
        parts.append(
            Part(f"Task: {name}", ABOUT[name] + " Each three: unguided, what is asked for, guided; same noise.", True,
                 columns=("figure", "mean ± standard error", "seeds"), rows=table, png=picture(out / f"{name}.png"),
                 alt=name)
        )  # fmt: skip
        used = ", ".join(f"{energy} {weight:g}" for energy, weight in figures["weights"][name].items() if weight)
        parts.append(compared(f"Weights: {used}. With each energy off, fewer samples:", figures["ablations"][name]))
        tried = {f"weights x {factor}": row for factor, row in figures["searched"][name].items()}
        parts.append(compared("The search for weights, on captions and noise of another seed:", tried))
    facts = (
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}"),
        ("versions", f"semantica {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("training", f"{figures['steps']} steps of 32 pictures"),
        *((f"seconds to {name}", f"{value:.1f}") for name, value in figures["seconds"].items()),
    )
    parts += [
        Part("Pointing game", "Shares of objects that a word points at, all layers and their mean.", True,
             columns=("word, level, layer", "hits", "chance", "distance of centroids"), rows=pointed),
        Part("Loss", svg=plot(curves, "step", "squared error of the image", log=True)),
        Part("What ran", columns=("", ""), rows=facts),
    ]  # fmt: skip
    write_page(out / "controls.html", "Semantica: steering by attention, measured", parts, width=9 * 34 * 3)
