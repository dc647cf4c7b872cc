"""The sampling loop for speed, over any denoiser `(z, logsnr, condition) -> v`, on numpy arrays or torch tensors.

Everything that does not depend on z is made before the first step: coefficients, noise levels, and the batch that joins
both branches of guidance. Nothing in the loop reads a value back from a device. `sampling.guided` runs the same
arithmetic through diffusers' scheduler and guiders, for callbacks and for guiders that change the model.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from semantica.condition import Condition, concatenate
from semantica.errors import UserError
from semantica.solvers import Plan, guide, predict_x, step, threshold

Array = Any  # numpy.ndarray or torch.Tensor


def guided_steps(count: int, guidance: float, interval: tuple[float, float]) -> list[bool]:
    """Which of `count` steps run both branches: step i where start <= i / count < stop, as diffusers' guiders count.

    interval: (start, stop), fractions of the run (Kynkaanniemi et al., arXiv 2404.07724, bound sigma instead).
    Raises `UserError` for fractions that are not 0 <= start <= stop <= 1.
    """
    start, stop = interval
    if not 0 <= start <= stop <= 1:
        raise UserError(f"guidance interval {interval}: give two fractions of the run, 0 <= start <= stop <= 1")
    return [guidance != 1 and int(start * count) <= i < int(stop * count) for i in range(count)]


def level_arrays(plan: Plan, z: Array, rows: int) -> Array:
    """The log-SNR of every step as float32 `[steps, rows]`, on the device of z; its rows are views."""
    levels = np.repeat(plan.logsnr.astype(np.float32)[:, None], rows, 1)
    if isinstance(z, np.ndarray):
        return levels
    import torch

    return torch.from_numpy(levels).to(z.device)


def sample(
    denoiser: Callable[[Array, Array, Any], Array],
    z: Array,
    condition: Condition,
    null: Condition,
    plan: Plan,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    thresholding: str = "clip",
    clip_range: float = 1.0,
    ratio: float = 0.995,
    noise: Callable[[int], Array] | None = None,
) -> Array:
    """Run a plan from noise to images.

    Args:
        denoiser: predicts v from z `[B, 3, S, S]`, log-SNR `[B]` and a condition of batch B; with guidance it is called
            once a step with both branches, batch 2 B, the conditional half first.
        z: float32 `[B, 3, S, S]` standard normal noise; the loop keeps its dtype.
        condition, null: of batch B each; anything with `join(null)` serves. `null` is read only where guidance is.
        plan: from `semantica.solvers.make_plan`.
        guidance: uncond + guidance (cond - uncond) (arXiv 2207.12598); 1 = one branch.
        interval: see `guided_steps`; outside it the conditional branch runs alone.
        thresholding, clip_range, ratio: see `semantica.solvers.threshold`.
        noise: step number -> standard normal like z, for solvers that add noise.

    Returns:
        `[B, 3, S, S]`, images around [-1, 1].

    Raises:
        UserError: an impossible interval or thresholding; a solver that adds noise without a source of it.
    """
    batch = z.shape[0]
    guided = guided_steps(len(plan), guidance, interval)
    both = condition.join(null) if any(guided) else None
    levels = level_arrays(plan, z, 2 * batch)

    def predict(i: int, z: Array) -> Array:
        if not guided[i]:
            return denoiser(z, levels[i, :batch], condition)
        v = denoiser(concatenate((z, z)), levels[i], both)
        return guide(v[:batch], v[batch:], guidance)

    return integrate(predict, z, plan, thresholding, clip_range, ratio, noise)


def integrate(
    predict: Callable[[int, Array], Array],
    z: Array,
    plan: Plan,
    thresholding: str = "clip",
    clip_range: float = 1.0,
    ratio: float = 0.995,
    noise: Callable[[int], Array] | None = None,
) -> Array:
    """The steps of a plan, given what predicts v, guidance included, from the number of a step and z.

    Other arguments, result and errors as `sample`.
    """
    if plan.noise_scale.any() and noise is None:
        raise UserError("this solver adds noise in its steps: give a source of it, or take ddim or dpmpp_2m")
    x_previous = None
    for i in range(len(plan)):
        x = threshold(predict_x(plan, i, z, predict(i, z)), thresholding, clip_range, ratio)
        z = step(plan, i, z, x, x_previous, noise(i) if plan.noise_scale[i] else None)
        x_previous = x
    return z
