"""Self-guidance scored on drawn scenes: objects moved, resized, laid out and coloured as another picture has them.

Each task steers samples of held-out captions from the same noise as unguided ones, and measures both by
`semantica.benchmarks.quality.recognise`: no figure comes from the model itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from semantica.benchmarks.quality.pointing import text_tokens
from semantica.benchmarks.quality.recognise import Found, find, ground_of, iou, largest, on_topic
from semantica.benchmarks.quality.scenes import Scene, cover, draw, elsewhere, held_out_scene, recoloured
from semantica.benchmarks.quality.web import philox
from semantica.images import to_tensor
from semantica.pipelines.base import VariationPipeline
from semantica.steering.guider import Pattern, SelfGuidance
from semantica.steering.objects import Objects
from semantica.steering.recipes import copy_appearance, copy_layout, move, resize
from semantica.steering.sources import Picture, Recording
from semantica.steering.taps import Taps
from semantica.steering.terms import ORIGINAL, Term

# how far an object that is not there counts as being from where it should be
LOST = 0.5
# of the picture: the least way to a destination
FAR = 0.25


@dataclass(frozen=True)
class Steering:
    """How samples are made and steered.

    weights: of energies by task. steps, guidance: of sampling. factor, pattern: as `SelfGuidance` has them.
    word: which word of an object it is steered by, "colour" or "shape"; where captions leave colours open, its shape.
    layers: those that are read, by such words.
    """

    weights: Mapping[str, Mapping[str, float]]
    steps: int = 32
    guidance: float = 3.0
    factor: str = "sigma"
    pattern: Pattern = Pattern(dense=1.0, tail=0.05)
    word: str = "colour"
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def without(self, task: str, energy: str) -> "Steering":
        """With one energy of a task off."""
        return replace(self, weights={**self.weights, task: {**self.weights[task], energy: 0.0}})

    def scaled(self, task: str, factor: float) -> "Steering":
        """With other weights of a task, all by the same factor."""
        return replace(self, weights={**self.weights, task: {n: factor * w for n, w in self.weights[task].items()}})


@dataclass(frozen=True, eq=False)
class Batch:
    """Unguided samples of scenes' captions, uint8 `[N, SIDE, SIDE, 3]`, and what attention showed at each step."""

    scenes: list[Scene]
    objects: Objects
    taps: Taps
    pictures: np.ndarray
    recording: Recording
    seed: int

    @cached_property
    def found(self) -> list[list[Found]]:
        return [find(picture) for picture in self.pictures]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One task on one batch: what was asked for (drawn), pictures before and after, and a figure for each sample."""

    wanted: np.ndarray
    before: np.ndarray
    after: np.ndarray
    figures: dict[str, np.ndarray]


def word_of(scene: Scene, how: Steering) -> str:
    """Which word of an object it is steered by."""
    return "shape" if scene.open else how.word


def things_of(pipe: VariationPipeline, scenes: Sequence[Scene], how: Steering) -> Objects:
    """The objects of scenes, "0", "1", ..., by their words in the captions."""
    tokens_of, made = text_tokens(pipe), []
    for scene in scenes:
        words = (getattr(thing, word_of(scene, how)) for thing in scene.things)
        made.append(Objects.of({str(i): tokens_of(scene.caption, word) for i, word in enumerate(words)}))
    return Objects.stack(made)


def sampled(pipe: VariationPipeline, scenes: Sequence[Scene], how: Steering, seed: int, guider) -> np.ndarray:
    """Samples of scenes' captions, uint8 `[N, SIDE, SIDE, 3]`; the noise of each depends on the seed and its place."""
    captions = [scene.caption for scene in scenes]
    settings = dict(num_inference_steps=how.steps, guidance_scale=how.guidance, seed=seed, output_type="np")
    made = pipe({"text": captions}, guider=guider, **settings).images
    return (255 * made + 0.5).astype(np.uint8)


def unguided(pipe: VariationPipeline, scenes: Sequence[Scene], how: Steering, seed: int) -> Batch:
    """Samples without self-guidance, and the record of their attention."""
    objects, taps = things_of(pipe, scenes, how), Taps(layers=how.layers.get(word_of(scenes[0], how)))
    recording = Recording(objects, taps, how.pattern)
    return Batch(list(scenes), objects, taps, sampled(pipe, scenes, how, seed, recording), recording, seed)


def steered(pipe: VariationPipeline, batch: Batch, terms: Sequence[Term], how: Steering, sources=None) -> np.ndarray:
    """The batch's samples again, from the same noise, following an energy; unguided where it has no terms."""
    if not terms:
        return batch.pictures
    sources = {ORIGINAL: batch.recording, **(sources or {})}
    options = dict(taps=batch.taps, factor=how.factor, pattern=how.pattern, recompute=False)
    guider = SelfGuidance(terms, batch.objects, sources, **options)
    return sampled(pipe, batch.scenes, how, batch.seed, guider)


def topics(batch: Batch, pictures: np.ndarray) -> np.ndarray:
    """Whether each picture shows its caption's objects and nothing else."""
    return np.array(
        [on_topic(find(p), ground_of(p)[0], scene) for p, scene in zip(pictures, batch.scenes, strict=True)], float
    )


def destination(found: list[Found], scene: Scene, rng: np.random.Generator) -> tuple[float, float]:
    """A place for the first object, at least `FAR` from where it is, where it stays inside and clear of the others."""
    own = largest(found, scene.things[0].colour)
    others = [each for each in found if each.colour != scene.things[0].colour]
    # an object of that area and the least compact shape reaches so far
    reach = 0.8 * np.sqrt(own.area) if own else 0.2
    tries = rng.uniform(min(reach, 0.45), max(1 - reach, 0.55), (256, 2))
    here = np.array(own.centroid if own else (0.5, 0.5))
    apart = np.hypot(*(tries - here).T) >= FAR
    clear = np.full(len(tries), 0.05)
    for each in others:
        gap = np.hypot(*(tries - each.centroid).T) - reach - 0.8 * np.sqrt(each.area)
        clear = np.minimum(clear, gap)
    # the first that is clear of all, else the clearest
    place = tries[int(np.argmax(np.where(apart, clear, -1)))]
    return float(place[0]), float(place[1])


def distances(batch: Batch, pictures: np.ndarray, places: Sequence[tuple[float, float]]) -> np.ndarray:
    """From the first object's centroid to the place that was asked for."""
    made = []
    for picture, scene, place in zip(pictures, batch.scenes, places, strict=True):
        own = largest(find(picture, False), scene.things[0].colour)
        made.append(np.hypot(*np.subtract(own.centroid, place)) if own else LOST)
    return np.array(made)


def moved(pipe: VariationPipeline, batch: Batch, how: Steering) -> Outcome:
    """The first object to a destination of its own; the others are to stay as they are."""
    rng = philox(batch.seed, 20)
    places = [destination(found, scene, rng) for found, scene in zip(batch.found, batch.scenes, strict=True)]
    others = batch.objects.names[1:]
    terms = move(("0",), to=torch.tensor(places)[:, None], others=others, weights=how.weights["move"])
    after = steered(pipe, batch, terms, how)
    figures = {
        "distance before": distances(batch, batch.pictures, places),
        "distance after": distances(batch, after, places),
        "on topic before": topics(batch, batch.pictures),
        "on topic after": topics(batch, after),
    }
    return Outcome(np.stack([marked(p, xy) for p, xy in zip(batch.pictures, places)]), batch.pictures, after, figures)


def marked(picture: np.ndarray, place: tuple[float, float]) -> np.ndarray:
    """A picture with a cross of lines at a place."""
    made, (x, y) = picture.copy(), (int(value * len(picture)) for value in place)
    made[y, max(0, x - 2) : x + 3] = made[max(0, y - 2) : y + 3, x] = (0, 255, 0)
    return made


def areas(batch: Batch, pictures: np.ndarray) -> np.ndarray:
    """Share of the picture of the first object; 0 where there is none."""
    found = [largest(find(p, False), scene.things[0].colour) for p, scene in zip(pictures, batch.scenes, strict=True)]
    return np.array([each.area if each else 0.0 for each in found])


def ratios(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Of areas; 1 for an object that was not there, as of nothing any ratio may be made and the mean is of all."""
    there = before > 0
    return np.where(there, now / np.where(there, before, 1), 1.0)


def directions(before: np.ndarray, now: np.ndarray, factor: float) -> np.ndarray:
    """Whether each object grew, or shrank, as `factor` wants; one that was not there or is lost did neither."""
    return ((before > 0) & (now > 0) & ((now - before) * (factor - 1) > 0)).astype(float)


def resized(pipe: VariationPipeline, batch: Batch, how: Steering, factor: float) -> Outcome:
    """The first object with `factor` times its area, at its place."""
    weights = how.weights["half" if factor < 1 else "double"]
    terms = resize(("0",), factor, others=batch.objects.names[1:], weights=weights)
    after = steered(pipe, batch, terms, how)
    before, now = areas(batch, batch.pictures), areas(batch, after)
    ratio = ratios(before, now)
    figures = {
        "ratio": ratio,
        "within 30 %": (np.abs(ratio / factor - 1) <= 0.3).astype(float),
        "right direction": directions(before, now, factor),
        "on topic before": topics(batch, batch.pictures),
        "on topic after": topics(batch, after),
    }
    return Outcome(batch.pictures, batch.pictures, after, figures)


def source_of(pipe: VariationPipeline, scenes: Sequence[Scene], how: Steering, seed: int) -> tuple[np.ndarray, Picture]:
    """Drawn pictures of scenes, and as a source of targets."""
    pictures = np.stack([draw(scene, philox(seed, 21, i)) for i, scene in enumerate(scenes)])
    with torch.no_grad():
        condition = pipe.condition(pipe.prepare({"text": [scene.caption for scene in scenes]}))
    return pictures, Picture(to_tensor(pictures), condition, things_of(pipe, scenes, how), seed)


def overlaps(batch: Batch, pictures: np.ndarray, sources: Sequence[Scene]) -> np.ndarray:
    """Mean over a scene's objects of the IoU with the source's object of that number."""
    made = []
    for picture, scene, source in zip(pictures, batch.scenes, sources, strict=True):
        found, parts = find(picture, False), []
        for thing, theirs in zip(scene.things, source.things, strict=True):
            own = largest(found, thing.colour)
            parts.append(iou(own.cover, cover(theirs.shape, theirs.centre, theirs.radius)) if own else 0.0)
        made.append(np.mean(parts))
    return np.array(made)


def laid_out(pipe: VariationPipeline, batch: Batch, how: Steering) -> Outcome:
    """All objects where, and as large as, a drawn picture of the same shapes in other colours has them."""
    rng = philox(batch.seed, 22)
    sources = [elsewhere(recoloured(scene, rng), rng) for scene in batch.scenes]
    shown, source = source_of(pipe, sources, how, batch.seed)
    after = steered(pipe, batch, copy_layout("layout", weights=how.weights["layout"]), how, {"layout": source})
    figures = {
        "IoU before": overlaps(batch, batch.pictures, sources),
        "IoU after": overlaps(batch, after, sources),
        "on topic before": topics(batch, batch.pictures),
        "on topic after": topics(batch, after),
    }
    return Outcome(shown, batch.pictures, after, figures)


def matches(pictures: np.ndarray, sources: Sequence[Scene]) -> np.ndarray:
    """Share of a source's objects that a picture has in that shape and colour."""
    made = []
    for picture, source in zip(pictures, sources, strict=True):
        shown = {(each.shape, each.colour) for each in find(picture)}
        made.append(np.mean([(thing.shape, thing.colour) in shown for thing in source.things]))
    return np.array(made)


def palettes(pictures: np.ndarray, sources: Sequence[Scene]) -> np.ndarray:
    """Colours of objects that a picture shares with a source, as a share of those that either has."""
    made = []
    for picture, source in zip(pictures, sources, strict=True):
        shown, wanted = {each.colour for each in find(picture, False)}, {thing.colour for thing in source.things}
        made.append(len(shown & wanted) / len(shown | wanted))
    return np.array(made)


def coloured(pipe: VariationPipeline, batch: Batch, how: Steering) -> Outcome:
    """Captions that leave colours open; objects coloured as a drawn picture has the same ones elsewhere."""
    rng = philox(batch.seed, 23)
    sources = [elsewhere(scene, rng) for scene in batch.scenes]
    shown, source = source_of(pipe, sources, how, batch.seed)
    terms = copy_appearance("appearance", weights=how.weights["appearance"])
    after = steered(pipe, batch, terms, how, {"appearance": source})
    figures = {
        "palette before": palettes(batch.pictures, sources),
        "palette after": palettes(after, sources),
        "object by object before": matches(batch.pictures, sources),
        "object by object after": matches(after, sources),
    }
    return Outcome(shown, batch.pictures, after, figures)


def captions(count: int, things: int, seed: int, open: bool = False) -> list[Scene]:
    """Held-out scenes of so many objects, the held-out crossings in turn."""
    return [replace(held_out_scene(i, things, philox(seed, 24, things, i)), open=open) for i in range(count)]


# by name: objects in a caption, whether it leaves colours open, and what is done
TASKS: dict[str, tuple[int, bool, Callable[[VariationPipeline, Batch, Steering], Outcome]]] = {
    "move": (2, False, moved),
    "half": (1, False, lambda pipe, batch, how: resized(pipe, batch, how, 0.5)),
    "double": (1, False, lambda pipe, batch, how: resized(pipe, batch, how, 2.0)),
    "layout": (2, False, laid_out),
    "appearance": (2, True, coloured),
}
