"""Pictures edited by a pipeline: its encoders, its denoiser and, where it samples latents, its autoencoder."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from semantica.device import current, pick_precision
from semantica.discrete import schedule_of
from semantica.editing.scores import Editing, edit
from semantica.images import fit, to_tensor, to_uint8
from semantica.inputs import samples_in
from semantica.pipelines.networks import NetworkPipeline


def edit_pictures(
    pipeline: NetworkPipeline,
    pictures: Sequence[Image.Image],
    inputs: Any,
    settings: Editing,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> np.ndarray:
    """Edit pictures by a pipeline's denoiser, its parameters frozen.

    Args:
        pictures: B of them; of each the square in its middle.
        inputs: conditions of 2 B samples as `semantica.inputs.prepare_inputs` takes them: what each picture shows, then
            what each shall show.
        on_step: see `semantica.editing.scores.edit`.

    Returns:
        uint8 `[B, side, side, 3]`.

    Raises:
        UserError: as `semantica.editing.scores.edit`, or inputs that the pipeline does not take.
    """
    with torch.no_grad(), current(torch.device(pipeline.denoiser.device)):
        prepared, count = pipeline.prepare(inputs), len(pictures)
        assert samples_in(prepared) == 2 * count
        # both at once, so that texts are as long as each other
        both = pipeline.condition(prepared)
        source, target = both.map(lambda array: array[:count]), both.map(lambda array: array[count:])
        x = pipeline.encoded(pipeline.array(to_tensor([fit(picture, pipeline.side) for picture in pictures])))
        schedule = schedule_of(pipeline.scheduler_config)
        z = edit(pipeline.denoiser, x, source, target, None, schedule, settings, on_step)
        return to_uint8(pipeline.decode(z))


def in_precision(pipeline: NetworkPipeline, name: str) -> None:
    """Let a pipeline's denoiser compute in a type; what is sampled, encoders and autoencoder stay in fp32.

    name: of `semantica.device.pick_precision`; "auto" is fp32 on a CPU.
    """
    unet, device = pipeline.unet, torch.device(pipeline.denoiser.device)
    dtype = torch.float32 if name == "auto" and device.type == "cpu" else pick_precision(name, device)
    if dtype != unet.dtype:
        # its noise levels stay fp32
        pipeline.unet = unet.in_precision(dtype) if hasattr(unet, "in_precision") else nn.Module.to(unet, dtype)
