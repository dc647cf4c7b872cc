"""The U-ViT rearranged for sampling: the same arithmetic, less of it, in a form that compilers and CPUs like.

What does not depend on z is computed before the first step: keys and values, and the modulations of every block at
every noise level, each weight read once for all steps. Both branches of guidance see the same z, so what comes before
the first cross-attention is computed once for both, and so is what the up path takes from the skips; the null condition
is one token per stream, whose softmax is 1, so that cross-attention to it is a constant. All of this is exact; only
the precision changes results.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from semantica.condition import Condition
from semantica.kernels import cross_attention, group_norm
from semantica.model.layers import GroupNormAct, ResBlock, TransformerBlock, modulate, rotate
from semantica.model.uvit import UViT


@dataclass(frozen=True)
class Branches:
    """A condition prepared for every step of a run.

    keys, values: one `[R, M, H, D]` per transformer block, of the samples that attend; R is B, or 2 B where the
        unconditional branch attends too.
    constants: what cross-attention adds to the unconditional branch, `[B, C]` per block; empty where it attends.
    lengths, sizes: as in `Condition`.
    count: 2 with guidance, else 1.
    shared: whether both branches have the same embedding, so that they part at the first cross-attention only.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    lengths: Tensor | None
    sizes: tuple[int, ...]
    count: int
    shared: bool


torch.export.register_dataclass(Branches)


def normalise(x: Tensor, norm: GroupNormAct, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    return group_norm(x, norm.groups, norm.weight, norm.bias, scale, shift)


def half(norm: GroupNormAct, part: slice) -> GroupNormAct:
    """A norm of half of the channels; a group never straddles, since their number is even."""
    own = copy.deepcopy(norm)
    own.groups //= 2
    own.weight, own.bias = (nn.Parameter(a.detach()[part].clone()) for a in (norm.weight, norm.bias))
    return own


def part_of(conv: nn.Conv2d, part: slice, bias: bool) -> nn.Conv2d:
    """A convolution of some of the input channels."""
    weight = conv.weight.detach()[:, part]
    own = nn.Conv2d(weight.shape[1], weight.shape[0], conv.kernel_size, padding=conv.padding, bias=bias)
    own.weight = nn.Parameter(weight.clone())
    if bias:
        own.bias = nn.Parameter(conv.bias.detach().clone())
    return own


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, b of the same batch or of one branch only."""
    return a + b if a.shape[0] == b.shape[0] else (a.unflatten(0, (-1, b.shape[0])) + b).flatten(0, 1)


class UpBlock(nn.Module):
    """A residual block whose second half of input channels is a skip, convolved apart: one branch's is both's."""

    def __init__(self, block: ResBlock):
        super().__init__()
        width = block.conv1.out_channels
        mine, skip = slice(0, width), slice(width, 2 * width)
        self.norm1, self.norm_skip = half(block.norm1, mine), half(block.norm1, skip)
        self.conv1, self.conv_skip = part_of(block.conv1, mine, True), part_of(block.conv1, skip, False)
        self.shortcut = part_of(block.shortcut, mine, True)
        self.shortcut_skip = part_of(block.shortcut, skip, False)
        self.norm2, self.conv2 = block.norm2, block.conv2

    def forward(self, x: Tensor, skip: Tensor, film: Tensor) -> Tensor:
        h = add(self.conv1(normalise(x, self.norm1)), self.conv_skip(normalise(skip, self.norm_skip)))
        h = self.conv2(normalise(h, self.norm2, *film.chunk(2, -1)))
        return add(self.shortcut(x), self.shortcut_skip(skip)) + h


class DownBlock(nn.Module):
    """A residual block with the modulation given."""

    def __init__(self, block: ResBlock):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        h = self.conv1(normalise(x, self.norm1))
        return x + self.conv2(normalise(h, self.norm2, *film.chunk(2, -1)))


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for `[B, N, H, D]` as two matrix products.

    For CPUs: PyTorch's fused bf16 attention runs at an eighth of their matrix rate where there is no AMX.
    """
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float().softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


class Block(nn.Module):
    """A transformer block with the modulation given, and with the branches parted at cross-attention."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.norm1, self.norm2, self.norm_cross = block.norm1, block.norm2, block.norm_cross
        self.attn, self.cross, self.mlp = block.attn, block.cross, block.mlp

    def forward(self, x: Tensor, film: Tensor, rope: tuple[Tensor, Tensor], keys, values, constant, branches: Branches):
        shift1, scale1, gate1, shift2, scale2, gate2 = film.chunk(6, -1)
        x = x + gate1[:, None] * self.attend_self(modulate(self.norm1(x), shift1, scale1), rope)
        if self.cross is not None:
            rows = keys.shape[0]
            if constant is None:
                x = torch.cat((x, x)) if x.shape[0] < rows else x
                x = x + self.attend_cross(x, keys, values, branches)
            else:
                own, other = x[:rows], x[-rows:]
                own = own + self.attend_cross(own, keys, values, branches)
                x = torch.cat((own, other + constant[:, None]))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def attend_self(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        attn = self.attn
        q, k, v = attn.to_qkv(x).unflatten(-1, (3, attn.heads, -1)).unbind(2)
        q, k = (rotate(norm(a), *rope) for norm, a in ((attn.norm_q, q), (attn.norm_k, k)))
        if x.device.type == "cpu":
            return attn.to_out(products(q, k, v).flatten(2))
        return attn.to_out(dispatch_attention_fn(q, k, v, backend=attn.processor._attention_backend).flatten(2))

    def attend_cross(self, x: Tensor, keys: Tensor, values: Tensor, branches: Branches) -> Tensor:
        cross = self.cross
        q = cross.to_q(self.norm_cross(x)).unflatten(-1, (cross.heads, -1))
        if x.device.type == "cpu" and branches.lengths is None:
            parts = zip(keys.split(branches.sizes, 1), values.split(branches.sizes, 1))
            q = cross.norm_q(q)
            o = sum(products(q, k, v) for k, v in parts)
        else:
            o = cross_attention(q, keys, values, branches.sizes, branches.lengths, q_weight=cross.norm_q.weight)
        return cross.to_out(o.flatten(2))


class FastDenoiser(nn.Module):
    """A `UViT` for sampling: v of both branches, joined by guidance, from prepared conditions and modulations.

    Args:
        unet: is copied; its weights are cast to `dtype`, those of group norms kept in fp32.
        dtype: of weights and activations.
    """

    def __init__(self, unet: UViT, dtype: torch.dtype):
        super().__init__()
        self.config = unet.config
        self.dtype = dtype
        net = copy.deepcopy(unet).eval().requires_grad_(False)
        self.use_tokens, self.use_global = net.use_tokens, net.use_global
        self.embed_noise = net.embed_noise
        self.conv_in, self.downsamplers, self.upsamplers = net.conv_in, net.downsamplers, net.upsamplers
        downs = [block for level in net.down_blocks for block in level]
        ups = [block for level in reversed(net.up_blocks) for block in level]
        self.depths = tuple(len(level) for level in net.down_blocks)
        self.downs, self.ups = nn.ModuleList(map(DownBlock, downs)), nn.ModuleList(map(UpBlock, ups))
        self.blocks = nn.ModuleList(map(Block, net.transformer_blocks))
        self.norm_out, self.conv_out = net.norm_out, net.conv_out
        modulations = [b.film for b in (*downs, *ups)] + [b.modulation for b in net.transformer_blocks]
        self.widths = tuple(m.out_features for m in modulations)
        # one product gives all modulations; in the given precision, since it runs once
        self.modulation = nn.Linear(modulations[0].in_features, sum(self.widths))
        self.modulation.weight = nn.Parameter(torch.cat([m.weight for m in modulations]))
        self.modulation.bias = nn.Parameter(torch.cat([m.bias for m in modulations]))
        self.register_buffer("rope_cos", net.rope_cos, persistent=False)
        self.register_buffer("rope_sin", net.rope_sin, persistent=False)
        keep = {self.embed_noise, self.modulation}
        for module in self.children():
            if module not in keep:
                module.to(dtype=dtype, memory_format=torch.channels_last)
        for module in self.modules():
            if isinstance(module, GroupNormAct):
                module.float()
        self.requires_grad_(False)

    def prepare(self, condition: Condition, null: Condition | None) -> Branches:
        """What the steps need of a condition, with the unconditional branch beside it unless `null` is None.

        Both come from a `UViT`: tokens along axis 1.
        """

        def cast(arrays):
            return tuple(a.to(self.dtype) for a in arrays)

        count = 1 if null is None else 2
        constants = ()
        shared = count == 2 and self.use_tokens and not self.use_global
        if count == 2 and self.use_tokens:
            if null.lengths is None and all(size == 1 for size in null.sizes):
                # one token per stream: the softmax is 1 and the output the sum of the values
                constants = tuple(
                    block.cross.to_out(v.sum(1).flatten(1).to(self.dtype)) for block, v in zip(self.blocks, null.values)
                )
            else:
                condition = condition.join(null)
        keys, values = cast(condition.keys), cast(condition.values)
        return Branches(keys, values, constants, condition.lengths, condition.sizes, count, shared)

    def modulations(self, logsnr: Tensor, condition: Condition, null: Condition | None) -> Tensor:
        """Modulations `[steps, R, sum of widths]` at noise levels `[steps]`; R = 1 where all samples have the same."""
        noise = self.embed_noise(logsnr)[:, None]
        if self.use_global:
            emb = condition.emb if null is None else torch.cat((condition.emb, null.emb))
            noise = noise + emb.to(noise.dtype)
        return self.modulation(F.silu(noise)).to(self.dtype)

    def forward(self, z: Tensor, modulation: Tensor, scales: Tensor, branches: Branches) -> Tensor:
        """v `[B, 3, S, S]` in fp32.

        Args:
            z: fp32 `[B, 3, S, S]`.
            modulation: `[R, sum of widths]`, a row of `modulations`.
            scales: `[3]`: alpha, 1 / sigma (bounded) and the guidance scale of this step.
        """
        films = list(modulation.split(self.widths, -1))
        x = self.conv_in(z.to(self.dtype))
        if branches.count == 2 and not branches.shared:
            x = torch.cat((x, x))

        def film(x: Tensor) -> Tensor:
            return films.pop(0).expand(x.shape[0], -1)

        skips, blocks = [], iter(self.downs)
        for depth, down in zip(self.depths, self.downsamplers):
            for _ in range(depth):
                x = next(blocks)(x, film(x))
                skips.append(x)
            x = down(F.avg_pool2d(x, 2))
        ups = [films.pop(0) for _ in self.ups]
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        rope = self.rope_cos, self.rope_sin
        for i, block in enumerate(self.blocks):
            kv = (branches.keys[i], branches.values[i]) if self.use_tokens else (None, None)
            x = block(x, films.pop(0), rope, *kv, branches.constants[i] if branches.constants else None, branches)
        x = x.transpose(1, 2).unflatten(2, (height, width))
        blocks = iter(zip(self.ups, ups))
        for depth, up in zip(reversed(self.depths), reversed(self.upsamplers)):
            x = F.interpolate(up(x), scale_factor=2.0, mode="nearest")
            for _ in range(depth):
                block, row = next(blocks)
                x = block(x, skips.pop(), row.expand(x.shape[0], -1))
        x = F.pixel_shuffle(self.conv_out(normalise(x, self.norm_out)), self.config.patch_size).float()
        if branches.count == 2:
            own, other = x.chunk(2)
            x = other + scales[2] * (own - other)
        return (scales[0] * z - x) * scales[1]
