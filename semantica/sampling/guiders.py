"""Guiders that make arrays and touch no network: what each puts in the place of the null condition; numpy only.

One more is a class with `begin`, which asks for what it needs; `semantica.pipelines.guiding` gives it a name.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from semantica.condition import Array, Condition, Stream, repeat_each
from semantica.errors import UserError
from semantica.inputs import SINGLE, Prepared, is_text, part_of, samples_in
from semantica.sampling.loop import like
from semantica.sampling.settings import Sampling
from semantica.solvers import noise
from semantica.weak import Weak

# the weak branch of some rows of a call's result, by their condition; None is the null condition's
Branch = Callable[[range, Condition], Weak | None]
# Gaussian conditions that are drawn for each sample
DRAWN = 8
# samples that are encoded in one call
AT_ONCE = 64
# keys of draws: no draw of a pipeline's noise has as many numbers behind its seed
CHOICE, TURBULENCE, TOKENS, POOLED = (0, 0), (0, 1), (0, 2), (0, 3)


@dataclass(frozen=True)
class Call:
    """What a guider may read of a pipeline's call.

    pipeline: a `semantica.pipelines.base.VariationPipeline`. inputs: as the user gave them; samples: these prepared.
    n: variations of each sample. settings: of the run; its seed is that of the guider's draws.
    levels: log-SNR of each step, float32 `[steps]`.
    """

    pipeline: Any
    inputs: Any
    samples: Mapping[str, Prepared]
    n: int
    settings: Sampling
    levels: np.ndarray


class Guider(Protocol):
    """What v is led away from, on any engine: it makes arrays, and never touches a network."""

    def begin(self, call: Call) -> Branch:
        """Made once a call. Raises `UserError` where that cannot be guided so."""


@dataclass(frozen=True)
class IndependentCondition:
    """Independent condition guidance, ICG (arXiv 2407.02687, section 4): v(yhat) + w (v(y) - v(yhat)).

    yhat is drawn anew for every sample and step, a function of (seed, sample, variation, step) alone, so independent of
    z; the null condition is never asked for. It stands for the mean over all conditions, each as likely as it is: where
    z shows its own condition already, that is no longer what the unconditional branch would predict, and guidance
    belongs in the first part of the run (`interval`) if conditions differ much.

    Args:
        others: what yhat is drawn from, as the pipeline takes its inputs (pictures, `{"text": prompts}`, ...); None for
            the other samples of the call.
        noise: yhat is encoder tokens mean(c) + std(c) n instead, of each sample c and n ~ N(0, I) (appendix G).

    Raises:
        UserError: both.
    """

    others: Any = None
    noise: bool = False

    def __post_init__(self):
        if self.noise and self.others is not None:
            raise UserError("independent condition guidance: other conditions and noise, give one of them")

    def begin(self, call: Call) -> Branch:
        pipeline, n, settings, count = call.pipeline, call.n, call.settings, samples_in(call.samples)
        if self.noise:
            pool = gaussian(call)
        elif self.others is not None:
            pool = encoded(pipeline, pipeline.prepare(self.others))
        elif count > 1:
            pool = encoded(pipeline, call.samples)
        else:
            raise UserError(
                "independent condition guidance of one sample needs others: more samples in the call, pictures or "
                "prompts to draw from, or noise"
            )

        def drawn(row: int) -> np.ndarray:
            i, j = divmod(row, n)
            if self.noise:
                return i * DRAWN + choices(settings.seed, i, j, settings.steps, DRAWN)
            return choices(settings.seed, i, j, settings.steps, len(pool.emb), i if self.others is None else None)

        def branch(rows: range, condition: Condition) -> Weak:
            if pool.sizes != condition.sizes:
                raise UserError(
                    f"independent condition guidance: others have {list(pool.sizes)} tokens, the samples "
                    f"{list(condition.sizes)}: give as many values to each"
                )
            return Weak(pool, rows=like(np.stack([drawn(row) for row in rows], 1), condition.emb))

        return branch


@dataclass(frozen=True)
class TimeStep:
    """Time-step guidance, TSG (arXiv 2407.02687, section 5): v(temb') + w (v(temb) - v(temb')), both of condition y.

    temb' = temb + s t^alpha std(temb) n with n ~ N(0, I) anew for every sample and step (appendix G); t is the share of
    the run that is left, which is the paper's timestep over its largest one. The condition's embedding is added to
    temb, so the noise goes there: engines take it as they are.

    Args:
        scale, power: s and alpha; by default the paper's of the conditional DiT-XL/2. power 0 is its constant schedule.
        blocks: only the first so many blocks of each part of a U-ViT (way down, transformer, way up) see temb'; None
            for all. The paper perturbs 10 of DiT-XL/2's 28.

    Raises:
        UserError: impossible numbers.
    """

    scale: float = 2.0
    power: float = 1.0
    blocks: int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.scale) and self.scale > 0 and math.isfinite(self.power) and self.power >= 0):
            raise UserError(
                f"time-step guidance: scale {self.scale} must be above 0, power {self.power} at least 0, both numbers"
            )
        if self.blocks is not None and self.blocks < 1:
            raise UserError(f"time-step guidance: {self.blocks} perturbed blocks, give at least 1 or leave it out")

    def strength(self, step: int, steps: int) -> float:
        """s t^alpha."""
        return self.scale * (1 - step / steps) ** self.power

    def begin(self, call: Call) -> Branch:
        denoiser, settings, n = call.pipeline.denoiser, call.settings, call.n
        if not hasattr(denoiser, "embedding"):
            raise UserError("time-step guidance: this model does not say how it embeds noise levels")
        if self.blocks is not None and not hasattr(denoiser, "first_blocks"):
            raise UserError("time-step guidance of some blocks is for U-ViTs in torch: leave the blocks out")
        seen = None if self.blocks is None else denoiser.first_blocks(self.blocks)
        strengths = np.array([self.strength(i, settings.steps) for i in range(settings.steps)], np.float32)

        def branch(rows: range, condition: Condition) -> Weak:
            temb = denoiser.embedding(like(call.levels, condition.emb))
            # as a population of E numbers: numpy and torch alike
            mean = temb.mean(-1)[:, None]
            deviation = ((temb - mean) ** 2).mean(-1) ** 0.5
            n_rows = [turbulence(settings.seed, *divmod(row, n), settings.steps, temb.shape[-1]) for row in rows]
            shift = like(np.stack(n_rows, 1) * strengths[:, None, None], condition.emb) * deviation[:, None, None]
            return Weak(condition, shift=as_type(shift, condition.emb), blocks=seen)

        return branch


@dataclass(frozen=True)
class WeakModel:
    """Autoguidance (Karras et al., arXiv 2406.02507): D0 + w (D1 - D0), D0 a bad version of D1.

    Args:
        pipeline: of the bad version, on the same device: a smaller or less trained model for the same inputs.
    """

    pipeline: Any

    def begin(self, call: Call) -> Branch:
        own, weak, n = call.pipeline, self.pipeline, call.n
        if weak.sample_shape != own.sample_shape:
            raise UserError(f"autoguidance: the weak model makes {weak.sample_shape}, this one {own.sample_shape}")
        if weak.denoiser.array != own.denoiser.array:
            raise UserError("autoguidance: a run folder and a bundle, or engines of two kinds: load both alike")
        samples = weak.prepare(call.inputs)

        def branch(rows: range, condition: Condition) -> Weak:
            first = rows.start // n
            made = weak.condition(part_of(samples, first, (rows.stop - 1) // n + 1))
            chosen = [row // n - first for row in rows]
            return Weak(made.map(lambda array: array[chosen]), denoiser=weak.denoiser)

        return branch


@dataclass(frozen=True)
class StreamsApart:
    """Pictures and texts guided apart (InstructPix2Pix, arXiv 2211.09800, eq. 3), in three evaluations a step:
    v(0, 0) + s_I (v(I, 0) - v(0, 0)) + s_T (v(I, T) - v(I, 0)), s_T the scale of guidance.

    Args:
        image: s_I.

    Raises:
        UserError: no number.
    """

    image: float = 1.5

    def __post_init__(self):
        if not math.isfinite(self.image):
            raise UserError(f"guidance of streams apart: scale {self.image} of pictures must be a number")

    def begin(self, call: Call) -> Branch:
        pipeline, n, samples = call.pipeline, call.n, call.samples
        there = [name for name, value in samples.items() if value is not None]
        if SINGLE not in there or not any(map(is_text, there)):
            raise UserError(
                f"guidance of streams apart leads pictures and texts, here is {' and '.join(there)}: give both"
            )
        if not hasattr(pipeline, "conditioned"):
            raise UserError("a bundle takes pictures and texts together: sample the run folder that it was made of")

        def branch(rows: range, condition: Condition) -> Weak:
            first = rows.start // n
            part = part_of(samples, first, (rows.stop - 1) // n + 1)
            made = pipeline.condition({name: None if is_text(name) else value for name, value in part.items()})
            chosen = [row // n - first for row in rows]
            pictures = made.map(lambda array: array[chosen])
            return Weak(pictures, under=pipeline.denoiser.null(len(rows)), scale=self.image)

        return branch


def encoded(pipeline: Any, samples: Mapping[str, Prepared]) -> Condition:
    """The condition of all samples, in parts that an engine takes."""
    count, most = samples_in(samples), pipeline.denoiser.max_batch or AT_ONCE
    parts = [pipeline.condition(part_of(samples, i, min(i + most, count))) for i in range(0, count, most)]
    return functools.reduce(Condition.join, parts)


def choices(seed: int, i: int, j: int, steps: int, count: int, own: int | None = None) -> np.ndarray:
    """For each step one of `count` things, but not the own one: integers `[steps]`, by (seed, i, j) alone."""
    key = np.random.SeedSequence(seed, spawn_key=(i, j, *CHOICE)).generate_state(2, np.uint64)
    found = np.random.Generator(np.random.Philox(key=key)).integers(count - (own is not None), size=steps)
    return found + (found >= own) if own is not None else found


def turbulence(seed: int, i: int, j: int, steps: int, width: int) -> np.ndarray:
    """Standard normal float32 `[steps, width]`, by (seed, i, j) alone."""
    return noise(seed, (steps, width), i, j, *TURBULENCE)


def gaussian(call: Call) -> Condition:
    """`DRAWN` conditions for each sample, of tokens that have its tokens' mean and standard deviation."""
    pipeline, seed = call.pipeline, call.settings.seed
    if not hasattr(pipeline, "conditioned"):
        raise UserError("a bundle's encoder gives no tokens: draw the other conditions from pictures or prompts")

    def matched(array: Array, *key: int) -> Array:
        mean, deviation = (
            value.reshape(-1, *[1] * array.ndim) for value in (array.flatten(1).mean(1), array.flatten(1).std(1))
        )
        n = np.stack([noise(seed, (DRAWN, *array.shape[1:]), i, *key) for i in range(len(array))])
        return as_type(mean + deviation * like(n, array), array).reshape(-1, *array.shape[1:])

    made = {}
    for number, (name, stream) in enumerate(pipeline.encodings(call.samples).items()):
        if stream is None:
            made[name] = None
            continue
        pooled = None if stream.pooled is None else matched(stream.pooled, number, *POOLED)
        lengths = None if stream.lengths is None else repeat_each(stream.lengths, DRAWN)
        made[name] = Stream(matched(stream.tokens, number, *TOKENS), pooled, lengths)
    return pipeline.conditioned(made)


def as_type(array: Array, other: Array) -> Array:
    """In the type of another array."""
    return array.astype(other.dtype) if isinstance(array, np.ndarray) else array.to(other.dtype)
