"""The samplers of `semantica.solvers` behind diffusers' scheduler interface: continuous time, v-prediction."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from semantica import diffusion, solvers
from semantica.device import sent
from semantica.errors import UserError


@dataclass
class SemanticaSchedulerOutput(SchedulerOutput):
    """prev_sample [B, C, S, S]: the next z; pred_original_sample: the predicted clean image after thresholding."""

    pred_original_sample: Tensor | None = None


class SemanticaScheduler(SchedulerMixin, ConfigMixin):
    """Shifted cosine schedule with any solver of `semantica.solvers.SOLVERS`.

    `timesteps` are times t in (0, 1], float32, `logsnrs` the log-SNRs at them, which is what the network is fed. A run
    is `set_timesteps`, then one `step` for each timestep in order; the step count and the previous prediction of the
    multistep solver live here until the next `set_timesteps`.

    image_size, reference, logsnr_min, logsnr_max: see `semantica.solvers.Schedule`.
    solver: a name in `semantica.solvers.SOLVERS`.
    thresholding, clip_range, dynamic_thresholding_ratio: kind, clip_range, ratio of `semantica.solvers.threshold`.
    Raises `UserError` for an unknown solver or thresholding and for impossible schedules.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        image_size: int,
        reference: int = 64,
        logsnr_min: float = -15.0,
        logsnr_max: float = 15.0,
        solver: str = "dpmpp_2m",
        thresholding: str = "clip",
        clip_range: float = 1.0,
        dynamic_thresholding_ratio: float = 0.995,
    ):
        solvers.check_solver(solver)
        solvers.check_thresholding(thresholding)
        self.schedule = solvers.Schedule(image_size, reference, logsnr_min, logsnr_max)
        self.plan: solvers.Plan | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = self.logsnrs = torch.empty(0)

    def __len__(self) -> int:
        """Steps of the current run; 0 before `set_timesteps`."""
        return len(self.timesteps)

    def __bool__(self) -> bool:
        # a length of 0 must not make a fresh scheduler look like a missing one
        return True

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Start a run of n steps: fill `timesteps` and `logsnrs`, float32 [n] on `device`, and forget the run before.

        Times are uniform from 1; the last step, from t = 1/n, ends at the clean image (`Schedule.grid`).
        Raises `UserError` for n < 1.
        """
        t, logsnrs = self.schedule.grid(num_inference_steps)
        self.plan = solvers.make_plan(self.config.solver, logsnrs)
        self.num_inference_steps = num_inference_steps
        place = torch.device(device or "cpu")
        self.timesteps, self.logsnrs = (sent(torch.from_numpy(a[:-1].astype(np.float32)), place) for a in (t, logsnrs))
        self._times = t
        self._index = 0
        self._x_previous = None

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: variance-preserving inputs need no scaling."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SemanticaSchedulerOutput | tuple[Tensor, Tensor]:
        """Next z from the network's velocity.

        model_output, sample: [B, C, S, S]; the result has the sample's dtype, the arithmetic is at least float32.
        timestep: `timesteps[i]` of the i-th call; a value on a device is trusted, not read, so nothing waits for it.
        generator: source of the "ddpm" solver's noise. Raises `UserError` when `set_timesteps` has not been called
        since the last run, or when a timestep that is on the host is not the one whose turn it is.
        """
        if self.plan is None or self._index == len(self.plan):
            raise UserError(f"the scheduler has no step left of {len(self)}: call set_timesteps before each run")
        i, plan, config = self._index, self.plan, self.config
        if not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
            expected = self._times[i]
            if abs(float(timestep) - expected) > 1e-6:
                raise UserError(f"step {i} starts at timestep {expected:g}, got {timestep}: pass timesteps in order")
        dtype = torch.promote_types(sample.dtype, torch.float32)
        z = sample.to(dtype)
        x = solvers.predict_x(plan, i, z, model_output.to(dtype))
        x = solvers.threshold(x, config.thresholding, config.clip_range, config.dynamic_thresholding_ratio)
        noise = None
        if plan.noise_scale[i]:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
        z = solvers.step(plan, i, z, x, self._x_previous, noise)
        self._index = i + 1
        # kept only where the next step reads it
        self._x_previous = x if plan.x_previous_scale[i + 1 : i + 2].any() else None
        z, x = z.to(sample.dtype), x.to(sample.dtype)
        return SemanticaSchedulerOutput(prev_sample=z, pred_original_sample=x) if return_dict else (z, x)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z at times `timesteps` [B] in [0, 1] of clean images [B, ...] and standard normal noise, in their dtype."""
        logsnr = diffusion.noise_levels(timesteps, self.schedule).to(original_samples.device)
        return diffusion.add_noise(original_samples, noise, logsnr).to(original_samples.dtype)
