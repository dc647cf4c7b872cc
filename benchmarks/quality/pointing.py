"""Does a word's attention lie on its object? A pointing game on drawn scenes, whose masks are known.

A scene's picture is noised to a level and denoised once with its caption. The word points at the place of the grid
where its attention, averaged over heads, is largest. It hits where the object, its hole filled, covers at least a
quarter of that place, or half of what it covers anywhere (objects smaller than a place). The game is that of Zhang et
al. (arXiv 1608.00507), who allow 15 pixels around an object.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from semantica.benchmarks.quality.recognise import centroid
from semantica.benchmarks.quality.scenes import SIDE, Scene, Thing, cover
from semantica.diffusion import add_noise
from semantica.images import to_tensor
from semantica.pipelines.base import VariationPipeline
from semantica.solvers import noise
from semantica.steering.energies import grid_features
from semantica.steering.objects import Objects
from semantica.steering.sources import looked_at
from semantica.steering.taps import MAPS, Reader, Taps

WORDS = ("shape", "colour")


def text_tokens(pipe: VariationPipeline) -> Callable[[str, str], tuple[int, ...]]:
    """`(prompt, word) -> places of the word's tokens` of a pipeline with a text stream."""
    return pipe.encoder.encoders["text"].tokenizer.tokens_of


def word_objects(pipe: VariationPipeline, scenes: Sequence[Scene], words: Sequence[str] = WORDS) -> Objects:
    """The words of objects of scenes, as many in each; those of object i are called "shape i" and "colour i"."""
    tokens_of = text_tokens(pipe)
    made = []
    for scene in scenes:
        named = {f"{word} {i}": getattr(thing, word) for i, thing in enumerate(scene.things) for word in words}
        made.append(Objects.of({name: tokens_of(scene.caption, value) for name, value in named.items()}))
    return Objects.stack(made)


def solid(thing: Thing) -> np.ndarray:
    """How much of each pixel an object covers, a ring's hole counted in."""
    drawn = cover(thing.shape, thing.centre, thing.radius)
    if thing.shape != "ring":
        return drawn
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return np.maximum(drawn, np.hypot(x - thing.centre[0], y - thing.centre[1]) < thing.radius)


def hits(drawn: np.ndarray, side: int) -> np.ndarray:
    """Which places of a grid, bool `[side, side]`, count as on an object that covers `[SIDE, SIDE]`."""
    share = drawn.reshape(side, SIDE // side, side, SIDE // side).mean((1, 3))
    return share >= min(0.25, share.max() / 2)


def attention(
    pipe: VariationPipeline, scenes: Sequence[Scene], pictures: np.ndarray, logsnr: float, seed: int = 0
) -> dict[str, Tensor]:
    """Maps of the words of `word_objects` by layer, `[B, S, h, w]`, of pictures uint8 `[B, SIDE, SIDE, 3]`."""
    objects, denoiser = word_objects(pipe, scenes), pipe.denoiser
    x = to_tensor(pictures)
    level = torch.full((len(x),), float(logsnr))
    z = add_noise(x, torch.from_numpy(noise(seed, tuple(x.shape))), level)
    condition = pipe.condition(pipe.prepare({"text": [scene.caption for scene in scenes]}))
    return looked_at(denoiser, Reader(denoiser, Taps(), objects, (MAPS,)), z, level, condition)[1].maps


def pointing(
    pipe: VariationPipeline, scenes: Sequence[Scene], pictures: np.ndarray, levels: Sequence[float], seed: int = 0
) -> list[dict]:
    """The game at noise levels (log-SNR), for each layer and their mean ("all").

    Returns:
        Rows of `logsnr`, `word` ("shape" or "colour"), `layer`, `hits` and `chance`, shares of all objects, and
        `distance`, the mean distance of the map's centroid to the object's, as a share of the picture.
    """
    rows = []
    for logsnr in levels:
        scores: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for count in sorted({len(scene.things) for scene in scenes}):
            chosen = [i for i, scene in enumerate(scenes) if len(scene.things) == count]
            some = [scenes[i] for i in chosen]
            maps = attention(pipe, some, pictures[chosen], logsnr, seed)
            maps["all"] = torch.stack([*maps.values()]).mean(0)
            for layer, found in maps.items():
                for scene, words in zip(some, found, strict=True):
                    for number, thing in enumerate(scene.things):
                        pairs = words[number * len(WORDS) : (number + 1) * len(WORDS)]
                        for word, seen in zip(WORDS, pairs, strict=True):
                            scores.setdefault((word, layer), []).append(score(seen, solid(thing)))
        for (word, layer), found in scores.items():
            names = ("hits", "distance", "chance")
            figures = dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))
            rows.append({"logsnr": logsnr, "word": word, "layer": layer, **figures})
    return rows


def score(seen: Tensor, drawn: np.ndarray) -> tuple[float, float, float]:
    """Of one map `[h, w]`: a hit or not, the distance of its centroid, and the chance of a hit."""
    good = hits(drawn, seen.shape[0])
    places = grid_features(*seen.shape)[:, 1:] + 0.5
    middle = (seen.flatten() @ places / seen.sum()).numpy()
    return float(good.flat[int(seen.argmax())]), float(np.hypot(*(middle - centroid(drawn)))), float(good.mean())
