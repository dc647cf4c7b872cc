"""`--guider NAME` and its options: which guiders the command line knows, and what each of them reads."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.extras import literal_type_from_choices

from semantica.errors import UserError
from semantica.images import load_image
from semantica.pipelines.base import VariationPipeline
from semantica.sampling.guiders import Guider, IndependentCondition, StreamsApart, TimeStep, WeakModel

Load = Callable[[Path], VariationPipeline]


@dataclass(frozen=True)
class Named:
    """A guider that the command line knows.

    about: what guidance leads away from. make: of the options, the pipeline and what loads another one alike; None is
    the null condition. options: those of `GuiderOptions` that it reads. guidance: the usual scale, None for the one of
    the model.
    """

    about: str
    make: Callable[["GuiderOptions", VariationPipeline, Load], Guider | None]
    options: tuple[str, ...] = ()
    guidance: float | None = None


def independent(options: "GuiderOptions", pipeline: VariationPipeline, load: Load) -> Guider:
    pictures, prompts = [load_image(path) for path in options.icg_images], list(options.icg_prompts)
    others = pipeline.named(pictures or None, prompts or None) if pictures or prompts else None
    return IndependentCondition(others, options.icg_noise)


def time_step(options: "GuiderOptions", pipeline: VariationPipeline, load: Load) -> Guider:
    return TimeStep(options.tsg_scale, options.tsg_power, options.tsg_blocks)


def weak_model(options: "GuiderOptions", pipeline: VariationPipeline, load: Load) -> Guider:
    return WeakModel(load(options.weak))


GUIDERS = {
    "cfg": Named("the null condition (classifier-free guidance)", lambda *_: None),
    "icg": Named(
        "another condition (independent condition guidance)", independent, ("icg_images", "icg_prompts", "icg_noise")
    ),
    # the papers' scales: DiT-XL/2, conditional, and EDM2-S
    "tsg": Named(
        "a perturbed noise level (time-step guidance)", time_step, ("tsg_scale", "tsg_power", "tsg_blocks"), 2.5
    ),
    "streams": Named(
        "pictures alone, and these of the null condition",
        lambda options, *_: StreamsApart(options.streams_image),
        ("streams_image",),
    ),
    "auto": Named("a bad version of the model (autoguidance)", weak_model, ("weak",), 2.1),
}


@dataclass(frozen=True)
class GuiderOptions:
    """What v is led away from by --guidance, weak + guidance * (own - weak)."""

    guider: literal_type_from_choices(GUIDERS) = "cfg"
    """What is weak: "cfg" the null condition (arXiv 2207.12598), for models trained with dropped conditions; "icg"
    another condition (2407.02687); "tsg" the same one at a perturbed noise level (2407.02687); "auto" a bad version of
    the model, --weak (2406.02507); "streams" texts by --guidance, pictures by --streams-image (2211.09800)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Part of the run, from noise (0) to picture (1), in which guidance is on (arXiv 2404.07724)."""
    icg_images: tuple[Path, ...] = ()
    """icg: pictures whose conditions are drawn from; without any, those of the other --image or --prompt. If conditions
    differ much, --interval 0 0.25."""
    icg_prompts: tuple[str, ...] = ()
    """icg: prompts that are drawn from."""
    icg_noise: bool = False
    """icg: draw tokens from a Gaussian with the mean and standard deviation of the sample's own; not for bundles."""
    tsg_scale: float = 2.0
    """tsg: s of temb + s t^alpha std(temb) n."""
    tsg_power: float = 1.0
    """tsg: alpha; 0 is the paper's constant schedule."""
    tsg_blocks: int | None = None
    """tsg: perturb only the first so many blocks of each part of a U-ViT; by default all. Not for bundles."""
    streams_image: float = 1.5
    """streams: scale of the pictures alone, in three evaluations a step."""
    weak: Path | None = None
    """auto: run folder of a smaller or less trained model with the same inputs, or a bundle for a bundle."""

    def check(self) -> "GuiderOptions":
        """Raises `UserError` for impossible numbers, or options of another guider."""
        if not (all(map(math.isfinite, self.interval)) and 0 <= self.interval[0] <= self.interval[1] <= 1):
            raise UserError(f"--interval is {self.interval[0]} {self.interval[1]}: give two of 0 to 1 that do not fall")
        if self.guider == "auto" and self.weak is None:
            raise UserError("--guider auto needs --weak: the run folder or bundle of a bad version of the model")
        if self.icg_noise and (self.icg_images or self.icg_prompts):
            raise UserError("--icg-noise beside --icg-images or --icg-prompts: give one of them")
        for field in dataclasses.fields(self):
            others = [name for name, entry in GUIDERS.items() if field.name in entry.options]
            if others and self.guider not in others and getattr(self, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise UserError(f"--{option} says nothing to --guider {self.guider}: give --guider {others[0]} too")
        if self.guider == "streams":
            StreamsApart(self.streams_image)
        if self.guider == "tsg":
            # its own bounds
            TimeStep(self.tsg_scale, self.tsg_power, self.tsg_blocks)
        return self

    @property
    def named(self) -> Named:
        """The entry of `GUIDERS`."""
        return GUIDERS[self.guider]

    def make(self, pipeline: VariationPipeline, load: Load) -> Guider | None:
        """The guider of a pipeline; `load` makes one of another model. Raises `UserError` for what cannot be read."""
        return self.named.make(self, pipeline, load)


# in a command's configuration: options without a prefix
Guiding = Annotated[GuiderOptions, tyro.conf.arg(name="")]
