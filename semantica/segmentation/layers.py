"""Blocks that aggregate a cost volume (arXiv 2303.11797, section 3): within a class's map, and across classes.

Maps are `[B, T, H, W, C]`: T classes of B pictures, whose guidance `[B, 1 or T, H or 1, W or 1, G]` is the same for all
classes or for all places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GuidedLinear(nn.Linear):
    """A linear layer of features and guidance side by side, W [x, g] + b, that multiplies shared guidance once.

    Args:
        features, guidance, out: widths.
    """

    def __init__(self, features: int, guidance: int, out: int):
        super().__init__(features + guidance, out)
        self.features = features

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x `[..., features]`, guide `[..., guidance]` that broadcasts against it, to `[..., out]`."""
        own, other = self.weight.split((self.features, self.in_features - self.features), 1)
        return F.linear(x, own) + F.linear(guide, other, self.bias)


class GuidedConv(nn.Conv2d):
    """A 3x3 convolution of features and guidance side by side, without bias; that of guidance is computed once for all
    classes of a picture.

    Args:
        features, guidance, out: numbers of channels.
    """

    def __init__(self, features: int, guidance: int, out: int):
        super().__init__(features + guidance, out, 3, padding=1, bias=False)
        self.features = features

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x `[B * T, features, H, W]`, guide `[B, guidance, H, W]`, to `[B * T, out, H, W]`."""
        own, other = self.weight.split((self.features, self.in_channels - self.features), 1)
        shared = F.conv2d(guide, other, padding=1).repeat_interleave(len(x) // len(guide), 0)
        return F.conv2d(x, own, padding=1) + shared


def to_windows(x: Tensor, side: int) -> Tensor:
    """Maps `[B, T, H, W, C]`, H and W multiples of `side`, to `[B, T, windows, side * side, C]`, row by row."""
    b, t, h, w, c = x.shape
    cut = x.reshape(b, t, h // side, side, w // side, side, c)
    return cut.transpose(3, 4).reshape(b, t, -1, side * side, c)


def from_windows(x: Tensor, height: int, width: int) -> Tensor:
    """Undoes `to_windows`."""
    b, t, windows, area, c = x.shape
    side = round(area**0.5)
    cut = x.reshape(b, t, height // side, width // side, side, side, c)
    return cut.transpose(3, 4).reshape(b, t, height, width, c)


def shift_mask(height: int, width: int, side: int, shift: int) -> Tensor:
    """Which pairs of places in a window of a map rolled by `shift` lay side by side before: bool `[windows, L, L]`.

    Rolled windows at the border hold parts of opposite borders, which are not to see each other (Liu et al.,
    arXiv 2103.14030, section 3.2).
    """
    rows, columns = (
        (torch.arange(length) >= length - side).int() + (torch.arange(length) >= length - shift).int()
        for length in (height, width)
    )
    part = (rows[:, None] * 3 + columns)[None, None, ..., None]
    windows = to_windows(part, side)[0, 0, ..., 0]
    return windows[:, :, None] == windows[:, None]


class WindowAttention(nn.Module):
    """Self-attention in windows whose queries and keys also see guidance; values do not. No position bias."""

    def __init__(self, dim: int, guidance: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k = GuidedLinear(dim, guidance, dim), GuidedLinear(dim, guidance, dim)
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, guide: Tensor, mask: Tensor | None) -> Tensor:
        """x `[B, T, windows, L, C]`, guide `[B, 1, windows, L, G]`, mask bool `[windows, L, L]`, to the shape of x."""
        b, t, windows, area, c = x.shape
        # windows beside heads, so that one mask serves every map
        q, k, v = (
            part.reshape(b * t, windows, area, self.heads, -1).transpose(2, 3).flatten(1, 2)
            for part in (self.q(x, guide), self.k(x, guide), self.v(x))
        )
        mask = None if mask is None else mask.repeat_interleave(self.heads, 0)
        made = F.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(made.unflatten(1, (windows, self.heads)).transpose(2, 3).reshape(b, t, windows, area, c))


class SwinBlock(nn.Module):
    """A block of a Swin transformer, guided: attention in windows of a map that is rolled by `shift`, then an MLP."""

    def __init__(self, dim: int, guidance: int, heads: int, window: int, shift: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, guidance, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x `[B, T, H, W, C]`, guide `[B, 1, H, W, G]`, to the shape of x."""
        _, _, height, width, _ = x.shape
        # a map of one window is not partitioned, and there is nothing to shift
        window = min(self.window, height, width)
        shift = 0 if min(height, width) <= self.window else self.shift
        mask = shift_mask(height, width, window, shift).to(x.device) if shift else None
        parts = (to_windows(part.roll((-shift, -shift), (2, 3)), window) for part in (self.norm1(x), guide))
        made = from_windows(self.attention(*parts, mask), height, width)
        x = x + made.roll((shift, shift), (2, 3))
        return x + self.mlp(self.norm2(x))


class SpatialAggregation(nn.Module):
    """Two Swin blocks within each class's map, the second shifted by half a window."""

    def __init__(self, dim: int, guidance: int, heads: int, window: int):
        super().__init__()
        self.norm = nn.LayerNorm(guidance)
        self.blocks = nn.ModuleList([SwinBlock(dim, guidance, heads, window, shift) for shift in (0, window // 2)])

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x `[B, T, H, W, C]`, guide `[B, 1, H, W, G]`, to the shape of x."""
        guide = self.norm(guide)
        for block in self.blocks:
            x = block(x, guide)
        return x


def linear_attention(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, eps: float = 1e-6) -> Tensor:
    """Attention whose weights are phi(q) . phi(k) with phi = elu + 1, at a cost that is linear in the number of keys.

    Katharopoulos et al., arXiv 2006.16236, eq. 5.

    Args:
        q: `[..., L, D]`. k, v: `[..., S, D]`.
        counts: `[S]`, how often each key and its value stand there.

    Returns:
        `[..., L, D]`.
    """
    q, k = F.elu(q) + 1, (F.elu(k) + 1) * counts[:, None]
    return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2)[..., None] + eps)


class ClassAggregation(nn.Module):
    """Linear attention across classes at each place of a pooled map, then an MLP; no order of classes is known.

    Fewer classes than `padding` are filled up with copies of one learned token. As copies look alike to every query,
    one of them is computed and counted as often as it would stand there.
    """

    def __init__(self, dim: int, guidance: int, heads: int, pool: int, padding: int):
        super().__init__()
        self.heads, self.pool, self.padding = heads, pool, padding
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k = GuidedLinear(dim, guidance, dim), GuidedLinear(dim, guidance, dim)
        self.v = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.padding_token, self.padding_guide = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(guidance))

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x `[B, T, H, W, C]`, guide `[B or 1, T, G]`, to the shape of x."""
        b, t, height, width, c = x.shape
        maps = x.reshape(b * t, height, width, c).permute(0, 3, 1, 2)
        maps = F.avg_pool2d(maps, self.pool)
        low = maps.shape[2], maps.shape[3]
        # [B, places, T, C]
        tokens = maps.reshape(b, t, c, -1).permute(0, 3, 1, 2)
        tokens = tokens + self.attend(tokens, guide[:, None])
        tokens = tokens + self.mlp(self.norm2(tokens))
        maps = tokens.permute(0, 2, 3, 1).reshape(b * t, c, *low)
        maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=True)
        return x + maps.permute(0, 2, 3, 1).reshape(b, t, height, width, c)

    def attend(self, tokens: Tensor, guide: Tensor) -> Tensor:
        """tokens `[B, places, T, C]`, guide `[B or 1, 1, T, G]`, to the shape of tokens."""
        classes = tokens.shape[-2]
        padding = self.norm1(self.padding_token)
        normed = self.norm1(tokens)
        q, k, v = self.q(normed, guide), self.k(normed, guide), self.v(normed)
        k, v = (
            torch.cat([own, more.expand(*own.shape[:2], 1, -1)], 2)
            for own, more in ((k, self.k(padding, self.padding_guide)), (v, self.v(padding)))
        )
        counts = torch.ones(classes + 1, dtype=tokens.dtype, device=tokens.device)
        counts[classes] = max(self.padding - classes, 0)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in (q, k, v))
        return linear_attention(q, k, v, counts).transpose(2, 3).flatten(-2)


class Upsample(nn.Module):
    """A map of twice the size: a transposed convolution, guidance beside it, and two convolutions.

    Args:
        dim, guidance, out: numbers of channels, multiples of 16 but for guidance.
    """

    def __init__(self, dim: int, guidance: int, out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(dim, dim - guidance, 2, 2)
        self.conv1, self.norm1 = GuidedConv(dim - guidance, guidance, out), nn.GroupNorm(out // 16, out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.GroupNorm(out // 16, out)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x `[B * T, C, H, W]`, guide `[B, G, 2H, 2W]`, to `[B * T, out, 2H, 2W]`."""
        x = F.relu(self.norm1(self.conv1(self.up(x), guide)))
        return F.relu(self.norm2(self.conv2(x)))
