"""Edits of a picture by the scores of a denoiser: SDS, DDS and CDS, over any denoiser that torch runs.

x is the picture (or its latents), z the edited one, which begins as x. Each iteration noises both to one level with the
same noise, z_t = alpha z + sigma eps, x_t = alpha x + sigma eps, and moves z against

    SDS  eps_w(z_t, target) - eps                                      (Poole et al., arXiv 2209.14988, eq. 3)
    DDS  eps_w(z_t, target) - eps_w(x_t, source)                       (Hertz et al., arXiv 2304.07090, eq. 4)
    CDS  the same, and w_cut times the gradient of PatchNCE            (Nam et al., arXiv 2311.18608, eq. 9)
         between decoder features of z_t under the target and x_t under the source

with eps_w = eps_null + w (eps - eps_null) for guidance w. Denoisers give v, and eps = sigma z_t + alpha v.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semantica.condition import Condition
from semantica.device import sent
from semantica.diffusion import per_sample
from semantica.discrete import DiscreteSchedule
from semantica.editing.contrast import contrast
from semantica.editing.taps import decoder_attention
from semantica.errors import UserError
from semantica.recorded import recorded
from semantica.sampling.loop import Denoiser, refuse
from semantica.solvers import Schedule, eps_from_v, guide

METHODS = ("cds", "dds", "sds")
# the authors' loss of the scores is 2000 sum(z g) / (H W) at latents of 64 x 64
SCORE_SCALE, SIDE = 2000.0, 64
# small gradients of fp16 would be zero
FP16_SCALE = 2.0**10


@dataclass(frozen=True)
class Editing:
    """Settings of an edit; the defaults are those of the authors' code of CDS.

    iterations, rate: of gradient descent without momentum. The rate is that at 64 x 64 places; at other sizes it goes
        with their number, so that each place moves as far.
    guidance: w.
    w_dds: weight of the scores' difference (for SDS of the one score). w_cut: of PatchNCE, for CDS.
    temperature, patches, sizes: see `semantica.editing.contrast.contrast`.
    interval: noise levels are drawn uniformly between these fractions of the training's times (of timesteps).
    seed: of levels, noise and patches; those of picture i at an iteration depend on (seed, i, iteration) alone.

    Raises:
        UserError: an unknown method, or an impossible number.
    """

    method: str = "cds"
    iterations: int = 200
    rate: float = 0.1
    guidance: float = 7.5
    w_dds: float = 1.0
    w_cut: float = 3.0
    temperature: float = 0.07
    patches: int = 256
    sizes: tuple[int, ...] = (1, 2)
    interval: tuple[float, float] = (0.05, 0.95)
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown: choose one of {', '.join(METHODS)}")
        if self.iterations < 1:
            raise UserError(f"{self.iterations} iterations: give at least 1")
        for name in ("rate", "guidance", "w_dds", "w_cut"):
            if not 0 <= getattr(self, name) < np.inf:
                raise UserError(f"{name} is {getattr(self, name)}: give a number of at least 0")
        if not 0 < self.temperature < np.inf:
            raise UserError(f"temperature {self.temperature} must be above 0")
        if self.patches < 2 or not self.sizes or min(self.sizes) < 1:
            raise UserError(f"{self.patches} patches of sizes {self.sizes}: give at least 2, and sizes of at least 1")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise UserError(f"interval {self.interval}: give two fractions, 0 <= low < high <= 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} must be 0 or more")


def edit(
    denoiser: Denoiser,
    x: Tensor,
    source: Condition | None,
    target: Condition,
    null: Condition | None,
    schedule: Schedule | DiscreteSchedule,
    settings: Editing,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Edit pictures from one condition to another.

    Scores need no gradients: their evaluations are one batch of what stores nothing. For CDS the target's conditional
    evaluation is made by itself, with a graph, and gives both its score and its features.

    Args:
        denoiser: its parameters are to be frozen; with gradient checkpointing on, it is used.
        x: fp32 `[B, C, S, S]`, what the denoiser samples: pictures in [-1, 1], or latents of unit size.
        source: condition of x, of batch B; SDS reads none.
        target: of what it shall become, of the same batch and stream sizes.
        null: the unconditional branch, of batch B; asked of the denoiser if None and guidance is not 1.
        schedule: of the denoiser's training.
        on_step: `(i, z)`, called after each iteration.

    Returns:
        z, fp32 `[B, C, S, S]`.

    Raises:
        UserError: the denoiser gives no gradients or lets nothing be read inside (CDS), no source (DDS, CDS), or z is
            finite no more.
    """
    if settings.method != "sds" and source is None:
        raise UserError(f"{settings.method} compares with the source: give its condition, or take sds")
    taps = {}
    if settings.method == "cds":
        refuse(denoiser, "gradients", "module")
        taps = decoder_attention(denoiser)
    if settings.guidance != 1 and null is None:
        null = denoiser.null(len(x))
    x = x.detach()
    z, places = x.clone(), x[0, 0].numel()
    rate = settings.rate * places / SIDE**2
    with torch.no_grad():
        evaluate = Scores(denoiser, source, target, null, settings, taps)
        for i in range(settings.iterations):
            levels, noise = drawn(schedule, settings, x.shape, i)
            levels, noise = (sent(torch.from_numpy(a), x.device).to(x.dtype) for a in (levels, noise))
            score, pull = evaluate(x, z, levels, noise, generator(settings.seed, i))
            step = settings.w_dds * SCORE_SCALE / places * score
            z = z - rate * (step if pull is None else step + settings.w_cut * pull)
            if not bool(z.isfinite().all()):
                raise UserError(
                    f"the picture is finite no more after iteration {i + 1}: lower its rate or weights, or use fp32"
                )
            if on_step is not None:
                on_step(i, z)
    return z


class Scores:
    """One iteration's directions, for fixed conditions; arguments as of `edit`, taps: modules by name, for CDS."""

    def __init__(self, denoiser, source, target, null, settings: Editing, taps):
        self.denoiser, self.target, self.settings, self.taps = denoiser, target, settings, taps
        # the target's conditional evaluation of CDS is not among those without gradients
        rows = {"sds": [target], "dds": [source, target], "cds": [source]}[settings.method]
        self.count = 1 if settings.method == "sds" else 2
        if settings.guidance != 1:
            # as long as the conditions it goes beside
            null = target.join(null).map(lambda array: array[len(target.emb) :])
            rows = rows + [null] * self.count
        self.condition = functools.reduce(Condition.join, rows)

    def __call__(
        self, x: Tensor, z: Tensor, levels: Tensor, noise: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Difference of the scores, and for CDS the gradient of PatchNCE by z; both like z."""
        alpha, sigma = per_sample(levels, z)
        noised = [alpha * picture + sigma * noise for picture in ((x, z)[-self.count :])]
        plain = noised[:1] if self.taps else noised
        rows = plain + (noised if self.settings.guidance != 1 else [])
        with recorded(self.taps) as found:
            v = self.denoiser(torch.cat(rows), levels.repeat(len(rows)), self.condition)
        made, pull = list(v.split(len(z))), None
        if self.taps:
            keys = {name: features[: len(z)].clone() for name, features in found.items()}
            found.clear()
            v_target, pull = self.pull(z, alpha, sigma * noise, levels, keys, rng)
            made.insert(1, v_target)
        eps = [eps_from_v(z_t, v, alpha, sigma) for z_t, v in zip(noised * 2, made)]
        if self.settings.guidance != 1:
            eps = [guide(*pair, self.settings.guidance) for pair in zip(eps[: self.count], eps[self.count :])]
        return eps[-1] - (noise if self.count == 1 else eps[0]), pull

    def pull(
        self, z: Tensor, alpha: Tensor, added: Tensor, levels: Tensor, keys: dict[str, Tensor], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """v under the target, and the gradient by z of PatchNCE to the source's features."""
        scale = FP16_SCALE if self.denoiser.dtype == torch.float16 else 1.0
        settings, leaf = self.settings, z.detach().requires_grad_()
        with torch.enable_grad():
            with recorded(self.taps) as found:
                v = self.denoiser(alpha * leaf + added, levels, self.target).detach()
            # each picture's own loss: a sum, so that none weighs less beside others
            loss = contrast(found, keys, rng, settings.patches, settings.sizes, settings.temperature).sum()
            (grad,) = torch.autograd.grad(scale * loss, leaf)
        return v, grad / scale


def generator(seed: int, *index: int) -> np.random.Generator:
    """Draws that are a function of these numbers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=index)))


def drawn(
    schedule: Schedule | DiscreteSchedule, settings: Editing, shape: tuple[int, ...], iteration: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-SNRs `[B]` and noise of a shape `[B, ...]`, both fp32, of an iteration."""
    levels, noise = np.empty(shape[0], np.float32), np.empty(shape, np.float32)
    low, high = settings.interval
    for row in range(shape[0]):
        rng = generator(settings.seed, iteration, row)
        time = rng.uniform(low, high)
        if isinstance(schedule, DiscreteSchedule):
            levels[row] = schedule.levels[min(int(time * schedule.count), schedule.count - 1)]
        else:
            levels[row] = schedule.logsnr(time)
        noise[row] = rng.standard_normal(shape[1:], np.float32)
    return levels, noise
