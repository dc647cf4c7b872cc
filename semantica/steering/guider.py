"""Self-guidance in the sampling loop (Epstein et al., arXiv 2306.00986, eq. 4), beside any other guidance."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from semantica.condition import Condition
from semantica.errors import UserError
from semantica.sampling.guidance import Guided
from semantica.sampling.loop import Guidance, Predict, bind, predictor, unguided
from semantica.sampling.settings import Sampling
from semantica.solvers import alpha_sigma, guide
from semantica.steering.objects import Objects
from semantica.steering.taps import Reader, Seen, Taps, network
from semantica.steering.terms import Change, Term, energy
from semantica.weak import Weak

# gradients of attention maps underflow in fp16; a power of two, so that it rounds nothing (the reference: 1000)
LOSS_SCALE = 1024.0
# of alpha: at a level without any signal no change of the noise is a change of the picture
LEAST = 1e-4
# how strong an energy's gradient is at a noise level: the paper's sigma, 1 - alpha_bar of Free-Guidance, none as in the
# SDXL notebook; and what keeps the change of v itself at sigma, where the noisiest level has hardly any signal
FACTORS = {
    "sigma": lambda alpha, sigma: sigma,
    "variance": lambda alpha, sigma: sigma**2,
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "velocity": lambda alpha, sigma: alpha * sigma,
}


@dataclass(frozen=True)
class Pattern:
    """Which steps of a run are guided: all at first, then every `stride`-th, none at the end.

    dense: share of the run at its beginning where every step is guided; tail: at its end, where none is. By default
    the paper's: 3T/16, then every second step, none in the last T/32.
    numbers: the steps themselves instead, counted from 0.

    Raises:
        UserError: shares outside [0, 1], or a stride below 1.
    """

    dense: float = 3 / 16
    stride: int = 2
    tail: float = 1 / 32
    numbers: tuple[int, ...] | None = None

    def __post_init__(self):
        if not (0 <= self.dense <= 1 and 0 <= self.tail <= 1 and self.stride >= 1):
            raise UserError(f"step pattern {self}: give shares of the run from 0 to 1, and a stride of 1 or more")

    def steps(self, count: int) -> list[bool]:
        """For each step of a run of `count`. Raises `UserError` where none of them is guided, or one is outside."""
        if self.numbers is None:
            last = count * (1 - self.tail)
            found = [i < last and (i < count * self.dense or i % self.stride == 0) for i in range(count)]
        else:
            outside = [i for i in self.numbers if not 0 <= i < count]
            if outside:
                raise UserError(f"the step pattern has step {outside[0]}: a run of {count} has steps 0 to {count - 1}")
            found = [i in self.numbers for i in range(count)]
        if not any(found):
            raise UserError(f"the step pattern guides none of {count} steps: give it at least one")
        return found


PAPER = Pattern()
ALL_STEPS = Pattern(dense=1.0, tail=0.0)


class Source(Protocol):
    """Where targets come from: what another run, or a picture, shows at the same step.

    objects: those of the source; None for the same tokens as those that are steered.
    """

    objects: Objects | None

    def shows(
        self, denoiser: Any, taps: Taps, objects: Objects, wanted: Sequence[str], levels: Tensor, steps: Sequence[bool]
    ) -> "Shows":
        """Gets ready for a run; levels: log-SNRs `[steps, B]`, steps: which of them are guided."""


class Shows(Protocol):
    def __call__(self, i: int) -> Seen:
        """Statistics of the source's objects at step i, of one sample or of B."""


class SelfGuidance:
    """Adds the gradient of an energy of attention maps to what another guidance predicts; for `pipe(..., guider=...)`.

    With E the weighted sum of the terms, at a guided step

        eps = eps_guided + weight * factor(level) * dE/dz,

    where eps_guided is that of classifier-free guidance or of the wrapped guider. The loop's denoisers predict
    v = (eps - sigma z) / alpha, so that v = v_guided + weight * factor(level) / alpha * dE/dz, with alpha no less than
    1e-4. E reads the conditional branch alone; dE/dz goes through the whole denoiser,
    and through no solver, so that every solver serves. The energies of a batch are
    added up, so that no sample's gradient knows of another.

    It is no subclass of diffusers' `BaseGuidance`, which sees predictions but neither z nor the network; it takes
    their place in the loop, and wraps one.

    Args:
        terms: of the energy, see `Term`; `semantica.steering.recipes` makes common ones.
        objects: what the terms speak of.
        sources: by name, those that the terms' changes name.
        taps: which layers are read.
        weight: of the energy; its terms have weights of their own.
        factor: a name in `FACTORS`: "sigma" (the paper), "variance" (1 - alpha_bar), "one", or "velocity" (alpha
            sigma), which suits schedules whose first levels have hardly any signal.
        pattern: which steps are guided.
        guidance: what is added to: a guider of diffusers, a `semantica.sampling.loop.Guidance`, or one of
            `semantica.sampling.guiders`, which pipelines know. The last, and classifier-free guidance as the run's
            settings say, which it is without, share the conditional branch's evaluation.
        recompute: whether blocks are computed again for the gradient instead of keeping what it needs.

    Raises:
        UserError: no term, an unknown name, or a term whose source is not there.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        objects: Objects,
        sources: Mapping[str, Source] | None = None,
        taps: Taps | None = None,
        weight: float = 1.0,
        factor: str = "sigma",
        pattern: Pattern = PAPER,
        guidance: Any = None,
        recompute: bool = True,
    ):
        self.terms, self.objects, self.sources = tuple(terms), objects, dict(sources or {})
        self.taps, self.weight, self.factor, self.pattern = taps or Taps(), weight, factor, pattern
        self.guidance, self.beside = parted(guidance)
        self.recompute = recompute
        if not self.terms:
            raise UserError("there is no energy to follow: give at least one term")
        if factor not in FACTORS:
            raise UserError(f"factor {factor!r}: expected one of {', '.join(FACTORS)}")
        for term in self.terms:
            rows = objects.rows(term.objects)
            if not isinstance(term.target, Change):
                continue
            source = term.target.source
            if source not in self.sources:
                there = ", ".join(self.sources) or "none is given"
                raise UserError(f"the energy {term.what!r} has no target: its source {source!r} is not there ({there})")
            (self.sources[source].objects or objects).rows(
                term.target.objects or tuple(objects.names[row] for row in rows)
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gradients", *(self.guidance.needs if self.guidance else ()))

    def predictor(self, denoiser: Any, levels: Tensor, condition: Condition, weak: Weak, settings: Sampling) -> Predict:
        """See `semantica.sampling.loop.Guidance`."""
        steps = self.pattern.steps(settings.steps)
        reader = Reader(denoiser, self.taps, self.objects, [name for term in self.terms for name in term.reads])
        shows = {name: self.prepared(name, denoiser, levels, steps) for name in self.named()}
        follow = follower(self.guidance, denoiser, levels, condition, weak, settings)

        def predict(i: int, z: Tensor) -> Tensor:
            if not steps[i]:
                return follow(i, z, None)
            targets = {name: (show(i), self.sources[name].objects or self.objects) for name, show in shows.items()}
            gradient, v = self.gradient(denoiser, reader, z, levels[i], condition, targets, i)
            alpha, sigma = alpha_sigma(levels[i].to(z.dtype))
            strength = self.weight * FACTORS[self.factor](alpha, sigma) / alpha.clamp(min=LEAST)
            return follow(i, z, v) + strength[:, None, None, None] * gradient

        return predict

    def named(self) -> list[str]:
        return list(dict.fromkeys(term.target.source for term in self.terms if isinstance(term.target, Change)))

    def prepared(self, name: str, denoiser: Any, levels: Tensor, steps: list[bool]) -> Shows:
        mine = [t for t in self.terms if isinstance(t.target, Change) and t.target.source == name]
        wanted, source = {part for term in mine for part in term.asks}, self.sources[name]
        return source.shows(denoiser, self.taps, source.objects or self.objects, sorted(wanted), levels, steps)

    def gradient(
        self,
        denoiser: Any,
        reader: Reader,
        z: Tensor,
        logsnr: Tensor,
        condition: Condition,
        targets: Mapping[str, tuple[Seen, Objects]],
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """dE/dz like z, and the conditional branch's v. Raises `UserError` where either is not finite."""
        module = network(denoiser)
        with torch.enable_grad(), recomputing(module, self.recompute), reader.watching(z) as seen:
            leaf = z.detach().requires_grad_()
            # what comes after the last layer that is read is freed here, the output's graph being dropped
            v = denoiser(leaf, logsnr, condition).detach()
            energies = energy(self.terms, seen(), self.objects, targets)
            if not energies.requires_grad:
                raise UserError("the energy does not depend on the picture: its layers read nothing of it")
            (gradient,) = torch.autograd.grad(energies.sum() * LOSS_SCALE, leaf)
        gradient = gradient / LOSS_SCALE
        # one wait for both
        if not bool(energies.detach().isfinite().all() & gradient.isfinite().all()):
            what = "energy" if not bool(energies.detach().isfinite().all()) else "energy's gradient"
            raise UserError(f"the {what} is not finite at step {step}: lower its terms' weights, or compute in fp32")
        return gradient, v


def parted(guider: Any) -> tuple[Guidance | None, Any]:
    """A guider as what predicts by itself, or else as what a pipeline makes the weak branch of."""
    if guider is None or hasattr(guider, "begin") or hasattr(guider, "native"):
        return None, guider
    return (guider if hasattr(guider, "predictor") else Guided(guider)), getattr(guider, "beside", None)


def follower(
    guidance: Guidance | None, denoiser: Any, levels: Tensor, condition: Condition, weak: Weak, settings: Sampling
) -> Callable[[int, Tensor, Tensor | None], Tensor]:
    """`(i, z, v) -> v` by other guidance, where v is the conditional branch's if it is known already."""
    if guidance is not None:
        own = guidance.predictor(denoiser, levels, condition, weak, settings)
        return lambda i, z, v: own(i, z)
    alone, guided = predictor(denoiser, levels, condition, weak, settings), settings.guided()
    if weak.denoiser is None:
        bound = weak.each(lambda other: bind(denoiser, other))

        def other(i: int, z: Tensor) -> Tensor:
            return bound(i)(z, levels[i])
    else:
        other = unguided(weak.denoiser, levels, weak.condition, settings)

    def follow(i: int, z: Tensor, v: Tensor | None) -> Tensor:
        if v is None:
            return alone(i, z)
        return guide(v, other(i, z), settings.guidance) if guided[i] else v

    return follow


@contextmanager
def recomputing(module: nn.Module, wanted: bool) -> Iterator[None]:
    """With diffusers' gradient checkpointing on for a while."""
    if not wanted or module.is_gradient_checkpointing:
        yield
        return
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()
