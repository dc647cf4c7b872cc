"""The sampling loop over any denoiser `(z, logsnr, condition) -> v`, with diffusers' guiders."""

from collections.abc import Callable

import torch
from diffusers.guiders import BaseGuidance
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor

from semantica.condition import Condition
from semantica.model.layers import TransformerBlock
from semantica.sampling.scheduler import SemanticaScheduler

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]

# lets guiders that weaken a model by skipping blocks (autoguidance, skip-layer guidance) find ours
TransformerBlockRegistry.register(TransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))


def denoise(
    denoiser: Denoiser,
    scheduler: SemanticaScheduler,
    guider: BaseGuidance,
    z: Tensor,
    condition: Condition,
    null: Condition,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Run the scheduler's steps (`set_timesteps` was called) from noise to images.

    Args:
        denoiser: the network, a compiled network or an engine: predicts v.
        guider: diffusers guider; its conditional branch gets `condition`, its other branch `null`.
        z: `[B, 3, S, S]` standard normal noise.
        condition, null: conditions of batch B.
        generator: for solvers that add noise.
        on_step: called as `(i, timestep, z) -> z` after each step.

    Returns:
        `[B, 3, S, S]`, images around [-1, 1].
    """
    count = len(scheduler)
    for i, timestep in enumerate(scheduler.timesteps):
        guider.set_state(step=i, num_inference_steps=count, timestep=timestep)
        logsnr = scheduler.logsnrs[i].expand(z.shape[0])
        branches = guider.prepare_inputs({"condition": (condition, null)})
        for branch in branches:
            guider.prepare_models(denoiser)
            branch.noise_pred = denoiser(z, logsnr, branch.condition)
            guider.cleanup_models(denoiser)
        v = guider(branches).pred
        z = scheduler.step(v, timestep, z, generator=generator).prev_sample
        if on_step is not None:
            z = on_step(i, timestep, z)
    return z
