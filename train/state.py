"""What a run carries from step to step: weights, averaged weights, optimizer."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from semantica.train.config import TrainConfig, ema_decay, learning_rate
from semantica.train.sharding import is_sharded, local

SLOTS = ("step", "exp_avg", "exp_avg_sq")


class TrainState:
    """Modules in training, their exponential moving averages, and AdamW.

    Args:
        modules: name -> module; one without trainable parameters is left out.
        shard: splits a module among the processes in place, see `semantica.train.sharding`; averages and moments
            follow. None leaves everything whole.
    """

    def __init__(
        self, config: TrainConfig, modules: dict[str, nn.Module], shard: Callable[[nn.Module], None] | None = None
    ):
        self.config, self.step = config, 0
        self.trained = {n: m for n, m in modules.items() if any(p.requires_grad for p in m.parameters())}
        self.ema = {n: copy.deepcopy(m).requires_grad_(False).eval() for n, m in self.trained.items()}
        for module in (*self.trained.values(), *self.ema.values()) if shard else ():
            shard(module)
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
        # a recorded step adds to gradients where they are
        self.optimizer.zero_grad(set_to_none=not self.config.graph)
        with torch.no_grad():
            averages, current = ([local(p) for p in ps] for ps in (self._averages, parameters))
            torch._foreach_lerp_(averages, current, 1 - ema_decay(self.config, self.step))
        self.step += 1
        return norm.full_tensor() if is_sharded(norm) else norm

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save: `NAME/KEY` -> tensor, where NAME is a file of the checkpoint."""
        modules = {**self.trained, **{f"ema_{name}": module for name, module in self.ema.items()}}
        tensors = {f"{name}/{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
        for key, parameter in self.parameters.items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}.{slot}"] = value
        return tensors

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
