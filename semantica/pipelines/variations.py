"""The pipeline: condition images in, variations out."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from semantica.condition import Condition, Stream
from semantica.errors import UserError
from semantica.images import fit, to_tensor
from semantica.model.encoders import PretrainedEncoder, ViTEncoder, encode_images
from semantica.model.uvit import UViT
from semantica.pipelines.base import VariationPipeline
from semantica.runfolder import PATTERNS, check_run
from semantica.sampling.loop import Denoiser
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.sampling.settings import Sampling

if TYPE_CHECKING:
    from semantica.pipelines.bundle import BundlePipeline

# one picture, or several pictures that condition one sample together
Picture = Image.Image | Sequence[Image.Image]


class SemanticaPipeline(DiffusionPipeline, VariationPipeline):
    """Image variations from a run folder (arXiv 2405.14857), a pipeline of diffusers.

    Args:
        unet: the denoiser.
        encoder: turns condition images into tokens.
        scheduler: noise schedule and solver.
    """

    model_cpu_offload_seq = "encoder->unet"
    _callback_tensor_inputs = ["latents"]
    output_class = ImagePipelineOutput

    def __init__(self, unet: UViT, encoder: ViTEncoder | PretrainedEncoder, scheduler: SemanticaScheduler):
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

    @torch.no_grad()
    def encode(self, image: Tensor | Stream | Picture | Sequence[Picture]) -> Stream:
        """Condition images to one stream `[B, M, C]`.

        Args:
            image: a picture, a list of pictures (one sample each; a nested list is several pictures for one sample),
                a tensor `[B, 3, S, S]` in [-1, 1] (`[B, K, 3, S, S]` for K pictures in each sample), or a stream that
                was encoded before.
        """
        if isinstance(image, Stream):
            device, dtype = self._execution_device, self.unet.dtype
            return Stream(image.tokens.to(device, dtype), image.pooled.to(device, dtype), image.lengths)
        encoder = self.encoder if self._fast is None else self._fast[1]
        if isinstance(image, Tensor):
            return self._widened(encode_images(encoder, image.to(self._execution_device, encoder.dtype)))
        samples = [image] if isinstance(image, Image.Image) else list(image)
        samples = [[s] if isinstance(s, Image.Image) else list(s) for s in samples]
        if not samples or not all(samples):
            raise UserError("image is empty: give at least one picture for each sample")
        size = encoder.image_size
        flat = to_tensor([fit(picture.convert("RGB"), size) for sample in samples for picture in sample])
        out = self._widened(encoder(flat.to(self._execution_device, encoder.dtype)))
        counts = [len(sample) for sample in samples]
        if max(counts) == 1:
            return out
        # several pictures are one longer stream; shorter samples are filled up and masked
        per_image = out.tokens.shape[1]
        tokens = [part.flatten(0, 1) for part in out.tokens.split(counts)]
        lengths = torch.tensor([per_image * n for n in counts], device=out.tokens.device)
        pooled = torch.stack([part.mean(0) for part in out.pooled.split(counts)])
        return Stream(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), pooled, lengths)

    def _widened(self, stream: Stream) -> Stream:
        """In the type that the network reads, where the encoder is an accelerated copy."""
        if self._fast is None:
            return stream
        return Stream(stream.tokens.to(self.unet.dtype), stream.pooled.to(self.unet.dtype))

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

    def condition(self, image: Any) -> Condition:
        """Keys, values and embedding of what `encode` takes."""
        stream = self.encode(image)
        condition = self.unet.condition(dict.fromkeys(self.unet.stream_names, stream))
        # without any condition there is one embedding for all
        return condition if self.unet.stream_names else condition.repeat(len(stream.tokens))

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
