"""The networks of a run folder behind the call of every pipeline, without what diffusers' own pipelines import."""

import copy
import functools
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from semantica.condition import Condition, Stream
from semantica.device import current, sent
from semantica.errors import UserError
from semantica.files import read_json
from semantica.inputs import SINGLE, TEXT, Prepared, samples_in
from semantica.model.conditioner import Conditioner, encoders_of, encodings, fill, placed, prepare
from semantica.model.hub import located
from semantica.model.image_encoder import ImageEncoder
from semantica.model.uvit import UViT
from semantica.model.whole import require_whole, unsaid
from semantica.pipelines import components
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.runfolder import CONFIGS, PATTERNS, check_run, readable
from semantica.sampling.loop import Denoiser
from semantica.sampling.scheduler import SemanticaScheduler


class NetworkPipeline(VariationPipeline):
    """Image variations by the networks of a run folder (arXiv 2405.14857).

    Args:
        unet: the denoiser.
        encoder: turns condition pictures into tokens of every stream, or a `Conditioner` with an encoder for each.
        scheduler: noise schedule and solver.
    """

    # the faster copies that `accelerate` made
    _fast: tuple[Denoiser, torch.nn.Module] | None = None

    def __init__(self, unet: UViT, encoder: ImageEncoder | Conditioner, scheduler: SemanticaScheduler):
        self.unet, self.encoder, self.scheduler = unet, encoder, scheduler

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """As `SemanticaPipeline.from_pretrained`, in a third of the time. Raises `UserError` as that."""
        folder = located(source, PATTERNS)
        check_run(folder)
        index, parts = read_json(folder / "model_index.json"), {}
        with readable(folder), unsaid():
            for name in CONFIGS:
                kind = getattr(components, index[name][1])
                safe = {} if name == "scheduler" else {"use_safetensors": True}
                parts[name] = kind.from_pretrained(str(folder / name), local_files_only=True, **safe)
        return cls(**parts).whole(folder).aligned()

    def whole(self, folder: Path, given: Container[str] = ()) -> Self:
        """Itself, once every weight is known to come from the folder that it was loaded from.

        given: networks that come from elsewhere.

        Raises:
            UserError: files lack one; diffusers draws it at random then.
        """
        for name in (part for part in ("unet", "encoder") if part not in given):
            module = getattr(self, name)
            parts = module.parts if isinstance(module, Conditioner) else {"": module}
            for below, part in parts.items():
                require_whole(part, folder / name / below)
        return self

    def aligned(self) -> Self:
        """With weights in memory that was allocated for them."""
        for module in (self.unet, self.encoder):
            for parameter in module.parameters():
                # a tensor mapped from a file is not aligned as an allocated one, and matrix products round by alignment
                parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
        return self

    def to(self, device: torch.device | str) -> Self:
        """On a device."""
        for module in (self.unet, self.encoder):
            module.to(device)
        return self

    def accelerate(
        self,
        dtype: torch.dtype | None = None,
        compile: Literal["none", "blocks", "network"] = "network",
        graphs: bool = True,
    ) -> Self:
        """Sample faster from now on: through a `CompiledDenoiser`, the encoder in its precision; returns the pipeline.

        Call it on the device where sampling happens. The networks are copied, and the pipeline's own stay as they are.
        The first call of each batch size compiles, for ten seconds to minutes; callbacks, and guiders that
        change the network, are refused.

        Args:
            dtype: of weights and activations; by default bf16 where the processor has instructions for it, else fp32.
            compile, graphs: see `semantica.sampling.compiled.CompiledDenoiser`.
        """
        from semantica.sampling.compiled import CompiledDenoiser

        denoiser = CompiledDenoiser(self.unet, dtype, compile, graphs)
        encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        # the method of modules: that of diffusers warns about casts
        self._fast = denoiser, torch.nn.Module.to(encoder, denoiser.dtype)
        return self

    def restore(self) -> Self:
        """Undo `accelerate`; returns the pipeline."""
        self._fast = None
        return self

    @property
    def denoiser(self) -> Denoiser:
        """The network, or the compiled copy that `accelerate` made."""
        if self._fast is None:
            return self.unet
        if self._fast[0].device != self.unet.device:
            raise UserError(f"accelerated on {self._fast[0].device}, now on {self.unet.device}: accelerate again")
        return self._fast[0]

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return self.scheduler.config

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.image_size
        return (self.unet.config.in_channels, size, size)

    @torch.no_grad()
    def encode(self, inputs: Any) -> Stream | dict[str, Stream]:
        """What the encoder makes of condition pictures, to be given instead of them; of a `Conditioner`, by stream.

        Args:
            inputs: as `semantica.inputs.prepare_inputs` takes them: a picture, a list of pictures (one sample each;
                a nested list is several pictures for one sample), a tensor `[B, 3, S, S]` in [-1, 1]
                (`[B, K, 3, S, S]` for K pictures in each sample), or a stream that was encoded before; of a
                `Conditioner`, `{stream name: such values}`.
        """
        made = self.encodings(self.prepare(inputs))
        return made if isinstance(self.encoder, Conditioner) else made[SINGLE]

    def encodings(self, prepared: dict[str, Prepared]) -> dict[str, Stream]:
        """Prepared inputs to streams in the type that the network reads, also where the encoder is a faster copy."""
        encoder, device = self.encoder if self._fast is None else self._fast[1], self._execution_device
        # what was encoded before is not rounded to the type of a faster copy
        before = {name: value for name, value in prepared.items() if isinstance(value, Stream)}
        made = encodings(encoder, placed(prepared, device, encoder.dtype) | before)
        return placed(made, device, self.unet.dtype)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(encoders_of(self.encoder))

    def tokens_of(self, prompt: str, word: str) -> tuple[int, ...]:
        """Which tokens of the stream `text` belong to a word of a prompt, or to several words in a row.

        Raises:
            UserError: the prompt does not have it, or the model reads no text.
        """
        encoder = encoders_of(self.encoder).get(TEXT)
        if not hasattr(encoder, "tokenizer"):
            raise UserError(f"this model reads {' and '.join(self.inputs)}, no text: it has no words")
        return encoder.tokenizer.tokens_of(prompt, word)

    def prepare(self, inputs: Any) -> dict[str, Prepared]:
        return prepare(self.encoder, inputs)

    def conditioned(self, encodings: dict[str, Stream]) -> Condition:
        """What the denoiser makes of encoded inputs."""
        return self.unet.condition(fill(self.unet.stream_names, encodings))

    def condition(self, prepared: dict[str, Prepared]) -> Condition:
        condition = self.conditioned(self.encodings(prepared))
        # without any condition there is one embedding for all
        return condition if self.unet.stream_names else condition.repeat(samples_in(prepared))

    @property
    def side(self) -> int:
        """Of the images that it makes, in pixels."""
        return self.sample_shape[-1]

    def encoded(self, images: Tensor) -> Tensor:
        """What is sampled, of images `[B, 3, side, side]` in [-1, 1]: the other way than `decode`."""
        return images

    def array(self, values: Any) -> Tensor:
        """On the device; the solver's sums keep their digits whatever the network computes in."""
        values = torch.as_tensor(values).to(torch.promote_types(self.unet.dtype, torch.float32))
        return sent(values, torch.device(self._execution_device))

    @functools.wraps(VariationPipeline.__call__)
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad(), current(torch.device(self._execution_device)):
            return VariationPipeline.__call__(self, *arguments, **named)
