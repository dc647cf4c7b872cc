"""Jobs of several requests sampled as one batch, over any pipeline; numpy only where the pipeline is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from semantica import solvers
from semantica.discrete import schedule_of
from semantica.engines.bundle import is_bundle
from semantica.errors import UserError
from semantica.images import to_uint8
from semantica.inputs import SINGLE, TEXT, is_text
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.kinds import foreign
from semantica.pipelines.sample import given
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling
from semantica.serving.job import Card, Job
from semantica.sight import sight_in


class Abandoned(Exception):
    """Nobody waits for a batch any more."""


class Part(NamedTuple):
    """Some images of a job, those of the numbers in `images`."""

    job: Job
    images: range


class Runner:
    """Makes parts of jobs that share a key, all in one batch.

    Every image starts from the noise of its own job's seed and its number there, whatever it is batched with.

    Args:
        pipeline: a run folder's, a bundle's or one of diffusers.
        most: images that are made at once; None for 8, or fewer where the engine takes no more.

    Raises:
        UserError: the engine does not take as many.
    """

    def __init__(self, pipeline: VariationPipeline, most: int | None = None):
        self.pipeline, denoiser = pipeline, pipeline.denoiser
        limit = pipeline.limit(guided=True) or 8
        if most is not None and most > limit:
            raise UserError(f"--max-batch {most}: this engine makes at most {limit} images at once, guidance included")
        self.most = min(8, limit) if most is None else most
        self.stepwise = "steps" not in getattr(denoiser, "refuses", {})
        # what compiles, records or tunes for each size of batch gets few of them
        prepared = not self.stepwise or str(denoiser.device) != "cpu"
        powers = [1 << i for i in range(self.most.bit_length())]
        self.sizes = sorted({*powers, self.most}) if prepared else list(range(1, self.most + 1))
        self.warm = self.sizes if prepared else []

    def warm_up(self, card: Card) -> None:
        """Two steps at each size of batch that is prepared for, with the settings of requests that name none."""
        picture = np.zeros((card.side, card.side, 3), np.uint8) if SINGLE in card.inputs else None
        text = "a picture" if TEXT in card.inputs else None
        for size in self.warm:
            job = Job(picture, text, size, min(2, card.steps), card.guidance, card.solver, 0)
            self([Part(job, range(size))], lambda: True)

    def __call__(self, parts: Sequence[Part], wanted: Callable[[], bool]) -> list[np.ndarray]:
        """The images of each part, uint8 `[count, H, W, 3]`.

        wanted: asked after each step, where the engine has steps.

        Raises:
            Abandoned: they are not wanted any more.
            UserError: the model does not take what a job gives.
        """
        pipeline, job = self.pipeline, parts[0].job
        config = {**pipeline.scheduler_config, "solver": job.solver}
        settings = Sampling.of(config, steps=job.steps, guidance=job.guidance)
        images = [(part.job.seed, number) for part in parts for number in part.images]
        owners = [i for i, part in enumerate(parts) for _ in part.images]
        # what fills a prepared size up is the last image once more
        extra = next(size for size in self.sizes if size >= len(images)) - len(images)
        images, owners = images + images[-1:] * extra, owners + owners[-1:] * extra

        def noise(*index: int) -> Any:
            drawn = [solvers.noise(seed, pipeline.sample_shape, 0, number, *index) for seed, number in images]
            return pipeline.array(np.stack(drawn))

        def on_step(_: int, z: Any) -> Any:
            if not wanted():
                raise Abandoned
            return z

        pictures = [Image.fromarray(part.job.picture) for part in parts if part.job.picture is not None]
        prompts = [part.job.prompt for part in parts if part.job.prompt is not None]
        with self.placed():
            condition = pipeline.condition(pipeline.prepare(given(pipeline, pictures, prompts)))
            if owners != list(range(len(parts))):
                condition = condition.map(lambda array: array[owners])
            z = sample(
                pipeline.denoiser, noise(), condition, None, schedule_of(config), settings,
                noise=lambda step: noise(step + 1), on_step=on_step if self.stepwise else None,
            )  # fmt: skip
            made = to_uint8(pipeline.decode(z[: len(images) - extra]))
        return np.split(made, np.cumsum([len(part.images) for part in parts])[:-1])

    @contextmanager
    def placed(self) -> Iterator[None]:
        """What torch needs to know of a thread; nothing where there is no torch."""
        if self.pipeline.denoiser.array == "numpy":
            yield
            return
        import torch

        from semantica.device import current

        with torch.no_grad(), current(torch.device(self.pipeline.denoiser.device)):
            yield


def card_of(
    pipeline: VariationPipeline, model: Path, name: str, steps: int, guidance: float | None, solver: str
) -> Card:
    """What a server of a pipeline offers.

    Raises:
        UserError: it reads something else than pictures and texts.
    """
    others = {name for name in pipeline.inputs if name != SINGLE and not is_text(name)}
    if others:
        raise UserError(f"{model} reads {', '.join(sorted(others))}: only models of pictures and texts are served")
    bundle = is_bundle(model)
    return Card(
        name=name or model.resolve().name,
        created=int(model.stat().st_mtime),
        size=pipeline.image_size if bundle else pipeline.side,
        side=side_of(pipeline, bundle) if SINGLE in pipeline.inputs else 0,
        inputs=pipeline.inputs,
        whole=bundle or foreign(model),
        steps=steps,
        guidance=pipeline.guidance if guidance is None else guidance,
        solver=solver,
        solvers=tuple(solvers.SOLVERS),
    )


def side_of(pipeline: Any, bundle: bool) -> int:
    """Of the squares that pictures become before the encoder cuts out what it sees, so that they are resized once.

    Raises:
        UserError: an encoder of anything else.
    """
    if bundle:
        shape = pipeline.engine.bundle.inputs[SINGLE]
        if len(shape) != 3:
            raise UserError(f"{pipeline.engine.bundle.folder} reads {SINGLE} as {list(shape)}: no picture can be sent")
        sight = sight_in(pipeline.engine.manifest, SINGLE, shape[-1])
    else:
        from semantica.model.conditioner import encoders_of
        from semantica.model.image_encoder import sight_of

        sight = sight_of(encoders_of(pipeline.encoder)[SINGLE])
    return sight.resize or sight.size
