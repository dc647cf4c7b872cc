"""The pipeline: condition images in, variations out."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from safetensors import SafetensorError
from torch import Tensor

from semantica.condition import Condition, Stream
from semantica.errors import UserError
from semantica.inputs import SINGLE, Prepared, samples_in
from semantica.model.conditioner import Conditioner, encodings, fill, placed, prepare
from semantica.model.image_encoder import ImageEncoder
from semantica.model.uvit import UViT
from semantica.pipelines import components
from semantica.pipelines.base import VariationPipeline
from semantica.pipelines.runfolder import CONFIGS, PATTERNS, address, check_run
from semantica.sampling.loop import Denoiser
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.sampling.settings import Sampling

if TYPE_CHECKING:
    from semantica.pipelines.bundle import BundlePipeline


class SemanticaPipeline(DiffusionPipeline, VariationPipeline):
    """Image variations from a run folder (arXiv 2405.14857), a pipeline of diffusers.

    Args:
        unet: the denoiser.
        encoder: turns condition pictures into tokens of every stream, or a `Conditioner` with an encoder for each.
        scheduler: noise schedule and solver.
    """

    model_cpu_offload_seq = "encoder->unet"
    _callback_tensor_inputs = ["latents"]
    output_class = ImagePipelineOutput

    def __init__(self, unet: UViT, encoder: ImageEncoder | Conditioner, scheduler: SemanticaScheduler):
        super().__init__()
        self.register_modules(unet=unet, encoder=encoder, scheduler=scheduler)
        self._fast = None

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs) -> "SemanticaPipeline":
        """Load a run folder, or a repository of the same layout from the hub (downloaded, then checked).

        Only safetensors and JSON are read, whatever the arguments say.

        Raises:
            UserError: the folder is not a complete pipeline of this package, or could execute code.
        """
        folder = Path(source)
        if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                folder = Path(snapshot_download(str(source), revision=kwargs.get("revision"), allow_patterns=PATTERNS))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
                raise UserError(f"{source} is neither a folder nor a repository that can be reached") from error
        check_run(folder)
        kwargs.update(use_safetensors=True, trust_remote_code=False, local_files_only=True)
        kwargs.pop("custom_pipeline", None)
        shown = logging.is_progress_bar_enabled()
        # three parts that load in milliseconds
        logging.disable_progress_bar()
        try:
            pipeline = super().from_pretrained(str(folder), **kwargs)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{folder} cannot be loaded: {reason}") from error
        finally:
            if shown:
                logging.enable_progress_bar()
        for module in (pipeline.unet, pipeline.encoder):
            for parameter in module.parameters():
                # a tensor mapped from a file is not aligned as an allocated one, and matrix products round by alignment
                parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
        return pipeline

    @staticmethod
    def from_bundle(folder: str | Path, backend: str = "auto", device: str = "auto") -> "BundlePipeline":
        """A bundle's engine behind the same call: `image`, `num_images_per_prompt`, `guidance_scale`, `latents`, ...

        Args:
            folder: made by `semantica export`.
            backend, device: see `semantica.engines.load_engine`.

        Raises:
            UserError: as `load_engine`.
        """
        from semantica.engines import load_engine
        from semantica.pipelines.bundle import BundlePipeline

        return BundlePipeline(load_engine(folder, backend, device))

    def accelerate(
        self,
        dtype: torch.dtype | None = None,
        compile: Literal["none", "blocks", "network"] = "network",
        graphs: bool = True,
    ) -> "SemanticaPipeline":
        """Sample faster from now on: through a `CompiledDenoiser`, the encoder in its precision; returns the pipeline.

        Call it on the device where sampling happens. The networks are copied, and the pipeline's own stay as they are.
        The first call of each batch size compiles, for ten seconds to minutes; guiders and callbacks are refused.

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

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict:
        """A run folder's index, its classes sought where no others are, whatever modules it names."""
        config = super().load_config(*args, **kwargs)
        return config | {name: [components.__name__, config[name][1]] for name in CONFIGS}

    def register_to_config(self, **components) -> None:
        """Components by the address that run folders name, see `semantica.pipelines.runfolder.address`."""
        named = {k: address(*v) if isinstance(v, tuple) and v[0] else v for k, v in components.items()}
        super().register_to_config(**named)

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
        made = encodings(encoder, placed(prepared, device, encoder.dtype))
        return placed(made, device, self.unet.dtype)

    def prepare(self, inputs: Any) -> dict[str, Prepared]:
        return prepare(self.encoder, inputs)

    def condition(self, prepared: dict[str, Prepared]) -> Condition:
        condition = self.unet.condition(fill(self.unet.stream_names, self.encodings(prepared)))
        # without any condition there is one embedding for all
        return condition if self.unet.stream_names else condition.repeat(samples_in(prepared))

    def array(self, values: Any) -> Tensor:
        """On the device; the solver's sums keep their digits whatever the network computes in."""
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        return torch.as_tensor(values).to(self._execution_device, dtype)

    __call__ = torch.no_grad()(VariationPipeline.__call__)

    @contextmanager
    def watched(self, settings: Sampling, callback: Callable | None) -> Iterator[Callable | None]:
        """With diffusers' progress bar, where the denoiser lets its steps be seen."""
        if callback is None and "steps" in self.denoiser.refuses:
            yield None
            return
        # callbacks read the run's timesteps there
        self.scheduler.set_timesteps(settings.steps, device=self._execution_device)
        with self.progress_bar(total=settings.steps) as progress, super().watched(settings, callback) as call:

            def on_step(i: int, z: Tensor) -> Tensor:
                progress.update()
                return z if call is None else call(i, z)

            yield on_step
        self.maybe_free_model_hooks()
