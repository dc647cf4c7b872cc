"""What a run carries from step to step: weights, averaged weights, optimizer."""

import copy

import torch
from torch import Tensor, nn

from semantica.errors import UserError
from semantica.train.config import TrainConfig, ema_decay, learning_rate


class TrainState:
    """Modules in training, their exponential moving averages, and AdamW.

    Args:
        modules: name -> module; one without trainable parameters is left out.
    """

    def __init__(self, config: TrainConfig, modules: dict[str, nn.Module]):
        self.config, self.step = config, 0
        self.trained = {n: m for n, m in modules.items() if any(p.requires_grad for p in m.parameters())}
        self.ema = {n: copy.deepcopy(m).requires_grad_(False).eval() for n, m in self.trained.items()}
        self.parameters = {
            f"{name}.{key}": p
            for name, module in self.trained.items()
            for key, p in module.named_parameters()
            if p.requires_grad
        }
        # norms, biases and tokens are not pulled to zero
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        vectors = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        averaged = {f"{name}.{key}": p for name, module in self.ema.items() for key, p in module.named_parameters()}
        self._averages = [averaged[key] for key in self.parameters]

    def update(self) -> Tensor:
        """Clip, step, average; returns the gradient's norm before clipping, still on the device."""
        parameters = list(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, parameters, 1 - ema_decay(self.config, self.step))
        self.step += 1
        return norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything to save, as one dict of tensors per file."""
        files = {name: module.state_dict() for name, module in self.trained.items()}
        files |= {f"ema_{name}": module.state_dict() for name, module in self.ema.items()}
        files["optimizer"] = {
            f"{key}.{slot}": value
            for key, parameter in self.parameters.items()
            for slot, value in self.optimizer.state[parameter].items()
        }
        return files

    @property
    def files(self) -> set[str]:
        return {*self.trained, *(f"ema_{name}" for name in self.trained), "optimizer"}

    def load(self, step: int, files: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `tensors` gave.

        Raises:
            UserError: the tensors belong to another model.
        """
        try:
            for name, module in self.trained.items():
                module.load_state_dict(files[name])
                self.ema[name].load_state_dict(files[f"ema_{name}"])
            for key, parameter in self.parameters.items():
                slots = {slot: files["optimizer"][f"{key}.{slot}"] for slot in ("step", "exp_avg", "exp_avg_sq")}
                # the fused step walks memory: moments need their parameter's strides, which files do not keep
                self.optimizer.state[parameter] = {
                    slot: (torch.empty_like(parameter) if value.ndim else torch.empty_like(value)).copy_(value)
                    for slot, value in slots.items()
                }
        except (RuntimeError, KeyError) as error:
            raise UserError("the checkpoint belongs to another model: give the options it was trained with") from error
        self.step = step
