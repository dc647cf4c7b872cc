"""Heads for further losses, trained along with the network and not needed once training is over.

`PairHead` is contrastive, between the encodings of a pair. `RepaHead` is representation alignment (REPA, Yu et al.,
arXiv 2410.06940): hidden states of the denoiser, a few blocks into the transformer, learn to predict a frozen encoder's
tokens of the clean target. The first blocks then know early what the picture shows; the others are free to draw it.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from semantica.errors import UserError

# the paper aligns block 8 of the 28 of its largest model
DEPTH, OF = 8, 28


class GatherRows(torch.autograd.Function):
    """Rows `[B, C]` of every process, one after the other; a gradient is the sum of what every process' loss gives."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        whole = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(whole, rows.contiguous())
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


class PairHead(nn.Module):
    """InfoNCE between the two pictures of a pair, against the other pairs of the batch (arXiv 1807.03748, eq. 4).

    What makes two pictures a pair is what the condition has to carry, so an encoder that starts from nothing finds it
    long before the denoiser could ask for it.
    """

    temperature = 0.1

    def __init__(self, dim: int, width: int = 64, across: bool = False):
        """across: the other pairs are those of all processes, as if their batches were one."""
        super().__init__()
        self.across = across
        self.project = nn.Linear(dim, width, bias=False)

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        """Pooled codes `[B, C]` of conditions and targets to losses `[B]`."""
        a, b = (F.normalize(self.project(code).float(), dim=-1) for code in (condition, target))
        own = torch.arange(len(a), device=a.device)
        if self.across:
            own, b = own + dist.get_rank() * len(b), GatherRows.apply(b)
        # codes are fp32 for the sake of this product, which autocast would round to bf16 again
        with torch.autocast(a.device.type, enabled=False):
            return F.cross_entropy(a @ b.T / self.temperature, own, reduction="none")


class RepaHead(nn.Module):
    """Negative cosine between projected hidden states and tokens, a mean over patches: arXiv 2410.06940, eq. 8.

    The projector has three layers with SiLU, as in the paper.

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

        Tokens of another grid are resampled to that of the hidden states, antialiased, so that each hidden state is
        compared to one token; they need no gradient.
        """
        tokens = resampled(tokens.float(), hidden.shape[1])
        return -F.cosine_similarity(self.project(hidden).float(), tokens, dim=-1).mean(1)


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
