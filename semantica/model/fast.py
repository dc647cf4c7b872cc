"""The U-ViT rearranged for sampling: the same arithmetic, less of it, in a form that compilers and CPUs like.

What does not depend on z is computed before the first step: keys and values, and the modulations of every block at
every noise level, each weight read once for all steps. Both branches of guidance see the same z, so what comes before
the first cross-attention is computed once for both, and so is what the up path takes from the skips; the null condition
is one token per stream, whose softmax is 1, so that cross-attention to it is a constant. All of this is exact; only
the precision changes results.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semantica.condition import Condition
from semantica.errors import UserError
from semantica.model.attention import attend_by_products, sampling_attention
from semantica.model.layers import GroupNormAct, ResBlock, TransformerBlock
from semantica.model.uvit import UViT
from semantica.weak import Weak


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


class Apart(nn.Module):
    """A layer for each of a pair: (own(x), skip(s))."""

    def __init__(self, own: nn.Module, skip: nn.Module):
        super().__init__()
        self.own, self.skip = own, skip

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.own(pair[0]), self.skip(pair[1])


class Added(Apart):
    """own(x) + skip(s), where s may be of one branch and x of both."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        a, b = super().forward(pair)
        return a + b if a.shape[0] == b.shape[0] else (a.unflatten(0, (-1, b.shape[0])) + b).flatten(0, 1)


class UpBlock(ResBlock):
    """A residual block that convolves its skip apart from what comes from below: one branch's is both's."""

    def __init__(self, block: ResBlock):
        # the same parts and parameters under another class; the block itself is not used any more
        vars(self).update(vars(block))
        width = block.conv1.out_channels
        mine, skip = slice(0, width), slice(width, 2 * width)
        self.norm1 = Apart(half(block.norm1, mine), half(block.norm1, skip))
        for name in ("conv1", "shortcut"):
            conv = getattr(block, name)
            setattr(self, name, Added(part_of(conv, mine, bias=True), part_of(conv, skip, bias=False)))

    def join(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return x, skip


class PartingBlock(TransformerBlock):
    """A transformer block at whose cross-attention the branches of guidance part.

    Its keys and values are those of the samples that attend. A third array is what cross-attention adds to the
    unconditional branch, `[B, C]`, which then does not attend.
    """

    def __init__(self, block: TransformerBlock):
        vars(self).update(vars(block))

    def attend(
        self, x: Tensor, keys_values: tuple[Tensor, ...], sizes: tuple[int, ...], lengths: Tensor | None
    ) -> Tensor:
        keys, values, *constant = keys_values
        rows = keys.shape[0]
        if constant:
            own = super().attend(x[:rows], (keys, values), sizes, lengths)
            return torch.cat((own, x[-rows:] + constant[0][:, None]))
        return super().attend(torch.cat((x, x)) if x.shape[0] < rows else x, (keys, values), sizes, lengths)


def rearrange(net: UViT, dtype: torch.dtype) -> None:
    """Put the blocks above in the places of the network's own, and matrix products in those of attention on a CPU."""
    for level in net.up_blocks:
        for i, block in enumerate(level):
            level[i] = UpBlock(block)
    for i, block in enumerate(net.transformer_blocks):
        net.transformer_blocks[i] = PartingBlock(block)
    if net.device.type == "cpu":
        attend_by_products(net)
    sampling_attention(net, net.device, dtype)


def merge(projections: list[nn.Linear]) -> nn.Linear:
    """One projection that gives the results of several, one after the other."""
    made = nn.Linear(projections[0].in_features, sum(p.out_features for p in projections))
    made.weight = nn.Parameter(torch.cat([p.weight for p in projections]))
    made.bias = nn.Parameter(torch.cat([p.bias for p in projections]))
    return made


class FastDenoiser(nn.Module):
    """A `UViT` for sampling: v of both branches, joined by guidance, from prepared conditions and modulations.

    Args:
        unet: where sampling happens; is copied. Weights are cast to `dtype`, those of group norms kept in fp32.
        dtype: of weights and activations.

    Raises:
        UserError: a network whose streams are concatenated.
    """

    def __init__(self, unet: UViT, dtype: torch.dtype):
        super().__init__()
        if unet.config.fusion != "parallel":
            raise UserError(f"{unet.config.fusion} streams are for comparisons, in eager torch only: sample without")
        self.dtype = dtype
        self.net = net = copy.deepcopy(unet).eval()
        rearrange(net, dtype)
        down, inner, up = net.blocks
        projections = [block.film for block in (*down, *up)] + [block.modulation for block in inner]
        self.widths = tuple(projection.out_features for projection in projections)
        # in the given precision, since it runs once for all steps
        self.modulation = merge(projections)
        for block in (*down, *up):
            block.film = nn.Identity()
        for block in inner:
            block.modulation = nn.Identity()
        for module in net.children():
            if module is not net.embed_noise:
                module.to(dtype=dtype, memory_format=torch.channels_last)
        for module in net.modules():
            if isinstance(module, GroupNormAct):
                module.float()
        self.requires_grad_(False)

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled one by one."""
        return [block for part in self.net.blocks for block in part]

    def branches(self, condition: Condition, weak: Weak | None) -> Callable[[int], Branches]:
        """By number of step, what that needs of a condition, with guidance's weak branch beside it unless that is None.

        Both come from a `UViT`: tokens along axis 1.
        """
        if weak is None:
            made = self.prepare(condition, None)
            return lambda step: made
        # the shift is in the modulations
        tokens, shifted = dataclasses.replace(weak, shift=None), weak.shift is not None
        return tokens.each(lambda other: self.prepare(condition, other, shifted))

    def prepare(self, condition: Condition, null: Condition | None, shifted: bool = False) -> Branches:
        """Both conditions as one batch; shifted: their embeddings differ, whatever these conditions say."""

        def cast(arrays):
            return tuple(a.to(self.dtype) for a in arrays)

        count = 1 if null is None else 2
        constants = ()
        shared = count == 2 and self.net.use_tokens and not self.net.use_global and not shifted
        if count == 2 and self.net.use_tokens:
            if null.lengths is None and all(size == 1 for size in null.sizes):
                # one token per stream: the softmax is 1 and the output the sum of the values
                constants = tuple(
                    block.cross.to_out(v.sum(1).flatten(1).to(self.dtype))
                    for block, v in zip(self.net.transformer_blocks, null.values)
                )
            else:
                condition = condition.join(null)
        keys, values = cast(condition.keys), cast(condition.values)
        return Branches(keys, values, constants, condition.lengths, condition.sizes, count, shared)

    def modulations(self, logsnr: Tensor, condition: Condition, weak: Weak | None) -> Tensor:
        """Modulations `[steps, R, sum of widths]` at noise levels `[steps]`; R = 1 where all samples have the same."""
        noise = self.net.embedding(logsnr)[:, None]
        if weak is None or (not self.net.use_global and weak.shift is None):
            return self.modulate(noise + condition.emb.to(noise.dtype) if self.net.use_global else noise)
        own, other = condition.emb, weak.condition.emb
        # [B, E], or [steps, B, E] where the weak branch has another in each step
        other = other if weak.rows is None else other[weak.rows]
        if weak.shift is None or weak.blocks is not None:
            made = self.modulate(self.beside(noise, own, other))
        if weak.shift is None:
            return made
        shifted = self.modulate(self.beside(noise, own, other + weak.shift))
        if weak.blocks is None:
            return shifted
        down, inner, _ = map(len, self.net.blocks)
        # the widths are those of the way down, the way up and the transformer
        order = (*weak.blocks[:down], *weak.blocks[down + inner :], *weak.blocks[down : down + inner])
        pairs = zip(order, made.split(self.widths, -1), shifted.split(self.widths, -1), strict=True)
        return torch.cat([other if seen else own for seen, own, other in pairs], -1)

    def beside(self, noise: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """Embeddings `[steps, 2 B, E]` of both branches: of noise `[steps, 1, E]`, with the conditions' added."""
        both = torch.cat([emb.expand(len(noise), -1, -1) for emb in (own, other)], 1)
        return noise + both.to(noise.dtype)

    def modulate(self, emb: Tensor) -> Tensor:
        """All modulations of an embedding."""
        return self.modulation(F.silu(emb)).to(self.dtype)

    def rows(self, modulation: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """A row of `modulations`, cut for each block: on the way down, on the way up, in the transformer."""
        rows, levels = modulation.split(self.widths, -1), sum(self.net.config.depths)
        return rows[:levels], rows[levels : 2 * levels], rows[2 * levels :]

    def forward(self, z: Tensor, modulation: Tensor, scales: Tensor, branches: Branches) -> Tensor:
        """v `[B, 3, S, S]` in fp32.

        Args:
            z: fp32 `[B, 3, S, S]`.
            modulation: `[R, sum of widths]`, a row of `modulations`.
            scales: `[3]`: alpha, 1 / sigma (bounded) and the guidance scale of this step.
        """
        x = self.net.conv_in(z.to(self.dtype))
        if branches.count == 2 and not branches.shared:
            x = torch.cat((x, x))
        down, up, inner = self.rows(modulation)
        embs = (
            *(row.expand(len(x), -1) for row in down),
            *inner,
            *(row.expand(branches.count * len(z), -1) for row in up),
        )
        arrays = [a for a in (branches.keys, branches.values, branches.constants) if a]
        contexts = zip(*arrays) if arrays else [None] * len(inner)
        x, _ = self.net.walk(x, iter(embs), contexts, branches.sizes, branches.lengths)
        x = x.float()
        if branches.count == 2:
            own, other = x.chunk(2)
            x = other + scales[2] * (own - other)
        return (scales[0] * z - x) * scales[1]
