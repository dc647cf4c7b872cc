"""Building blocks of the U-ViT: norms, attention, residual blocks. Shapes stand at the line's end."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from semantica.kernels import cross_attention, group_norm
from semantica.kernels.cross_attention.op import RMS_EPS


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN (Peebles & Xie, arXiv 2212.09748, sec. 3.2): x `[B, N, C]`, shift and scale `[B, C]`."""
    return x * (1 + scale[:, None]) + shift[:, None]


def zero(module: nn.Module) -> nn.Module:
    """Zero-initialise, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def block_runner(model: nn.Module) -> Callable[..., Tensor]:
    """`run(block, *inputs)`: with diffusers' `enable_gradient_checkpointing()`, the backward pass computes each block
    again instead of keeping what it needs."""
    checkpointing = model.gradient_checkpointing and torch.is_grad_enabled()
    return model._gradient_checkpointing_func if checkpointing else call


def call(block: nn.Module, *inputs) -> Tensor:
    return block(*inputs)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, arXiv 1910.07467), in x's dtype."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), RMS_EPS).to(x.dtype)


class GroupNormAct(nn.Module):
    """GroupNorm, optional FiLM, SiLU through the fused operator."""

    def __init__(self, channels: int):
        super().__init__()
        self.groups = math.gcd(32, channels)
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        scale, shift = (a if a is None else a.to(x.dtype) for a in (scale, shift))
        return group_norm(x, self.groups, self.weight, self.bias, scale, shift)


class NoiseEmbedding(nn.Module):
    """logSNR `[B]` to embedding `[B, E]`: sinusoids with periods from 0.5 to 128 logSNR units, then an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.net = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, logsnr: Tensor) -> Tensor:
        periods = torch.logspace(-1, 7, self.dim // 2, base=2, dtype=torch.float32, device=logsnr.device)
        # phases of a reduced-precision logSNR would be off by whole turns
        phase = logsnr.float()[:, None] * (2 * math.pi / periods)
        return self.net(torch.cat([phase.sin(), phase.cos()], -1).to(self.net[0].weight.dtype))


class ResBlock(nn.Module):
    """Convolutional residual block with FiLM on the second norm (simple diffusion, arXiv 2301.11093, fig. 8).

    With `nn.Identity` in the place of `film` it takes scale and shift themselves, `[B, 2 C]`, computed beforehand.
    """

    def __init__(self, channels_in: int, channels: int, emb_dim: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = GroupNormAct(channels_in), GroupNormAct(channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.film = nn.Linear(emb_dim, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # [B, C, H, W], [B, E] (activated)
        scale, shift = self.film(emb).chunk(2, -1)
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.dropout(self.norm2(h, scale, shift)))
        return self.shortcut(x) + h

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """What `forward` takes on the way up: x from below with a skip from the way down."""
        return torch.cat([x, skip], 1)


def rotary_grid(side_h: int, side_w: int, dim: int) -> Tensor:
    """2-D rotary angles `[H * W, dim / 2]`: half of the pairs turn with the row, half with the column.

    RoPE: Su et al., arXiv 2104.09864, eq. 15; the axial form: Heo et al., arXiv 2403.13298, eq. 6.
    """
    frequencies = 100.0 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(side_h), torch.arange(side_w), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (rows, columns)]
    return torch.cat(angles, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x `[B, N, H, D]` by angles given as cos, sin `[N, D/2]`."""
    a, b = x.chunk(2, -1)
    cos, sin = (t[:, None].to(x.dtype) for t in (cos, sin))
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class SelfAttentionProcessor:
    """Runs self-attention through diffusers' dispatcher; `set_attention_backend` writes `_attention_backend`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SelfAttention", hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(2)  # each [B, N, H, D]
        q, k = (rotate(norm(a), cos, sin) for norm, a in ((attn.norm_q, q), (attn.norm_k, k)))
        return attn.to_out(self.attend(q, k, v).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dispatch_attention_fn(q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with QK-norm and rotary positions; `to_out` gives the activation after projection."""

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]
    is_cross_attention = False

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.set_processor(SelfAttentionProcessor())

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, N, C], [N, D/2]
        return self.processor(self, hidden_states, cos, sin)


class CrossAttentionProcessor:
    """Runs cross-attention through the fused operator, which normalises the queries as well."""

    def __call__(
        self,
        attn: "CrossAttention",
        q: Tensor,  # [B, N, H, D]
        keys: Tensor,  # [B, M, H, D]
        values: Tensor,
        sizes: tuple[int, ...],
        lengths: Tensor | None,
    ) -> Tensor:
        return cross_attention(q, keys, values, sizes, lengths, q_weight=attn.norm_q.weight)


class CrossAttention(nn.Module):
    """Queries against keys and values that were computed beforehand: one projection per stream, one shared query.

    processor: what computes the attention itself; another one is another implementation of the same.
    """

    def __init__(self, dim: int, heads: int, stream_dims: tuple[int, ...]):
        super().__init__()
        self.heads = heads
        self.norm_q = RMSNorm(dim // heads)
        self.norm_k = nn.ModuleList(RMSNorm(dim // heads) for _ in stream_dims)
        self.to_q, self.to_out = nn.Linear(dim, dim, bias=False), zero(nn.Linear(dim, dim))
        self.to_kv = nn.ModuleList(nn.Linear(stream_dim, 2 * dim, bias=False) for stream_dim in stream_dims)
        self.processor = CrossAttentionProcessor()

    def keys_values(self, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Streams `[B, M_s, C_s]` to keys and values `[B, M, H, D]`, one stream after the other."""
        keys, values = [], []
        for stream, to_kv, norm in zip(tokens, self.to_kv, self.norm_k, strict=True):
            k, v = to_kv(stream).unflatten(-1, (2, self.heads, -1)).unbind(2)
            keys.append(norm(k))
            values.append(v)
        return torch.cat(keys, 1), torch.cat(values, 1)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, sizes: tuple[int, ...], lengths: Tensor | None
    ) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [B, N, H, D]
        # keys and values may come from another precision, a cache or a bundle
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        return self.to_out(self.processor(self, q, keys, values, sizes, lengths).flatten(2))


class MLP(nn.Sequential):
    """Linear, GELU, dropout, linear."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(hidden, dim))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, MLP; AdaLN-zero from the embedding around the first and the last.

    With `nn.Identity` in the place of `modulation` it takes the six shifts, scales and gates themselves, `[B, 6 C]`,
    computed beforehand.
    """

    def __init__(self, dim: int, heads: int, emb_dim: int, stream_dims: tuple[int, ...], dropout: float):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.modulation = zero(nn.Linear(emb_dim, 6 * dim))
        self.attn = SelfAttention(dim, heads)
        self.norm_cross = RMSNorm(dim) if stream_dims else None
        self.cross = CrossAttention(dim, heads, stream_dims) if stream_dims else None
        self.mlp = MLP(dim, 4 * dim, dropout)

    def forward(
        self,
        hidden_states: Tensor,  # [B, N, C]
        emb: Tensor,  # [B, E] (activated)
        rope: tuple[Tensor, Tensor],  # cos, sin [N, D/2]
        keys_values: tuple[Tensor, Tensor] | None,  # [B, M, H, D]
        sizes: tuple[int, ...],
        lengths: Tensor | None,
    ) -> Tensor:
        x = hidden_states
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb).to(x.dtype).chunk(6, -1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), *rope)
        if self.cross is not None:
            x = self.attend(x, keys_values, sizes, lengths)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def attend(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], sizes: tuple[int, ...], lengths: Tensor | None
    ) -> Tensor:
        """Cross-attention, with x added."""
        return x + self.cross(self.norm_cross(x), *keys_values, sizes, lengths)
