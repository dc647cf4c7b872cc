"""What a run carries from step to step: weights, averaged weights, optimizer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from semantica.train.config import TrainConfig, ema_decay, learning_rate
from semantica.train.sharding import is_sharded, local, twins

SLOTS = ("step", "exp_avg", "exp_avg_sq")
# what a scaler knows, by the name in a checkpoint: the scale, and the steps since it last changed
SCALE = {"scale": "scale", "steps": "_growth_tracker"}


def split(parameters: list[Tensor], weight_decay: float, times: float) -> list[dict]:
    """Groups of an optimizer, of a rate so many times the run's. Norms, biases and tokens are not pulled to zero."""
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay, "times": times},
        {"params": vectors, "weight_decay": 0.0, "times": times},
    ]


class TrainState:
    """Modules in training, their exponential moving averages, and AdamW.

    Args:
        modules: name -> module; one without trainable parameters is left out.
        scaler: of the loss, whose scale is part of the state; for fp16.
        copies: gives so many copies of a module for its averages, see `semantica.train.sharding`, and may split them
            and the module among the processes; moments follow.

    Attributes:
        averages: for each decay, `--ema` first, the averages by name of their module. ema: those of `--ema`.
    """

    def __init__(
        self,
        config: TrainConfig,
        modules: dict[str, nn.Module],
        scaler: torch.amp.GradScaler | None = None,
        copies: Callable[[nn.Module, int], list[nn.Module]] = twins,
    ):
        self.config, self.step, self.scaler = config, 0, scaler
        self.trained = {n: m for n, m in modules.items() if any(p.requires_grad for p in m.parameters())}
        decays = (config.ema, *config.ema_also)
        made = {name: copies(module, len(decays)) for name, module in self.trained.items()}
        self.averages = {
            decay: {name: modules[number] for name, modules in made.items()} for number, decay in enumerate(decays)
        }
        self.ema = self.averages[config.ema]
        self.parameters = {
            f"{name}.{key}": p
            for name, module in self.trained.items()
            for key, p in module.named_parameters()
            if p.requires_grad
        }
        own = config.encoder_lr is not None
        encoder = [p for key, p in self.parameters.items() if own and key.startswith("encoder.")]
        others = [p for key, p in self.parameters.items() if not (own and key.startswith("encoder."))]
        # what a group's rate is a multiple of the others' by
        groups = [*split(others, config.weight_decay, 1.0)]
        groups += split(encoder, config.weight_decay, config.encoder_lr / config.lr) if encoder else []
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self._averages = {decay: self._in_order(modules) for decay, modules in self.averages.items()}

    def _in_order(self, modules: dict[str, nn.Module]) -> list[Tensor]:
        """The averages of what is trained, in its order."""
        averaged = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}
        return [averaged[key] for key in self.parameters]

    def update(self) -> Tensor:
        """Clip, step, average; returns the gradient's norm before clipping, still on the device.

        With a scaler a step whose gradients are not all finite changes no weight and no moment: averages come nearer
        to the weights as in any step, and the scale falls.
        """
        parameters = list(self.parameters.values())
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step) * group["times"]
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        # a recorded step adds to gradients where they are
        self.optimizer.zero_grad(set_to_none=not self.config.graph)
        with torch.no_grad():
            current = [local(p) for p in parameters]
            for decay, averages in self._averages.items():
                weight = 1 - ema_decay(self.config, self.step, decay)
                torch._foreach_lerp_([local(p) for p in averages], current, weight)
        self.step += 1
        return norm.full_tensor() if is_sharded(norm) else norm

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save: `NAME/KEY` -> tensor, where NAME is a file of the checkpoint."""
        modules = {**self.trained}
        for number, (decay, averages) in enumerate(self.averages.items()):
            # a point would end the name of a file
            which = f"ema_{decay}_".replace(".", "_") if number else "ema_"
            modules |= {f"{which}{name}": module for name, module in averages.items()}
        tensors = {f"{name}/{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
        for key, parameter in self.parameters.items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}.{slot}"] = value
        if self.scaler is not None:
            kept = self.scaler.state_dict()
            tensors |= {f"scaler/{name}": torch.tensor(kept[key], dtype=torch.float64) for name, key in SCALE.items()}
        return tensors

    def resumed(self, step: int, tensors: dict[str, Tensor]) -> None:
        """After what `prepare` gave was filled from a checkpoint."""
        self.step = step
        if self.scaler is not None:
            kept = {key: tensors[f"scaler/{name}"].item() for name, key in SCALE.items()}
            kept["_growth_tracker"] = int(kept["_growth_tracker"])
            self.scaler.load_state_dict({**self.scaler.state_dict(), **kept})

    def prepare(self, keys: set[str]) -> dict[str, Tensor]:
        """The tensors to fill from a checkpoint that has these keys; AdamW gets its moments."""
        for key, parameter in self.parameters.items():
            # a parameter that no gradient ever reached has none
            if f"optimizer/{key}.step" in keys:
                # the fused step walks memory: moments need their parameter's strides, which files do not keep
                moments = [torch.zeros_like(parameter, requires_grad=False) for _ in range(2)]
                step = torch.zeros((), device=parameter.device)
                self.optimizer.state[parameter] = dict(zip(SLOTS, (step, *moments)))
        return self.tensors()
