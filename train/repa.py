"""Representation alignment: hidden states of the denoiser are drawn to what a frozen encoder says of the clean target.

REPA (Yu et al., arXiv 2410.06940): the projection of each patch's hidden state, a few blocks into the transformer, is
compared by cosine to the frozen encoder's token of the same patch. What the first blocks would learn late, what the
picture shows, is handed to them; the rest is free to draw it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semantica.errors import UserError

# the paper aligns block 8 of the 28 of its largest model
DEPTH, OF = 8, 28


def aligned_depth(depth: int, blocks: int | None = None) -> int:
    """After which of `depth` blocks hidden states are aligned: the paper's share of them unless `blocks` says.

    Raises:
        UserError: there is no such block.
    """
    if blocks is None:
        return max(1, round(depth * DEPTH / OF))
    if not 1 <= blocks <= depth:
        raise UserError(f"--repa-depth {blocks} is not one of the {depth} transformer blocks: give 1 to {depth}")
    return blocks


class RepaHead(nn.Module):
    """Negative cosine between projected hidden states and tokens: eq. 8 of arXiv 2410.06940, each patch weighing alike.

    The projector, three layers with SiLU as in the paper, is trained along, and not needed once training is over.

    Args:
        width: of the hidden states.
        token_dim: of the encoder's tokens.
        depth: after how many blocks the hidden states are taken.
    """

    def __init__(self, width: int, token_dim: int, depth: int):
        super().__init__()
        self.depth = depth
        # 2048 at width 1024, the paper's own number
        inner = 2 * width
        self.project = nn.Sequential(
            nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, token_dim)
        )

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states `[B, N, C]` and patch tokens `[B, M, D]`, square grids row by row, to losses `[B]` in [-1, 1].

        Tokens of another grid are resampled to that of the hidden states, antialiased: every hidden state then has
        a token to meet, and no gradient passes through the resampling.
        """
        tokens = resampled(tokens.float(), hidden.shape[1])
        return -F.cosine_similarity(self.project(hidden).float(), tokens, dim=-1).mean(1)


def resampled(tokens: Tensor, count: int) -> Tensor:
    """Patch tokens `[B, M, D]` of a square grid on the square grid with `count` places."""
    if tokens.shape[1] == count:
        return tokens
    side, wanted = math.isqrt(tokens.shape[1]), math.isqrt(count)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(grid, (wanted, wanted), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


@torch.no_grad()
def patch_tokens(encoder: nn.Module, images: Tensor) -> Tensor:
    """A frozen encoder's patch tokens `[B, M, D]` of images `[B, 3, S, S]` in [-1, 1] of any size."""
    size = encoder.image_size
    if images.shape[-1] != size:
        images = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return last_patches(encoder, encoder(images).tokens)


def last_patches(encoder: nn.Module, tokens: Tensor) -> Tensor:
    """The patch tokens among all `[B, ..., D]`: class and register tokens come first."""
    return tokens[:, -encoder.patches :]
