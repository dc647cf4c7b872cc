"""Noise schedule, v-parametrisation, thresholding and samplers: plain arithmetic on numpy arrays or torch tensors.

Notation: z = alpha x + sigma eps with alpha^2 + sigma^2 = 1 (variance preserving), lambda = log(alpha^2 / sigma^2) is
the natural log of the signal-to-noise ratio ("logsnr"), t runs from 0 (clean) to 1 (noise), v = alpha eps - sigma x.
This module imports numpy only, so that an exported model can be sampled where torch is not installed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from semantica.errors import UserError

Array = TypeVar("Array")  # numpy.ndarray or torch.Tensor

THRESHOLDS = ("none", "clip", "dynamic")


@dataclass(frozen=True)
class Schedule:
    """Cosine schedule, shifted by resolution and bounded (simple diffusion, arXiv 2301.11093).

    lambda(t) = shift - 2 log tan(a + t (b - a)), shift = 2 log(reference / image_size): mean-pooling an image by a
    factor k multiplies its SNR by k^2, so the shift gives every image size, once pooled, the SNR of `reference` at the
    same t. Two codings are in use. Adding the shift to the bounded curve moves the end points too, so that the noisiest
    and the cleanest level depend on the image size. Here, as in k-diffusion, the shift is taken off the limits first
    (inside a and b) and then added: lambda(0) = logsnr_max and lambda(1) = logsnr_min at every image size, and in
    between the shift is exact up to terms of order exp(-|limit| / 2).

    image_size, reference: pixels along one side. logsnr_min, logsnr_max: natural-log SNR at t = 1 and t = 0.
    Raises `UserError` for sizes below 1 or limits that are not ordered.
    """

    image_size: int
    reference: int = 64
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self):
        if self.image_size < 1 or self.reference < 1:
            raise UserError(f"noise schedule: image size {self.image_size}, reference {self.reference}: use 1 or more")
        if not self.logsnr_min < self.logsnr_max:
            raise UserError(f"noise schedule: logsnr_min {self.logsnr_min} must be below logsnr_max {self.logsnr_max}")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Schedule":
        """The schedule in a `SemanticaScheduler`'s configuration."""
        names = ("image_size", "reference", "logsnr_min", "logsnr_max")
        return cls(**{name: config[name] for name in names if name in config})

    def logsnr(self, t: float | np.ndarray) -> np.ndarray:
        """Log-SNR at times t in [0, 1], any shape; float64."""
        shift = 2 * math.log(self.reference / self.image_size)
        start = math.atan(math.exp((shift - self.logsnr_max) / 2))
        end = math.atan(math.exp((shift - self.logsnr_min) / 2))
        return shift - 2 * np.log(np.tan(start + np.asarray(t, np.float64) * (end - start)))

    def grid(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Times and log-SNRs of a sampling run of n steps: two float64 arrays [n + 1], t uniform from 1 down to 0.

        The last log-SNR is +inf instead of logsnr_max: the last step, from t = 1/n, returns the predicted clean image
        itself, not that image with the noise of the cleanest training level still in it. Raises `UserError` for n < 1.
        """
        if steps < 1:
            raise UserError(f"number of sampling steps {steps} must be at least 1")
        t = np.linspace(1.0, 0.0, steps + 1)
        return t, np.append(self.logsnr(t[:-1]), np.inf)


def alpha_sigma(logsnr: Array) -> tuple[Array, Array]:
    """Signal and noise scales: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr); +inf gives exactly (1, 0)."""
    return (1 + math.e**-logsnr) ** -0.5, (1 + math.e**logsnr) ** -0.5


def v_from_x_eps(x: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """Velocity v = alpha eps - sigma x (Salimans & Ho, arXiv 2202.00512, section 4)."""
    return alpha * eps - sigma * x


def v_from_x(z: Array, x: Array, alpha: Array, sigma: Array) -> Array:
    """Velocity of a denoiser that predicts the clean image x from z; sigma > 0."""
    return (alpha * z - x) / sigma


def x_from_v(z: Array, v: Array, alpha: Array, sigma: Array) -> Array:
    """Predicted clean image."""
    return alpha * z - sigma * v


def eps_from_v(z: Array, v: Array, alpha: Array, sigma: Array) -> Array:
    """Predicted noise."""
    return sigma * z + alpha * v


@dataclass(frozen=True, eq=False)
class Plan:
    """Every coefficient of an n-step sampling run, known before it starts: float64 arrays [n], one entry per step.

    Step i goes from noise level logsnr[i], where z = alpha x + sigma eps, to the next one and is linear:
    z_next = z_scale z + x_scale x + x_previous_scale x_previous + noise_scale noise.
    """

    logsnr: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    z_scale: np.ndarray
    x_scale: np.ndarray
    x_previous_scale: np.ndarray
    noise_scale: np.ndarray

    def __len__(self) -> int:
        return len(self.logsnr)


@dataclass(frozen=True, eq=False)
class Steps:
    """The noise levels that each step of a run goes from, and to: float64 arrays [n]; size: by how much log-SNR."""

    alpha: np.ndarray
    sigma: np.ndarray
    alpha_next: np.ndarray
    sigma_next: np.ndarray
    size: np.ndarray


# the scales of a `Plan` by name; those that a solver leaves out are 0
Solver = Callable[[Steps], dict[str, np.ndarray]]
SOLVERS: dict[str, Solver] = {}


def register_solver(name: str, solver: Solver) -> Solver:
    """Add a solver under a name: then the scheduler, every pipeline and the command line take it."""
    SOLVERS[name] = solver
    return solver


def dpmpp_2m(steps: Steps) -> dict[str, np.ndarray]:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2.

    The first step is of first order, having no previous x, and so is the last, which keeps few-step runs stable and is
    the only choice when the last level is +inf (diffusers: `lower_order_final`). A single first-order step leaves the
    run's convergence of second order.
    """
    first = ddim(steps)
    # x is extrapolated, linearly in lambda, to the middle of the step; not in the first and the last step
    extrapolation = np.zeros_like(steps.size)
    extrapolation[1:-1] = steps.size[1:-1] / (2 * steps.size[:-2])
    return first | {
        "x_scale": (1 + extrapolation) * first["x_scale"],
        "x_previous_scale": -extrapolation * first["x_scale"],
    }


def ddim(steps: Steps) -> dict[str, np.ndarray]:
    """arXiv 2010.02502, equation 12 with no noise, eps recomputed from the thresholded x; it is DPM-Solver++(1)."""
    return {
        "z_scale": steps.sigma_next / steps.sigma,
        "x_scale": -steps.alpha_next * np.expm1(-steps.size / 2),
    }


def ddpm(steps: Steps) -> dict[str, np.ndarray]:
    """Ancestral sampling with the variance sigma_s^2 (1 - exp(lambda_t - lambda_s)) of simple diffusion."""
    # expm1 keeps the variance accurate when steps are short
    fraction = -np.expm1(-steps.size)
    return {
        "z_scale": np.exp(-steps.size) * steps.alpha_next / steps.alpha,
        "x_scale": steps.alpha_next * fraction,
        "noise_scale": steps.sigma_next * np.sqrt(fraction),
    }


for solver in (dpmpp_2m, ddim, ddpm):
    register_solver(solver.__name__, solver)


def check_solver(name: str) -> None:
    """Raises `UserError` for an unknown solver."""
    if name not in SOLVERS:
        raise UserError(f"unknown solver {name!r}: choose one of {', '.join(SOLVERS)}")


def make_plan(solver: str, logsnrs: np.ndarray) -> Plan:
    """Coefficients of a run through the n + 1 increasing noise levels `logsnrs` (float [n + 1]; the last may be +inf).

    solver: a name in `SOLVERS`. With a last level of +inf the last step of every solver returns x exactly; with a
    finite one it stops at that level. Raises `UserError` for an unknown solver and for levels that do not increase.
    """
    check_solver(solver)
    logsnrs = np.asarray(logsnrs, np.float64)
    if logsnrs.ndim != 1 or len(logsnrs) < 2 or not np.isfinite(logsnrs[0]) or not (np.diff(logsnrs) > 0).all():
        raise UserError(f"noise levels of a sampling run must increase from a finite log-SNR, got {logsnrs.tolist()}")
    alpha, sigma = alpha_sigma(logsnrs)
    scales = SOLVERS[solver](Steps(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], np.diff(logsnrs)))
    blank = np.zeros(len(logsnrs) - 1)
    names = ("z_scale", "x_scale", "x_previous_scale", "noise_scale")
    return Plan(logsnrs[:-1], alpha[:-1], sigma[:-1], *(scales.get(name, blank) for name in names))


def predict_x(plan: Plan, i: int, z: Array, v: Array) -> Array:
    """Clean image predicted by the velocity v at step i; keeps the dtype of z and v."""
    # a numpy scalar would turn float32 arrays into float64
    return x_from_v(z, v, float(plan.alpha[i]), float(plan.sigma[i]))


def step(plan: Plan, i: int, z: Array, x: Array, x_previous: Array | None = None, noise: Array | None = None) -> Array:
    """One step of a run: the next z from z, the (thresholded) clean image x, that of the step before, and fresh noise.

    x_previous is read where plan.x_previous_scale[i] is not 0, noise (standard normal) where plan.noise_scale[i] is
    not 0. Nothing is read from a device: the coefficients are python floats, and dtypes are kept.
    """
    z_next = float(plan.z_scale[i]) * z + float(plan.x_scale[i]) * x
    if plan.x_previous_scale[i]:
        z_next = z_next + float(plan.x_previous_scale[i]) * x_previous
    if plan.noise_scale[i]:
        z_next = z_next + float(plan.noise_scale[i]) * noise
    return z_next


def check_thresholding(kind: str) -> None:
    """Raises `UserError` for an unknown kind."""
    if kind not in THRESHOLDS:
        raise UserError(f"unknown thresholding {kind!r}: choose one of {', '.join(THRESHOLDS)}")


def threshold(x: Array, kind: str, clip_range: float = 1.0, ratio: float = 0.995) -> Array:
    """Predicted clean images x [B, ...] brought back into [-clip_range, clip_range].

    "none" returns x; "clip" clamps; "dynamic" clamps each image to its own s = max(clip_range, the `ratio` quantile of
    |x|) and divides by s / clip_range (Imagen, arXiv 2205.11487, section 2.3). Raises `UserError` for another kind.
    """
    check_thresholding(kind)
    if kind == "none":
        return x
    if kind == "clip":
        return x.clip(-clip_range, clip_range)
    magnitude = abs(x.reshape(x.shape[0], -1))
    ordered = np.sort(magnitude, -1) if isinstance(magnitude, np.ndarray) else magnitude.sort(-1).values
    # quantile with linear interpolation, as numpy's default
    position = ratio * (ordered.shape[1] - 1)
    low, high = ordered[:, math.floor(position)], ordered[:, math.ceil(position)]
    limit = (low + position % 1 * (high - low)).clip(clip_range).reshape(-1, *[1] * (x.ndim - 1))
    return x.clip(-limit, limit) * (clip_range / limit)


def guide(v_cond: Array, v_uncond: Array, scale: float) -> Array:
    """Classifier-free guidance (arXiv 2207.12598): scale 1 is the conditional, 0 the unconditional prediction."""
    return v_uncond + scale * (v_cond - v_uncond)


def guide_apart(v_cond: Array, v_part: Array, v_uncond: Array, scale: float, part_scale: float) -> Array:
    """A scale for each of two conditions (InstructPix2Pix, arXiv 2211.09800, eq. 3), `v_part` with the first alone:
    v_uncond + part_scale (v_part - v_uncond) + scale (v_cond - v_part)."""
    return guide(v_part, v_uncond, part_scale) + scale * (v_cond - v_part)


def noise(seed: int, shape: tuple[int, ...], *index: int) -> np.ndarray:
    """Standard normal float32 array, a pure function of (seed, index..., shape).

    `index` names further draws of the same seed, say the step of an ancestral sampler. Images come first to last: the
    first images of a larger batch are those of a smaller one. Raises `UserError` for a negative seed or index.
    """
    if min((seed, *index)) < 0:
        raise UserError(f"seed {seed} with index {index}: each must be 0 or more")
    key = np.random.SeedSequence(seed, spawn_key=index).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
