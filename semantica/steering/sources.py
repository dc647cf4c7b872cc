"""Where targets come from: another run at the same step, or a real picture noised to that level, without inversion."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from semantica.condition import Condition
from semantica.errors import UserError
from semantica.sampling.loop import Predict
from semantica.sampling.settings import Sampling
from semantica.solvers import alpha_sigma, noise
from semantica.steering.guider import ALL_STEPS, Pattern, follower, parted
from semantica.steering.objects import Objects
from semantica.steering.taps import APPEARANCE, MAPS, MOMENTS, Reader, Seen, Taps
from semantica.weak import Weak

EVERYTHING = (MOMENTS, MAPS, APPEARANCE)


class Recording:
    """A run whose statistics are kept: give it as the guider of a run, then as a source of `SelfGuidance`.

    It changes nothing: it predicts as `guidance` does, classifier-free guidance without one. What is kept of a step
    are the objects' maps on the layers' grids, their moments and appearances, a few kilobytes to a megabyte.
    Runs of several batches are kept one after another, and are read in that order by runs of as many.

    Args:
        objects: of the run. taps, pattern: as those of the `SelfGuidance` that will read it.
        guidance: as for `SelfGuidance`. wanted: the statistics to keep.
    """

    # nothing is computed backwards, but the attention of the module is read
    needs: tuple[str, ...] = ("gradients",)

    def __init__(
        self,
        objects: Objects,
        taps: Taps | None = None,
        pattern: Pattern = ALL_STEPS,
        guidance: Any = None,
        wanted: Sequence[str] = EVERYTHING,
    ):
        self.objects: Objects | None = objects
        self.taps, self.pattern, self.wanted = taps or Taps(), pattern, wanted
        self.guidance, self.beside = parted(guidance)
        self.runs: list[dict[int, Seen]] = []
        self.read = 0
        if self.guidance:
            self.needs = (*self.needs, *self.guidance.needs)

    def predictor(self, denoiser: Any, levels: Tensor, condition: Condition, weak: Weak, settings: Sampling) -> Predict:
        """See `semantica.sampling.loop.Guidance`."""
        steps, kept = self.pattern.steps(settings.steps), {}
        reader = Reader(denoiser, self.taps, self.objects, self.wanted)
        follow = follower(self.guidance, denoiser, levels, condition, weak, settings)
        self.runs.append(kept)

        def predict(i: int, z: Tensor) -> Tensor:
            if not steps[i]:
                return follow(i, z, None)
            v, kept[i] = looked_at(denoiser, reader, z, levels[i], condition)
            return follow(i, z, v)

        return predict

    def shows(
        self, denoiser: Any, taps: Taps, objects: Objects, wanted: Sequence[str], levels: Tensor, steps: Sequence[bool]
    ) -> Callable[[int], Seen]:
        """See `semantica.steering.guider.Source`. Raises `UserError` for a run unlike the one that was recorded."""
        if not self.runs:
            raise UserError("this recording is empty: give it as the guider of a run first")
        kept, batch = self.runs[self.read % len(self.runs)], levels.shape[1]
        self.read += 1
        missing = [i for i, guided in enumerate(steps) if guided and i not in kept]
        if missing:
            raise UserError(f"step {missing[0]} was not recorded: record a run of {len(steps)} steps, these among them")
        if set(wanted) - set(self.wanted):
            raise UserError(f"{', '.join(sorted(set(wanted) - set(self.wanted)))} were not recorded: record them too")
        last = kept[max(kept)]
        some = next(a for a in (*last.moments.values(), *last.maps.values(), last.appearance) if a is not None)
        if len(some) not in (1, batch):
            raise UserError(
                f"a batch of {batch} is steered by a recording of {len(some)}: record as many samples, or 1"
            )
        return kept.__getitem__


class Picture:
    """Real pictures, noised to the level of each step; what the network sees in them is the target.

    Args:
        x: `[B or 1, C, S, S]` as it is sampled: pixels in [-1, 1], or latents of unit size.
        condition: what the network reads beside them: of a caption, or of the pictures themselves; as many samples.
        objects: tokens of that condition; None for those of what is steered.
        seed: of the noise, which is fresh at each step.

    Raises:
        UserError: numbers of samples differ.
    """

    def __init__(self, x: Tensor, condition: Condition, objects: Objects | None = None, seed: int = 0):
        if len(condition.emb) != len(x):
            raise UserError(f"{len(x)} pictures beside a condition of {len(condition.emb)}: give as many of both")
        self.x, self.condition, self.objects, self.seed = x, condition, objects, seed

    def shows(
        self, denoiser: Any, taps: Taps, objects: Objects, wanted: Sequence[str], levels: Tensor, steps: Sequence[bool]
    ) -> Callable[[int], Seen]:
        """See `semantica.steering.guider.Source`. Raises `UserError` for pictures of another shape."""
        expected = tuple(denoiser.sample_shape)
        if tuple(self.x.shape[1:]) != expected or len(self.x) not in (1, levels.shape[1]):
            shape = tuple(self.x.shape)
            raise UserError(f"pictures {shape} to steer {levels.shape[1]} samples of {expected}: give one, or as many")
        reader = Reader(denoiser, taps, objects, wanted)
        x = self.x.to(levels.device, levels.dtype)

        def show(i: int) -> Seen:
            fresh = torch.from_numpy(noise(self.seed, tuple(x.shape), i)).to(x)
            level = levels[i, : len(x)]
            alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(level))
            return looked_at(denoiser, reader, alpha * x + sigma * fresh, level, self.condition)[1]

        return show


@torch.no_grad()
def looked_at(denoiser: Any, reader: Reader, z: Tensor, logsnr: Tensor, condition: Condition) -> tuple[Tensor, Seen]:
    """v, and what the denoiser's attention looked at."""
    with reader.watching(z) as seen:
        v = denoiser(z, logsnr, condition)
        return v, seen()
