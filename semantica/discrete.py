"""Noise schedules of a thousand timesteps, as Stable Diffusion and its kin were trained with; numpy only.

Notation as in `semantica.solvers`: alpha_t^2 is the running product of 1 - beta (`alphas_cumprod`), and log-SNR
lambda_t = log(alpha_t^2 / (1 - alpha_t^2)) falls with the timestep t, an integer from 0 (clean) up.
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from semantica.errors import UserError
from semantica.solvers import Schedule

CLASS = "DiscreteSchedule"
PREDICTIONS = ("epsilon", "v_prediction")
BETAS = ("scaled_linear", "linear")
SPACINGS = (None, "leading", "trailing", "linspace")
# what schedulers of diffusers may have set that is not known here: how they run, and how a model was trained, such as
# on levels that are no products of betas: EDM's, and those of flow matching
OF_RUNS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "thresholding",
           "clip_sample")  # fmt: skip
OF_TRAINING = ("trained_betas", "use_flow_sigmas", "sigma_min", "sigma_max", "sigma_data", "shift", "snr_shift_scale")
# what diffusers' multistep solvers take for a last alpha^2 of 0, whose log-SNR would be infinite
LEAST = 2.0**-24
# log-SNR of such a level for solvers that diffusers gives the 0 itself: alpha is 2e-9
DARK = -40.0


@dataclass(frozen=True)
class DiscreteSchedule:
    """Noise levels by timestep, and which of them a run visits; in place of a `semantica.solvers.Schedule`.

    image_size: side of what is sampled (of latents). prediction: what the network gives, "epsilon" or "v_prediction".
    betas: "scaled_linear" (linear in the root of beta) or "linear", from `beta_start` to `beta_end`, so many.
    zero_snr: betas rescaled so that the last timestep holds no signal (Lin et al., arXiv 2305.08891, algorithm 1).
    spacing, offset: of a run's timesteps (that paper's table 2), as diffusers' `timestep_spacing`, `steps_offset`;
        None is what diffusers does by default: "linspace" in multistep solvers, "leading" in others.
    clean: the last step ends at the clean image, not at timestep 0 (`set_alpha_to_one`); DPM-Solver++ always does.
    solver: a name in `semantica.solvers.SOLVERS`; diffusers spaces the timesteps of its multistep solvers otherwise.

    Raises:
        UserError: an unknown name, or impossible betas.
    """

    image_size: int
    prediction: str = "epsilon"
    betas: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    count: int = 1000
    zero_snr: bool = False
    spacing: str | None = None
    offset: int = 0
    clean: bool = True
    solver: str = "dpmpp_2m"

    def __post_init__(self):
        for name, known in (("prediction", PREDICTIONS), ("betas", BETAS), ("spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"noise schedule: {name} {getattr(self, name)!r} is none of {', '.join(filter(None, known))}"
                )
        numbers = (self.beta_start, self.beta_end, self.count, self.offset)
        if not all(isinstance(n, int | float) for n in numbers) or int(self.count) != self.count:
            raise UserError(f"noise schedule: betas, their number and the offset are {numbers}: give numbers")
        if not 0 <= self.offset < self.count:
            raise UserError(f"noise schedule: offset {self.offset} of {self.count} timesteps: give one of them")
        if not 0 < self.beta_start <= self.beta_end < 1 or self.count < 2:
            raise UserError(f"noise schedule: {self.count} betas from {self.beta_start} to {self.beta_end} are none")
        if self.zero_snr and self.prediction == "epsilon":
            raise UserError("noise schedule: the noise of a level without signal says nothing: it needs v_prediction")

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], image_size: int, solver: str = "dpmpp_2m") -> "DiscreteSchedule":
        """That of a scheduler of diffusers by its configuration, whichever of them it is.

        Raises:
            UserError: it prescribes betas, levels or predictions that are not known here.
        """
        for names, instead in ((OF_RUNS, "set it to false there for runs without it"), (OF_TRAINING, "use diffusers")):
            for name in names:
                if config.get(name):
                    kind = config.get("_class_name", "")
                    raise UserError(f"scheduler {kind} has {name} set: this is not known here; {instead}")
        names = {
            "prediction": "prediction_type",
            "betas": "beta_schedule",
            "beta_start": "beta_start",
            "beta_end": "beta_end",
            "count": "num_train_timesteps",
            "zero_snr": "rescale_betas_zero_snr",
            "spacing": "timestep_spacing",
            "offset": "steps_offset",
            "clean": "set_alpha_to_one",
        }
        # what a loaded scheduler filled in itself is left out, as `from_config` of another one does
        filled = config.get("_use_default_values") or ()
        known = {f: config[name] for f, name in names.items() if name not in filled and config.get(name) is not None}
        return cls(image_size, solver=solver, **known)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "DiscreteSchedule":
        """From what `config` gave; what is there besides is left."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})

    @property
    def config(self) -> dict[str, Any]:
        """Plain values, with a name to be known by, and no thresholding: latents have no bounds."""
        return {"class": CLASS, **asdict(self), "thresholding": "none"}

    @functools.cached_property
    def levels(self) -> np.ndarray:
        """Log-SNR of each timestep, float64 `[count]`, falling."""
        root = self.betas == "scaled_linear"
        ends = (self.beta_start**0.5, self.beta_end**0.5) if root else (self.beta_start, self.beta_end)
        betas = np.linspace(*ends, self.count) ** (2 if root else 1)
        signal = np.cumprod(1 - betas)
        if self.zero_snr:
            alpha = np.sqrt(signal)
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            signal = np.maximum(alpha**2, LEAST)
        return np.log(signal) - np.log1p(-signal)

    def timesteps(self, steps: int) -> np.ndarray:
        """Those that a run visits, falling integers `[steps]`.

        Raises:
            UserError: there are not as many.
        """
        multistep, last = self.solver == "dpmpp_2m", self.count - 1
        # the multistep solvers of diffusers count the end of the run among the timesteps
        points = steps + 1 if multistep else steps
        if not 1 <= steps <= last // 2:
            raise UserError(f"{steps} sampling steps of {self.count} timesteps: give 1 to {last // 2}")
        spacing = self.spacing or ("linspace" if multistep else "leading")
        if spacing == "linspace":
            found = np.linspace(0, last, points).round() if points > 1 else np.zeros(1)
        elif spacing == "leading":
            found = np.minimum(np.arange(points) * (self.count // points) + self.offset, last)
        else:
            found = np.arange(self.count, 0, -self.count / steps).round()[::-1] - 1
        return found[::-1][:steps].astype(np.int64)

    def grid(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and log-SNRs of a run of n steps, two float64 arrays `[n + 1]`, as `Schedule.grid`.

        Raises:
            UserError: as `timesteps`.
        """
        visited = self.timesteps(steps)
        levels, end, multistep = self.levels[visited], self.levels[0], self.solver == "dpmpp_2m"
        if self.zero_snr and not multistep and visited[0] == self.count - 1:
            levels[0] = DARK
        # a step from the last timestep to itself would be none
        if self.clean or multistep or not end > levels[-1]:
            end = np.inf
        return np.append(visited, 0.0).astype(np.float64), np.append(levels, end)


def schedule_of(config: Mapping[str, Any]) -> Schedule | DiscreteSchedule:
    """The schedule in the configuration of a model's scheduler, of either kind."""
    return DiscreteSchedule.of(config) if config.get("class") == CLASS else Schedule.of(config)
