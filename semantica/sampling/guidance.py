"""diffusers' guiders in the sampling loop, and this package's as guiders of diffusers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn

from semantica.condition import Array, Condition
from semantica.device import sent
from semantica.errors import UserError
from semantica.model.layers import TransformerBlock
from semantica.sampling.guiders import Guider, IndependentCondition, TimeStep, choices, turbulence
from semantica.sampling.loop import Denoiser, Predict, unguided
from semantica.sampling.settings import Sampling
from semantica.weak import Weak

# lets guiders that weaken a model by skipping blocks (autoguidance, skip-layer guidance) find ours
TransformerBlockRegistry.register(TransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
# what embeds the timestep in diffusers' UNets, and the noise level in ours
EMBEDDINGS = ("time_embedding", "embed_noise")


class Guided:
    """`semantica.sampling.loop.Guidance` by any guider of diffusers.

    Args:
        guider: its conditional branch gets the condition, its other branch the null one; it may change the model, and
            then needs one that can be changed.
    """

    def __init__(self, guider: BaseGuidance):
        self.guider = guider
        hooks = (
            getattr(type(guider), name) is getattr(BaseGuidance, name) for name in ("prepare_models", "cleanup_models")
        )
        self.needs = () if all(hooks) else ("module",)

    def predictor(
        self, denoiser: Denoiser, levels: Array, condition: Condition, weak: Weak, settings: Sampling
    ) -> Predict:
        """See `semantica.sampling.loop.Guidance`."""
        null = weak.condition
        guider, count = self.guider, settings.steps
        module = getattr(denoiser, "module", denoiser)
        times = torch.tensor([1 - i / count for i in range(count)], dtype=torch.float32)
        whole = isinstance(levels, np.ndarray)
        times = times if whole else sent(times.to(levels.dtype), levels.device)
        # conditions as the denoiser reads them, made once
        made = {id(c): (c, unguided(denoiser, levels, c, settings)) for c in (condition, null)}

        def velocity(i: int, z: Array, given: Condition) -> Tensor:
            known = made.get(id(given))
            v = (known[1] if known else unguided(denoiser, levels, given, settings))(i, z)
            return torch.from_numpy(v) if whole else v

        def predict(i: int, z: Array) -> Array:
            guider.set_state(step=i, num_inference_steps=count, timestep=times[i])
            branches = guider.prepare_inputs({"condition": (condition, null)})
            for branch in branches:
                guider.prepare_models(module)
                branch.noise_pred = velocity(i, z, branch.condition)
                guider.cleanup_models(module)
            v = guider(branches).pred
            return v.numpy() if whole else v

        return predict


class NativeGuidance(ClassifierFreeGuidance):
    """A guider of diffusers that this package's pipelines run in their own way, on every engine.

    Elsewhere, as in diffusers' modular pipelines, it does the same by what such pipelines offer.
    """

    def native(self, settings: Sampling) -> tuple[Guider, Sampling]:
        """What `semantica.sampling.guiders` calls it, and the settings of a run with its scale and interval."""
        scale = self.guidance_scale if self._enabled else 1.0
        return self.guider, dataclasses.replace(settings, guidance=scale, interval=(self._start, self._stop))

    def other(self, own: Any) -> Any:
        """The weak branch's value of an input, a tensor or a `Condition`, by the other branch's."""
        return own

    def prepare_inputs(self, data: Mapping[str, Any]) -> list:
        """Both branches; pairs of values are the inputs that branches may differ in."""
        return self.weakened(super().prepare_inputs(data), data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping[str, Any]) -> list:
        """As `prepare_inputs`, the fields by their names in `data`."""
        return self.weakened(super().prepare_inputs_from_block_state(data, input_fields), input_fields)

    def weakened(self, branches: list, fields: Mapping[str, Any]) -> list:
        for name in (name for name, value in fields.items() if isinstance(value, tuple)):
            own = getattr(branches[0], name, None)
            if len(branches) == 2 and own is not None:
                setattr(branches[1], name, self.other(own))
        return branches


class IndependentConditionGuidance(NativeGuidance):
    """Independent condition guidance, ICG (Sadat et al., arXiv 2407.02687, section 4, algorithm 1).

    D = D(z, yhat) + w (D(z, y) - D(z, yhat)), yhat a random condition that knows nothing of z, drawn in every step: it
    needs no model that was trained with dropped conditions.

    Args:
        guidance_scale: w; in the paper as in classifier-free guidance or a little lower.
        others: what yhat is drawn from, as the pipeline takes its inputs; None for the other samples of the call.
        noise: draw yhat from a Gaussian of the tokens' mean and standard deviation instead.
        seed: of the draws in diffusers' own pipelines; ours have their own.
        start, stop: fractions of the run between which guidance is on.

    Raises:
        UserError: both `others` and `noise`.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]
    ignore_for_config = ["others"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.4,
        others: Any = None,
        noise: bool = False,
        seed: int = 0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale=guidance_scale, start=start, stop=stop, enabled=enabled)
        self.guider, self.seed, self.noise = IndependentCondition(others, noise), seed, noise

    def other(self, own: Any) -> Any:
        """That of another sample of the batch, or Gaussian."""
        count = len(own.emb if isinstance(own, Condition) else own)
        if isinstance(own, Tensor) and self.noise:
            # masks stay what they are
            return gaussian_like(own, (self.seed, self._step)) if own.is_floating_point() else own
        if self.noise or count < 2:
            raise UserError("independent condition guidance of one sample: noise=True, in a pipeline of tensors")
        chosen = [choices(self.seed, i, 0, self._step + 1, count, i)[-1] for i in range(count)]
        return own.map(lambda array: array[chosen]) if isinstance(own, Condition) else own[chosen]


class TimeStepGuidance(NativeGuidance):
    """Time-step guidance, TSG (Sadat et al., arXiv 2407.02687, section 5, algorithm 2).

    D = D(temb') + w (D(temb) - D(temb')), temb' = temb + s t^alpha std(temb) n, n ~ N(0, I) drawn in every step; it
    needs no condition at all.

    Args:
        guidance_scale: w.
        scale, power: s and alpha; power 0 is the paper's constant schedule.
        blocks: only the first so many blocks of each part of a U-ViT see temb'; None for all, and elsewhere.
        seed: of the draws in diffusers' own pipelines; ours have their own.
        start, stop: fractions of the run between which guidance is on.

    Raises:
        UserError: impossible numbers.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 2.5,
        scale: float = 2.0,
        power: float = 1.0,
        blocks: int | None = None,
        seed: int = 0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale=guidance_scale, start=start, stop=stop, enabled=enabled)
        self.guider, self.seed, self.hook = TimeStep(scale, power, blocks), seed, None

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Hook noise to the embedding of the timestep, for the weak branch."""
        super().prepare_models(denoiser)
        if self.is_unconditional and self.num_conditions == 2:
            found = [
                getattr(denoiser, name) for name in EMBEDDINGS if isinstance(getattr(denoiser, name, None), nn.Module)
            ]
            if not found or self.guider.blocks is not None:
                what = "some of its blocks" if found else type(denoiser).__name__
                raise UserError(f"time-step guidance knows no embedding of {what}: use a pipeline of this package")
            self.hook = found[0].register_forward_hook(self.perturb)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Take the hook off."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def perturb(self, module: nn.Module, inputs: tuple, temb: Tensor) -> Tensor:
        steps, width = self._step + 1, temb.shape[-1]
        n = np.stack([turbulence(self.seed, i, 0, steps, width)[-1] for i in range(len(temb))])
        scale = self.guider.strength(self._step, self._num_inference_steps)
        return temb + scale * temb.std(-1, correction=0, keepdim=True) * sent(torch.from_numpy(n), temb.device).to(
            temb.dtype
        )


def gaussian_like(own: Tensor, key: tuple[int, int]) -> Tensor:
    """Normal numbers with each sample's mean and standard deviation, a function of the key."""
    axes = tuple(range(1, own.ndim))
    n = torch.from_numpy(np.random.default_rng(key).standard_normal(own.shape, np.float32))
    return own.mean(axes, keepdim=True) + own.std(axes, keepdim=True) * sent(n, own.device).to(own.dtype)
