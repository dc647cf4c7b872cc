"""For `kernelize` of Hugging Face's `kernels`: our GroupNorm as the layer that a mapping names, from this package.

    replace_kernel_forward_from_hub(torch.nn.GroupNorm, "GroupNorm")
    with use_kernel_mapping(semantica.fused.hub.MAPPING): kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE)

diffusers marks none of its norms, hence the first line. `kernelize` exchanges one forward for another of the same
arguments, so that the SiLU and time embedding around a norm, and cross-attention, stay outside: `semantica.accelerate`
takes them in.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from semantica.kernels import group_norm


class GroupNorm(nn.Module):
    """The forward of `nn.GroupNorm`; stateless, as `kernelize` asks of a layer."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None:
            return F.group_norm(input, self.num_groups, eps=self.eps)
        return group_norm(input, self.num_groups, self.weight, self.bias, activation="none", eps=self.eps)


@dataclass(frozen=True)
class Installed:
    """A layer of this installed package, in the form of `kernels`' repositories; nothing is downloaded."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return globals()[self.layer_name]


# layer name -> kind of device -> where it comes from
MAPPING = {"GroupNorm": dict.fromkeys(("cpu", "cuda"), Installed("GroupNorm"))}
