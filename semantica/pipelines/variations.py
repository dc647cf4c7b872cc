"""The pipeline: condition images in, variations out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from torch import Tensor

from semantica.model.conditioner import Conditioner
from semantica.model.hub import located
from semantica.model.image_encoder import ImageEncoder
from semantica.model.uvit import UViT
from semantica.pipelines import components
from semantica.pipelines.networks import NetworkPipeline, unsaid
from semantica.pipelines.runfolder import CONFIGS, PATTERNS, address, check_run, readable
from semantica.sampling.scheduler import SemanticaScheduler
from semantica.sampling.settings import Sampling

if TYPE_CHECKING:
    from semantica.pipelines.bundle import BundlePipeline


class SemanticaPipeline(DiffusionPipeline, NetworkPipeline):
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
        self.register_modules(unet=unet, encoder=encoder, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs) -> "SemanticaPipeline":
        """Load a run folder, or a repository of the same layout from the hub (downloaded, then checked).

        Only safetensors and JSON are read, whatever the arguments say.

        Raises:
            UserError: the folder is not a complete pipeline of this package, or could execute code.
        """
        folder = located(source, PATTERNS, kwargs.get("revision"))
        check_run(folder)
        kwargs.update(use_safetensors=True, trust_remote_code=False, local_files_only=True)
        kwargs.pop("custom_pipeline", None)
        shown = logging.is_progress_bar_enabled()
        # three parts that load in milliseconds
        logging.disable_progress_bar()
        try:
            with readable(folder), unsaid():
                pipeline = super().from_pretrained(str(folder), **kwargs)
        finally:
            if shown:
                logging.enable_progress_bar()
        return pipeline.whole(folder, kwargs).aligned()

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

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict:
        """A run folder's index, its classes sought where no others are, whatever modules it names."""
        config = super().load_config(*args, **kwargs)
        return config | {name: [components.__name__, config[name][1]] for name in CONFIGS}

    def register_to_config(self, **components) -> None:
        """Components by the address that run folders name, see `semantica.pipelines.runfolder.address`."""
        named = {k: address(*v) if isinstance(v, tuple) and v[0] else v for k, v in components.items()}
        super().register_to_config(**named)

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
