"""A pipeline's samples under self-guidance, as a steering file asks for it: words and regions become tokens."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from semantica.condition import Condition
from semantica.device import current
from semantica.errors import UserError
from semantica.images import fit, load_image, to_tensor
from semantica.inputs import samples_in
from semantica.model.conditioner import encoders_of, picture_input
from semantica.pipelines.networks import NetworkPipeline
from semantica.sampling.loop import Guidance, Predict
from semantica.sampling.settings import Sampling
from semantica.segmentation.segmenter import Segmenter, load_segmenter
from semantica.segmentation.windows import locate
from semantica.steering.file import Chosen, Photo, SteerFile
from semantica.steering.guider import SelfGuidance, Source
from semantica.steering.objects import Objects
from semantica.steering.regions import Region
from semantica.steering.sources import Picture, Recording
from semantica.steering.taps import Taps
from semantica.steering.terms import ORIGINAL


class InTurn:
    """A guidance for each sample of a pipeline's call, one after another, in so many batches each."""

    def __init__(self, each: Sequence[Guidance], batches: int):
        self.needs, self.beside = each[0].needs, each[0].beside
        self.left = iter([one for one in each for _ in range(batches)])

    def predictor(self, *arguments: Any) -> Predict:
        """See `semantica.sampling.loop.Guidance`."""
        return next(self.left).predictor(*arguments)


def steered(
    pipeline: NetworkPipeline, inputs: Any, n: int, settings: Sampling, file: SteerFile, guidance: Any = None
) -> np.ndarray:
    """`n` variations of each sample, steered: uint8 `[count, n, S, S, 3]`, from the noise that `variations` has.

    Args:
        inputs: `{name: list of values}`, a value each of every sample, None for what is absent; or a list of pictures.
        guidance: what the energy's gradient is added to, see `SelfGuidance`; None for classifier-free guidance.

    Raises:
        UserError: an object is not in a prompt or picture, or what `SelfGuidance` and the pipeline raise.
    """
    values = inputs if isinstance(inputs, Mapping) else dict.fromkeys(encoders_of(pipeline.encoder), inputs)
    count = samples_in(pipeline.prepare(inputs))
    stream, taps = stream_of(pipeline, file)
    # variations of one sample at a time: tokens and targets are its own
    before, pipeline.max_samples = pipeline.max_samples, min(n, pipeline.max_samples or n)
    try:
        with torch.no_grad(), current(torch.device(pipeline.denoiser.device)):
            samples = [{name: each and each[i] for name, each in values.items()} for i in range(count)]
            objects = [objects_of(pipeline, file.objects, sample, stream, file.segmenter) for sample in samples]
            sources: list[dict[str, Source]] = [
                {name: source_of(pipeline, file, photo, sample, stream, settings.seed)
                 for name, photo in file.photos.items() if name in file.sources}
                for sample in samples
            ]  # fmt: skip
        if ORIGINAL in file.sources:
            wanted = sorted(file.sources[ORIGINAL])
            recordings = [Recording(each, taps, file.pattern, guidance, wanted) for each in objects]
            run(pipeline, inputs, n, settings, recordings)
            sources = [{**photos, ORIGINAL: recording} for photos, recording in zip(sources, recordings)]
        guiders = [
            SelfGuidance(file.terms, each, theirs, taps, file.weight, file.factor, file.pattern, guidance)
            for each, theirs in zip(objects, sources)
        ]
        made = run(pipeline, inputs, n, settings, guiders)
    finally:
        pipeline.max_samples = before
    return made.reshape(count, n, *made.shape[1:])


def run(pipeline, inputs: Any, n: int, settings: Sampling, each: Sequence[Guidance]) -> np.ndarray:
    """One call of the pipeline, a guidance for each sample."""
    options = {"seed": settings.seed, "solver": settings.solver, "interval": settings.interval}
    turns = InTurn(each, -(-n // pipeline.max_samples))
    made = pipeline(inputs, n, settings.steps, settings.guidance, guider=turns, **options).images
    return np.stack([np.asarray(image) for image in made])


def stream_of(pipeline: NetworkPipeline, file: SteerFile) -> tuple[str, Taps]:
    """Which input the objects are chosen in, and the taps of its stream. Raises `UserError` for objects of several."""
    encoders, kinds = encoders_of(pipeline.encoder), set()
    every = [file.objects, *(photo.objects for photo in file.photos.values() if photo.objects)]
    for chosen in (each for objects in every for each in objects.values()):
        placed = chosen.region is not None or chosen.subject is not None
        kinds |= {"words"} if chosen.words is not None else {"region"} if placed else set()
    if len(kinds) > 1:
        raise UserError("objects by words and by regions are tokens of two streams: choose them in one")
    name = file.taps.stream
    if name is None and kinds == {"words"}:
        name = next((name for name, part in encoders.items() if hasattr(part, "tokenizer")), None)
        if name is None:
            raise UserError("this model reads no text: choose objects by regions of the condition picture")
    elif name is None:
        name = picture_input(pipeline.encoder)[0] if kinds else next(iter(encoders))
    if len(encoders) == 1:
        # one encoding fills every stream
        (only,) = encoders
        return only, Taps(file.taps.layers, file.taps.activations, file.taps.stream)
    if name not in encoders:
        raise UserError(f"no stream is called {name!r}: there are {', '.join(encoders)}")
    return name, Taps(file.taps.layers, file.taps.activations, name)


def objects_of(
    pipeline: NetworkPipeline,
    chosen: Mapping[str, Chosen],
    sample: Mapping[str, Any],
    stream: str,
    segmenter: Path | None = None,
) -> Objects:
    """Objects of a sample as tokens of a stream. Raises `UserError` where one is not there."""
    encoder, value = encoders_of(pipeline.encoder)[stream], sample[stream]
    if value is None:
        raise UserError(f"nothing is given for {stream!r}, which objects are chosen in: give it, or choose otherwise")
    tokens: dict[str, tuple[int, ...]] = {}
    for name, each in chosen.items():
        try:
            if each.words is not None:
                if not hasattr(encoder, "tokenizer"):
                    raise UserError(f"stream {stream!r} is of no text: choose a region of the picture")
                tokens[name] = encoder.tokenizer.tokens_of(value, each.words)
            elif each.region is not None or each.subject is not None:
                if not hasattr(encoder, "patches"):
                    raise UserError(f"the encoder of {stream!r} has no patches: its tokens are of the whole picture")
                shown = value if isinstance(value, list) else [value]
                region = each.region or found(segmenter, shown, each)
                length = length_of(pipeline, sample, stream)
                tokens[name] = region.tokens(encoder.patches, length, each.picture, len(shown))
            else:
                tokens[name] = each.tokens
        except UserError as error:
            raise UserError(f"object {name!r}: {error}") from error
    return Objects.of(tokens)


def found(segmenter: Path, shown: list, chosen: Chosen) -> Region:
    """What a segmenter finds by a name in one of a sample's pictures. Raises `UserError` where that is nothing."""
    if not 0 <= chosen.picture < len(shown) or not isinstance(shown[chosen.picture], Image.Image):
        raise UserError(f"picture {chosen.picture} of {len(shown)} is none that a subject can be looked for in")
    return Region(pixels=locate(kept(segmenter), shown[chosen.picture].convert("RGB"), chosen.subject))


@functools.lru_cache(maxsize=1)
def kept(folder: Path) -> Segmenter:
    """A segmenter, read once for all samples and sources of a call."""
    return load_segmenter(folder)


def length_of(pipeline: NetworkPipeline, sample: Mapping[str, Any], stream: str) -> int:
    """Tokens of a sample's stream."""
    return pipeline.encodings(pipeline.prepare(one(sample)))[stream].tokens.shape[1]


def one(sample: Mapping[str, Any]) -> dict[str, list]:
    """A sample as inputs of one; what is absent stays so."""
    return {name: None if value is None else [value] for name, value in sample.items()}


def source_of(
    pipeline: NetworkPipeline, file: SteerFile, photo: Photo, sample: Mapping[str, Any], stream: str, seed: int
) -> Picture:
    """A real picture as a source of targets for a sample."""
    picture = load_image(photo.image)
    shown = picture if photo.condition is None else load_image(photo.condition)
    theirs = {}
    for name, encoder in encoders_of(pipeline.encoder).items():
        own = sample[name] if photo.prompt is None else photo.prompt
        # a sample without a picture has a source without
        given = None if sample[name] is None and photo.condition is None else shown
        theirs[name] = given if hasattr(encoder, "image_size") else own
    condition: Condition = pipeline.condition(pipeline.prepare(one(theirs)))
    objects = objects_of(pipeline, photo.objects or file.objects, theirs, stream, file.segmenter)
    return Picture(encoded(pipeline, picture), condition, objects, seed)


def encoded(pipeline: NetworkPipeline, picture: Image.Image) -> Tensor:
    """A picture as it is sampled, `[1, C, S, S]`."""
    return pipeline.encoded(pipeline.array(to_tensor([fit(picture.convert("RGB"), pipeline.side)])))
