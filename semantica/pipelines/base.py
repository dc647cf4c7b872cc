"""The call that every pipeline has in common; numpy and Pillow only where the denoiser is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from semantica import solvers
from semantica.condition import Condition, concatenate
from semantica.discrete import schedule_of
from semantica.errors import UserError
from semantica.images import to_uint8
from semantica.inputs import SINGLE, Prepared, is_text, part_of, samples_in
from semantica.ranges import span
from semantica.sampling.guiders import Call
from semantica.sampling.loop import Array, Denoiser, Guidance, sample
from semantica.sampling.settings import Sampling

OUTPUTS = ("pil", "np", "pt")


@dataclass(frozen=True)
class Variations:
    """images: Pillow images, or an array `[B * n, S, S, 3]` ("np") or tensor `[B * n, 3, S, S]` ("pt") in [0, 1]."""

    images: Any


class VariationPipeline(ABC):
    """Image variations (arXiv 2405.14857): encode the condition once, denoise with cross-attention to it.

    seed: of calls that name neither a seed nor a generator; None draws from torch's global generator then.
    max_samples: that are denoised at once, None for all of a call; the denoiser's own limit holds too.
    guidance: of calls that name no guidance_scale.
    """

    seed: int | None = None
    max_samples: int | None = None
    guidance: float = 1.5
    output_class: Callable[..., Any] = Variations

    @property
    @abstractmethod
    def denoiser(self) -> Denoiser:
        """What predicts v."""

    @property
    @abstractmethod
    def scheduler_config(self) -> Mapping[str, Any]:
        """The configuration of the model's `SemanticaScheduler`."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of what is sampled, `(channels, S, S)`."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names of what conditions the model, such as `image` and `text`."""

    @abstractmethod
    def prepare(self, inputs: Any) -> dict[str, Prepared]:
        """Pictures and whatever else conditions samples to arrays, on the host, see `semantica.inputs`."""

    @abstractmethod
    def condition(self, prepared: dict[str, Prepared]) -> Condition:
        """Keys, values and embedding of what `prepare` made."""

    @abstractmethod
    def array(self, values: Any) -> Array:
        """Numbers as the denoiser takes them, on its device."""

    def __call__(
        self,
        image: Any = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        generator: Any = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        guider: Any = None,
        seed: int | None = None,
        solver: str | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        prompt: Any = None,
    ) -> Any:
        """Make variations.

        Args:
            image: a picture, or a list of pictures, one sample each; from a run folder also a nested list, several
                pictures for one sample, and whatever else `semantica.inputs.prepare_inputs` takes. Where each stream
                has an encoder of its own, `{stream name: such values}`, None for one that is absent.
            num_images_per_prompt: variations of each sample; they follow one another in the result.
            num_inference_steps: sampling steps.
            guidance_scale: weak + scale * (own - weak), classifier-free guidance without a guider; 1 = off. By default
                the pipeline's `guidance`.
            generator: `torch.Generator` as the source of all noise (one, or one per output image), instead of `seed`.
            latents: `[B * num_images_per_prompt, 3, S, S]` starting noise instead of drawing it.
            output_type: "pil", "np" (`[B, S, S, 3]` in [0, 1]) or "pt" (`[B, 3, S, S]` in [0, 1]).
            return_dict: False gives a plain tuple.
            callback_on_step_end: `(pipeline, step, timestep, {"latents": z}) -> dict`, may replace the latents.
            guider: what v is led away from by `guidance_scale` in `interval`, in the place of the null condition: one
                of `semantica.sampling.guiders`. Or, instead of both numbers too, any guider of diffusers, or a
                `semantica.sampling.loop.Guidance`.
            seed: of the noise; that of variation j of sample i at a step depends on (seed, i, j, step) alone, on no
                solver, device or batch. Without it and `generator`, 0 for a bundle, and for a run folder torch's
                global generator.
            solver: another one than the model's, a name in `semantica.solvers.SOLVERS`.
            interval: fractions of the run between which guidance is on (arXiv 2404.07724).
            prompt: a text, or a list of texts, one for each sample, for a model that reads text; with `image` beside it
                or alone.

        Raises:
            UserError: impossible numbers, latents of the wrong shape, a batch that the denoiser does not take, or a
                guider or callback that it does not allow.
        """
        if output_type not in OUTPUTS:
            raise UserError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUTS)}")
        n, shape = num_images_per_prompt, self.sample_shape
        if n < 1:
            raise UserError(f"num_images_per_prompt={n} must be at least 1")
        seed = self.seed if seed is None else seed
        config = {**self.scheduler_config, **({"solver": solver} if solver else {})}
        scale = self.guidance if guidance_scale is None else guidance_scale
        fields = dict(steps=num_inference_steps, guidance=scale, interval=interval, seed=seed or 0)
        settings, schedule = Sampling.of(config, **fields), schedule_of(config)
        with span("prepare"):
            inputs = image if prompt is None else self.named(image, prompt)
            samples = self.prepare(inputs)
        total = samples_in(samples) * n
        branch, guidance = None, None
        if hasattr(guider, "beside"):
            guidance, guider = guider, guider.beside
        if hasattr(guider, "native"):
            guider, settings = guider.native(settings)
        if hasattr(guider, "begin"):
            levels = schedule.grid(settings.steps)[1][: settings.steps].astype(np.float32)
            branch = guider.begin(Call(self, inputs, samples, n, settings, levels)) if any(settings.guided()) else None
        elif guidance is None:
            guidance = as_guidance(guider)
        if isinstance(generator, list) and len(generator) != total:
            raise UserError(f"{len(generator)} generators for {total} images: give one, or one for each")
        if generator is not None or seed is None:
            noise = drawn(generator, shape, self._execution_device)
        else:
            noise = seeded(seed, shape, n)
        if latents is None:
            latents = noise(range(total))
        elif tuple(latents.shape) != (total, *shape):
            raise UserError(f"latents have shape {tuple(latents.shape)}: expected {[total, *shape]}")
        made = []
        for rows, condition in self.batches(samples, n, self.limit(guidance is None and any(settings.guided()))):
            weak = branch and branch(rows, condition)
            z = self.array(latents[rows.start : rows.stop])
            fresh = partial(self.fresh, noise, rows)
            with span("sample"), self.watched(settings, callback_on_step_end) as on_step:
                z = sample(self.denoiser, z, condition, None, schedule, settings, fresh, guidance, on_step, weak)
            made.append(z)
        with span("finish"):
            images = finish(self.decode(concatenate(made)), output_type)
        return self.output_class(images=images) if return_dict else (images,)

    def named(self, image: Any, prompt: Any) -> dict[str, Any]:
        """Pictures and texts by the names of the model's inputs, None where there are none.

        Raises:
            UserError: the model does not read them.
        """
        pictures, texts = SINGLE in self.inputs, any(map(is_text, self.inputs))
        for value, there, what in ((image, pictures, "pictures"), (prompt, texts, "text")):
            if value is not None and not there:
                raise UserError(f"this model reads {' and '.join(self.inputs)}, no {what}: leave {what} out")
        return {name: image if name == SINGLE else prompt if is_text(name) else None for name in self.inputs}

    def decode(self, z: Array) -> Array:
        """Images `[B, 3, R, R]` around [-1, 1] of what was sampled: that itself, or its decoded latents."""
        return z

    def fresh(self, noise: Callable[..., Array], rows: range, step: int) -> Array:
        """What a solver adds in a step."""
        return self.array(noise(rows, step + 1))

    @property
    def _execution_device(self) -> Any:
        return self.denoiser.device

    def limit(self, guided: bool) -> int | None:
        """How many samples are denoised at once. Raises `UserError` where the denoiser takes none."""
        most = self.denoiser.max_batch
        if most is None:
            return self.max_samples
        branches = 2 if guided and self.denoiser.joins else 1
        if most < branches:
            raise UserError(f"this engine takes a batch of {most}, guidance needs {branches}: set it to 1")
        return most // branches

    def batches(self, samples: dict[str, Prepared], n: int, limit: int | None) -> Iterator[tuple[range, Condition]]:
        """Rows of the result that are denoised at once, and their condition; each sample is encoded once."""
        count = samples_in(samples)
        limit = limit or count * n
        group = max(1, limit // n)
        for first in range(0, count, group):
            last = min(first + group, count)
            with span("encode"):
                condition = self.condition(part_of(samples, first, last))
            # all variations of some samples, or some variations of one sample
            for start in range(first * n, last * n, limit):
                rows = range(start, min(start + limit, last * n))
                yield rows, condition.repeat(len(rows) // (last - first))

    @contextmanager
    def watched(self, settings: Sampling, callback: Callable | None) -> Iterator[Callable[[int, Array], Array] | None]:
        """What the loop calls after each step of a run, if anything."""
        # a schedule of timesteps visits others for another solver
        config = {**self.scheduler_config, "solver": settings.solver}
        times = self.array(schedule_of(config).grid(settings.steps)[0])

        def on_step(i: int, z: Array) -> Array:
            return callback(self, i, times[i], {"latents": z}).get("latents", z)

        yield on_step if callback else None


def seeded(seed: int, shape: tuple[int, ...], n: int) -> Callable[..., np.ndarray]:
    """Noise of rows of the result, n to a sample: a function of the seed, the row and further numbers alone."""
    return lambda rows, *index: np.stack([solvers.noise(seed, shape, row // n, row % n, *index) for row in rows])


def place_of(generator: Any, place: Any) -> Any:
    """The device that a generator draws on, for noise on `place`. Raises `UserError` for one of another GPU."""
    if generator is None or generator.device == place or generator.device.type == "cpu":
        return place if generator is None else generator.device
    raise UserError(f"a generator on {generator.device} for noise on {place}: give one of the CPU or of {place}")


def drawn(generator: Any, shape: tuple[int, ...], device: Any) -> Callable[..., Array]:
    """Noise as diffusers' pipelines draw it: one generator for all, or one for each row of the result."""
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    from semantica.device import numbered, sent

    place = numbered(torch.device(device))

    def draw(rows: range, *_: int) -> Array:
        own = generator[rows.start : rows.stop] if isinstance(generator, list) else generator
        kinds = {place_of(one, place) for one in (own if isinstance(own, list) else [own])}
        if len(kinds) > 1:
            raise UserError("generators of the CPU and of a GPU together: give those of one device")
        # what a generator of the CPU draws goes over without waiting
        return sent(randn_tensor((len(rows), *shape), own, kinds.pop(), torch.float32), place)

    return draw


def as_guidance(guider: Any) -> Guidance | None:
    """A guider of diffusers as what the loop takes; others are that already."""
    if guider is None or hasattr(guider, "predictor"):
        return guider
    from semantica.sampling.guidance import Guided

    return Guided(guider)


def finish(z: Array, output_type: str) -> Any:
    """Images `[B, 3, S, S]` around [-1, 1] in the form that was asked for."""
    if output_type == "pil":
        return [Image.fromarray(array) for array in to_uint8(z)]
    if output_type == "pt":
        import torch

        return ((torch.as_tensor(z).float() + 1) / 2).clip(0, 1)
    z = z if isinstance(z, np.ndarray) else z.float().cpu().numpy()
    return ((z + 1) / 2).clip(0, 1).transpose(0, 2, 3, 1)
