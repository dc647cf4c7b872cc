"""The pipeline: condition images in, variations out."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from semantica.condition import Condition, Stream
from semantica.errors import UserError
from semantica.images import to_uint8
from semantica.inputs import SINGLE, Prepared, samples_in
from semantica.model.conditioner import Conditioner, encodings, fill, placed, prepare
from semantica.model.image_encoder import ImageEncoder
from semantica.model.uvit import UViT
from semantica.pipelines import components
from semantica.pipelines.runfolder import CONFIGS, PATTERNS, address, check_run
from semantica.sampling.guided import denoise
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.solvers import make_plan

if TYPE_CHECKING:
    from semantica.pipelines.bundle import BundlePipeline

OUTPUTS = ("pil", "np", "pt")


class SemanticaPipeline(DiffusionPipeline):
    """Image variations (arXiv 2405.14857): encode the condition once, denoise with cross-attention to it.

    Args:
        unet: the denoiser.
        encoder: turns condition pictures into tokens of every stream, or a `Conditioner` with an encoder for each.
        scheduler: noise schedule and solver.
    """

    model_cpu_offload_seq = "encoder->unet"
    _callback_tensor_inputs = ["latents"]

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
        """Sample faster from now on: through a `FastSampler`, the encoder in the same precision; returns the pipeline.

        Call it on the device where sampling happens. The networks are copied, and the pipeline's own stay as they are.
        The first call of each batch size compiles, for ten seconds to minutes; guiders and callbacks are refused.

        Args:
            dtype: of weights and activations; by default bf16 where the processor has instructions for it, else fp32.
            compile, graphs: see `semantica.sampling.compiled.FastSampler`.
        """
        from semantica.sampling.compiled import FastSampler

        sampler = FastSampler(self.unet, dtype, compile, graphs)
        encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        # the method of modules: that of diffusers warns about casts
        self._fast = sampler, torch.nn.Module.to(encoder, sampler.denoiser.dtype)
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

    @torch.no_grad()
    def encode(self, inputs: Any) -> Stream | dict[str, Stream]:
        """What the encoder makes of condition pictures, to be given instead of them; of a `Conditioner`, by stream.

        Args:
            inputs: as `semantica.model.conditioner.prepare` takes them: a picture, a list of pictures (one sample each;
                a nested list is several pictures for one sample), a tensor `[B, 3, S, S]` in [-1, 1]
                (`[B, K, 3, S, S]` for K pictures in each sample), or a stream that was encoded before; of a
                `Conditioner`, `{stream name: such values}`.
        """
        made = self.encodings(prepare(self.encoder, inputs))
        return made if isinstance(self.encoder, Conditioner) else made[SINGLE]

    def encodings(self, prepared: dict[str, Prepared]) -> dict[str, Stream]:
        """Prepared inputs to streams in the type that the network reads, also where the encoder is a faster copy."""
        encoder, device = self.encoder if self._fast is None else self._fast[1], self._execution_device
        made = encodings(encoder, placed(prepared, device, encoder.dtype))
        return placed(made, device, self.unet.dtype)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SemanticaPipeline", int, Tensor, dict], dict] | None = None,
        guider: BaseGuidance | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make variations.

        Args:
            image: see `encode`.
            num_images_per_prompt: variations of each sample; they follow one another in the result.
            num_inference_steps: sampling steps.
            guidance_scale: classifier-free guidance, uncond + scale * (cond - uncond); 1 = off.
            generator: source of the noise (one, or one per output image).
            latents: `[B * num_images_per_prompt, 3, S, S]` starting noise instead of drawing it.
            output_type: "pil", "np" (`[B, S, S, 3]` in [0, 1]) or "pt" (`[B, 3, S, S]` in [0, 1]).
            return_dict: False gives a plain tuple.
            callback_on_step_end: `(pipeline, step, timestep, {"latents": z}) -> dict`, may replace the latents.
            guider: any guider of diffusers (interval, autoguidance, ...) instead of `guidance_scale`.

        Raises:
            UserError: impossible numbers, or latents of the wrong shape; a guider, a callback or another device than
                before on an accelerated pipeline.
        """
        if output_type not in OUTPUTS:
            raise UserError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUTS)}")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt={num_images_per_prompt} must be at least 1")
        if self._fast is not None:
            if guider is not None or callback_on_step_end is not None:
                raise UserError("an accelerated pipeline takes no guider and no callback: load it again without")
            if self._fast[0].device != self.unet.device:
                raise UserError(f"accelerated on {self._fast[0].device}, now on {self.unet.device}: accelerate again")
        prepared = prepare(self.encoder, image)
        condition = self.unet.condition(fill(self.unet.stream_names, self.encodings(prepared)))
        batch = samples_in(prepared) * num_images_per_prompt
        condition = condition.repeat(num_images_per_prompt) if self.unet.stream_names else condition
        size, device = self.unet.config.image_size, self._execution_device
        shape = (batch, self.unet.config.in_channels, size, size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise UserError(f"latents have shape {tuple(latents.shape)}: expected {list(shape)}")
        # the solver's sums keep their digits whatever the network computes in
        z = latents.to(device, torch.promote_types(self.unet.dtype, torch.float32))
        null = self.unet.null(batch)
        if self._fast is not None:
            z = self._denoise_fast(z, condition, null, num_inference_steps, guidance_scale, generator)
            images = finish(z, output_type)
            return ImagePipelineOutput(images=images) if return_dict else (images,)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        guider = guider if guider is not None else make_guider(guidance_scale)
        with self.progress_bar(total=num_inference_steps) as progress:

            def on_step(i: int, timestep: Tensor, z: Tensor) -> Tensor:
                progress.update()
                if callback_on_step_end is not None:
                    z = callback_on_step_end(self, i, timestep, {"latents": z}).get("latents", z)
                return z

            z = denoise(self.unet, self.scheduler, guider, z, condition, null, generator, on_step)
        images = finish(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise_fast(
        self, z: Tensor, condition: Condition, null: Condition, steps: int, guidance: float, generator
    ) -> Tensor:
        config = self.scheduler.config
        plan = make_plan(config.solver, self.scheduler.schedule.grid(steps)[1])
        settings = config.thresholding, config.clip_range, config.dynamic_thresholding_ratio

        def fresh(step: int) -> Tensor:
            return randn_tensor(z.shape, generator=generator, device=z.device, dtype=z.dtype)

        noise = fresh if plan.noise_scale.any() else None
        return self._fast[0](z, condition, null, plan, guidance, (0.0, 1.0), *settings, noise)


def make_guider(scale: float) -> ClassifierFreeGuidance:
    """diffusers' classifier-free guidance without its notice that guiders are new."""
    logger = logging.get_logger("diffusers.guiders.guider_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return ClassifierFreeGuidance(guidance_scale=scale)
    finally:
        logger.setLevel(level)


def finish(z: Tensor, output_type: str):
    """Images `[B, 3, S, S]` around [-1, 1] in the form that was asked for."""
    if output_type == "pil":
        return [Image.fromarray(array) for array in to_uint8(z)]
    unit = ((z.float() + 1) / 2).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
