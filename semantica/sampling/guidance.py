"""diffusers' guiders in the sampling loop."""

import torch
from diffusers.guiders import BaseGuidance
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor

from semantica.condition import Condition
from semantica.device import sent
from semantica.model.layers import TransformerBlock
from semantica.sampling.loop import Denoiser, Predict
from semantica.sampling.settings import Sampling

# lets guiders that weaken a model by skipping blocks (autoguidance, skip-layer guidance) find ours
TransformerBlockRegistry.register(TransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class Guided:
    """`semantica.sampling.loop.Guidance` by any guider of diffusers.

    Args:
        guider: its conditional branch gets the condition, its other branch the null one; it may change the model.
    """

    needs = ("module",)

    def __init__(self, guider: BaseGuidance):
        self.guider = guider

    def predictor(
        self, denoiser: Denoiser, levels: Tensor, condition: Condition, null: Condition, settings: Sampling
    ) -> Predict:
        """See `semantica.sampling.loop.Guidance`."""
        guider, count = self.guider, settings.steps
        module = getattr(denoiser, "module", denoiser)
        times = sent(torch.tensor([1 - i / count for i in range(count)], dtype=levels.dtype), levels.device)

        def predict(i: int, z: Tensor) -> Tensor:
            guider.set_state(step=i, num_inference_steps=count, timestep=times[i])
            branches = guider.prepare_inputs({"condition": (condition, null)})
            for branch in branches:
                guider.prepare_models(module)
                branch.noise_pred = denoiser(z, levels[i], branch.condition)
                guider.cleanup_models(module)
            return guider(branches).pred

        return predict
