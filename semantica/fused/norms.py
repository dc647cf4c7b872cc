"""GroupNorms of diffusers' models on the fused operator: same class for `isinstance`, same parameters and names."""

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from semantica.kernels import group_norm


class FusedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` by `semantica.kernels.group_norm`; channels-last stays channels-last."""

    activation = "none"

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, addend: Tensor | None = None
    ) -> Tensor:
        """`x [B, C, *spatial]`; `scale`, `shift`, `addend` `[B, C]`: see `semantica.kernels.group_norm`."""
        affine = self.weight, self.bias
        return group_norm(x, self.num_groups, *affine, scale, shift, self.activation, self.eps, addend)


class FusedGroupNormSiLU(FusedGroupNorm):
    """A GroupNorm with the SiLU that follows it."""

    activation = "silu"


class AbsorbedSiLU(nn.SiLU):
    """The SiLU that the norm before it has taken over: nothing is left to do."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block whose norms apply SiLU and the time embedding: no pass over the activations of their own.

    The embedding is an addend of the second norm (`time_embedding_norm="default"`) or its FiLM (`"scale_shift"`).
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        shortcut, hidden = input_tensor, self.norm1(input_tensor)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            shortcut, hidden = resample(shortcut), resample(hidden)
        hidden = self.conv2(self.dropout(self.norm2(self.conv1(hidden), **self.modulation(temb))))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        sum_ = shortcut + hidden
        return sum_ if self.output_scale_factor == 1 else sum_ / self.output_scale_factor

    def modulation(self, temb: Tensor | None) -> dict[str, Tensor]:
        """What the time embedding does in the second norm.

        Raises:
            ValueError: a block with FiLM gets no embedding.
        """
        if self.time_emb_proj is not None and temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError("this residual block needs a time embedding: temb is None")
            scale, shift = torch.chunk(temb, 2, dim=1)
            return {"scale": scale, "shift": shift}
        return {} if temb is None else {"addend": temb}
