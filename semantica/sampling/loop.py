"""The sampling loop, over any denoiser, on numpy arrays or torch tensors; numpy only.

Everything that does not depend on z is made before the first step: coefficients, noise levels, the batch that joins
both branches of guidance, and conditions in the layout that an engine reads. Nothing in the loop reads a value back
from a device.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from semantica.condition import Condition, concatenate, repeat_each
from semantica.errors import UserError
from semantica.ranges import span
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule, guide, guide_apart, predict_x, step
from semantica.weak import Weak

Array = Any  # numpy.ndarray or torch.Tensor
# v by number of step and z, guidance included
Predict = Callable[[int, Array], Array]
# (z, log-SNR) -> v, of one condition
Velocity = Callable[[Array, Array], Array]


class Denoiser(Protocol):
    """What predicts v: the network, its compiled form, an engine, or whatever else has this shape.

    array: "torch" or "numpy", the kind of arrays that it takes and gives. device, dtype: where it computes, in what.
    max_batch: the largest batch of one call, both branches of guidance counted; None for any.
    joins: whether both branches of guidance go through one call of twice the batch.
    refuses: what hooks may need and this denoiser does not have, each with the line that tells its user so. "steps":
        to be called between steps; "module": a `torch.nn.Module` that hooks may change; "gradients": through z.

    The loop uses more methods where a denoiser has them: `bind(condition) -> (z, logsnr) -> v` brings a condition
    once into the layout that every call reads; `predictor`, which replaces guidance by calls, and `execute`, which
    replaces running the steps one by one, are described at `CompiledDenoiser`. Time-step guidance uses
    `embedding(logsnr [N]) -> [N, E]`, that of noise levels, to which a condition's is added, and, for a part of the
    network, `first_blocks(count)`, see `UViT`. And an attribute: `joined`, a denoiser that gives the same for a batch
    of both branches, whose halves have the same z and levels.
    """

    array: str
    device: Any
    dtype: Any
    max_batch: int | None
    joins: bool
    refuses: Mapping[str, str]

    def __call__(self, z: Array, logsnr: Array, condition: Condition) -> Array:
        """v `[B, 3, S, S]` from z `[B, 3, S, S]` and log-SNR `[B]`."""

    def condition(self, inputs: Any) -> Condition:
        """The condition of a network's streams, or of an engine's pictures."""

    def null(self, batch: int) -> Condition:
        """The unconditional branch."""


class Guidance(Protocol):
    """A way to predict v from a denoiser, such as `semantica.sampling.guidance.Guided`.

    needs: of the denoiser, see `Denoiser.refuses`. An attribute that there may be besides, `beside`: one of
    `semantica.sampling.guiders`, which a pipeline asks for `weak`.
    """

    needs: tuple[str, ...]

    def predictor(
        self, denoiser: Denoiser, levels: Array, condition: Condition, weak: Weak, settings: Sampling
    ) -> Predict:
        """What the loop calls in each step.

        levels: the log-SNR of every step and sample, float32 `[steps, B]`. weak: what guidance as `settings` has it
        would lead away from.
        """


def refuse(denoiser: Denoiser, *needs: str) -> None:
    """Raise `UserError` where a denoiser has not what a hook needs."""
    for need in needs:
        if need in getattr(denoiser, "refuses", {}):
            raise UserError(denoiser.refuses[need])


def sample(
    denoiser: Denoiser,
    z: Array,
    condition: Condition,
    null: Condition | None,
    schedule: Schedule,
    settings: Sampling,
    noise: Callable[[int], Array] | None = None,
    guidance: Guidance | None = None,
    on_step: Callable[[int, Array], Array] | None = None,
    weak: Weak | None = None,
) -> Array:
    """Run a solver from noise to images.

    Args:
        denoiser: a `Denoiser`, or any function `(z, logsnr, condition) -> v`.
        z: float32 `[B, 3, S, S]` standard normal noise; the loop keeps its dtype.
        condition, null: of batch B each; `null` is read only where guidance is, and asked of the denoiser if None.
        noise: step number -> standard normal like z, for solvers that add noise.
        guidance: predicts v in place of guidance as `settings` has it.
        on_step: `(i, z) -> z`, called after each step.
        weak: what guidance as `settings` has it leads away from, by default the null condition.

    Returns:
        `[B, 3, S, S]`, images around [-1, 1].

    Raises:
        UserError: a solver that adds noise without a source of it; a hook that the denoiser does not allow.
    """
    plan, guided = settings.plan(schedule), any(settings.guided())
    if plan.noise_scale.any() and noise is None:
        raise UserError("this solver adds noise in its steps: give a source of it, or take ddim or dpmpp_2m")
    refuse(denoiser, *(guidance.needs if guidance else ()), *(("steps",) if on_step else ()))
    if guidance is None and not guided:
        weak = None
    elif weak is None:
        weak = Weak(denoiser.null(len(z)) if null is None else null)

    def run(z: Array, levels: Array, condition: Condition, weak: Weak | None) -> Array:
        if guidance is not None:
            predict = guidance.predictor(denoiser, levels, condition, weak, settings)
        else:
            predict = predictor(denoiser, levels, condition, weak, settings)
        x_previous = None
        for i in range(len(plan)):
            with span("denoise"):
                v = predict(i, z)
            with span("solve"):
                x = settings.threshold(predict_x(plan, i, z, v))
                z = step(plan, i, z, x, x_previous, noise(i) if plan.noise_scale[i] else None)
            x_previous = x
            if on_step is not None:
                z = on_step(i, z)
        return z

    levels = like(plan.logsnr.astype(np.float32)[:, None], z)
    if getattr(denoiser, "joins", True) or isinstance(levels, np.ndarray):
        levels = repeat_each(levels, len(z), 1)
    else:
        # one number for all samples: kernels that round by how many there are have only one
        levels = levels.expand(-1, len(z))
    if hasattr(denoiser, "execute"):
        own = plan.noise_scale.any() or guidance or on_step or (weak is not None and weak.apart)
        key = None if own else (schedule, dataclasses.replace(settings, seed=0))
        return denoiser.execute(run, z, levels, condition, weak, key)
    return run(z, levels, condition, weak)


def predictor(
    denoiser: Denoiser, levels: Array, condition: Condition, weak: Weak | None, settings: Sampling
) -> Predict:
    """v by number of step: the denoiser's own way, else calls of it; another network predicts what is its own."""
    if weak is not None and weak.apart:
        return by_branches(denoiser, levels, condition, weak, settings)
    if hasattr(denoiser, "predictor"):
        return denoiser.predictor(levels, condition, weak, settings)
    return by_calls(denoiser, levels, condition, weak, settings)


def by_branches(denoiser: Denoiser, levels: Array, condition: Condition, weak: Weak, settings: Sampling) -> Predict:
    """Each branch by itself, in the own way of what predicts it."""
    guided, other = settings.guided(), weak.denoiser or denoiser
    given = [(denoiser, condition), (other, weak.condition), *([(other, weak.under)] if weak.under else [])]
    branches = [unguided(net, levels, which, settings) for net, which in given]

    def predict(i: int, z: Array) -> Array:
        if not guided[i]:
            return branches[0](i, z)
        made = [branch(i, z) for branch in branches]
        if weak.under is None:
            return guide(*made, settings.guidance)
        return guide_apart(*made, settings.guidance, weak.scale)

    return predict


def unguided(denoiser: Denoiser, levels: Array, condition: Condition, settings: Sampling) -> Predict:
    """v of one condition by number of step, in the denoiser's own way."""
    return predictor(denoiser, levels, condition, None, dataclasses.replace(settings, guidance=1.0))


def by_calls(denoiser: Denoiser, levels: Array, condition: Condition, weak: Weak | None, settings: Sampling) -> Predict:
    """weak + w (own - weak), in one call a step where the denoiser joins the branches (arXiv 2207.12598)."""
    guided, batch = settings.guided(), levels.shape[1]
    own = bind(denoiser, condition)
    if not any(guided):
        return lambda i, z: own(z, levels[i])
    if getattr(denoiser, "joins", True):
        # a denoiser may compute once what does not depend on the condition
        joined = denoiser if weak.shift is not None else getattr(denoiser, "joined", denoiser)
        both, rows = weak.each(lambda other: bind(joined, condition.join(other))), repeat_each(levels, 2, 1)

        def branches(i: int, z: Array) -> tuple[Array, Array]:
            v = both(i)(concatenate((z, z)), rows[i])
            return v[:batch], v[batch:]
    else:
        other = weak.each(lambda condition: bind(denoiser, condition))

        def branches(i: int, z: Array) -> tuple[Array, Array]:
            return own(z, levels[i]), other(i)(z, levels[i])

    return lambda i, z: guide(*branches(i, z), settings.guidance) if guided[i] else own(z, levels[i])


def bind(denoiser: Denoiser, condition: Condition) -> Velocity:
    """The denoiser for one condition, in whatever layout it reads."""
    if hasattr(denoiser, "bind"):
        return denoiser.bind(condition)
    return lambda z, logsnr: denoiser(z, logsnr, condition)


def like(array: np.ndarray, z: Array) -> Array:
    """An array as the kind that z is, on its device."""
    if isinstance(z, np.ndarray):
        return array
    import torch

    from semantica.device import sent

    return sent(torch.from_numpy(array), z.device)
