"""Position, size, shape and appearance of objects in attention maps (Epstein et al., arXiv 2306.00986), pure functions.

A map A is one object's: cross-attention probabilities averaged over heads and over the object's tokens. All of it is
differentiable, but for the masks of shapes that serve as targets, and those that appearance is gathered under.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# the paper's: what keeps ratios finite, and how steep the soft threshold is
EPS = 1e-4
SHARPNESS = 10.0
DISTANCES = ("l1", "l2")


def grid_features(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """1, x, y of every place of a grid row by row, fp32 `[height * width, 3]`.

    x and y run over the picture from 0 to 1, those of a place are its middle's; they are centred here, less 0.5, so
    that sums of them keep their digits. `centroid` adds that again.
    """
    y, x = ((torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side - 0.5 for side in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((torch.ones_like(x), x, y), -1).flatten(0, 1)


def centroid(moments: Tensor) -> Tensor:
    """Eq. 5 of the paper: x, y in [0, 1] `[..., 2]` of moments `[..., 3]` with the features of `grid_features`."""
    mass = moments[..., :1]
    return (moments[..., 1:] + 0.5 * mass) / (mass + EPS)


def unit_range(maps: Tensor) -> Tensor:
    """Each map `[..., h, w]` stretched to [0, 1]."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + EPS)


def shape(maps: Tensor) -> Tensor:
    """Eq. 7: maps `[..., h, w]` through a soft threshold at half of their range."""
    return unit_range(torch.sigmoid(SHARPNESS * (unit_range(maps) - 0.5)))


def size(maps: Tensor) -> Tensor:
    """Eq. 6: the share of the picture `[...]` that objects take, from maps `[..., h, w]`."""
    return shape(maps).mean((-2, -1))


def mask(shapes: Tensor) -> Tensor:
    """Shapes cut at one half, without a gradient."""
    return (shapes.detach() > 0.5).to(shapes.dtype)


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps `[B, S, h, w]` on another grid."""
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)


def appearance(activations: Tensor, shapes: Tensor) -> Tensor:
    """Eq. 8: what activations `[B, C, h, w]` are under each shape, `[B, S, C]` in fp32.

    shapes: `[B, S, h', w']`; they choose where to look, and get no gradient.
    """
    where = mask(resized(shapes.detach(), *activations.shape[-2:]))
    total = torch.einsum("bshw,bchw->bsc", where, activations.to(where.dtype))
    return total / (where.sum((-2, -1))[..., None] + EPS)


def transformed(shapes: Tensor, centres: Tensor, shift: Tensor, factor: Tensor, angle: Tensor) -> Tensor:
    """Shapes turned and scaled about their centres, then shifted; places from outside are 0.

    Args:
        shapes: `[B, S, h, w]`.
        centres: x, y in [0, 1] `[B, S, 2]`.
        shift: to the right and down, as shares of the picture, `[B, 2]`.
        factor: of the area `[B]`. angle: anticlockwise as one sees it, in degrees, `[B]`.
    """
    batch, count, height, width = shapes.shape
    like = {"device": shapes.device, "dtype": shapes.dtype}
    y, x = ((torch.arange(side, **like) + 0.5) / side for side in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    places = torch.stack((x, y), -1)  # [h, w, 2]
    turn, scale = torch.deg2rad(angle), factor.sqrt()
    cos, sin = turn.cos() / scale, turn.sin() / scale
    # where a place of the result comes from: rows point down, so that the inverse turn has these signs
    back = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)  # [B, 2, 2]
    middles = centres[:, :, None, None]
    offset = places - shift[:, None, None, None] - middles
    found = torch.einsum("bij,bshwj->bshwi", back, offset) + middles
    flat = shapes.reshape(batch * count, 1, height, width)
    # grid_sample counts from -1 to 1
    sampled = F.grid_sample(flat, (2 * found - 1).flatten(0, 1), mode="bilinear", align_corners=False)
    return sampled.reshape(shapes.shape)


def distance(observed: Tensor, target: Tensor, kind: str = "l1") -> Tensor:
    """How far observations `[B, ...]` are from targets that broadcast to them: mean of |d|, or of d^2 / 2, `[B]`."""
    difference = (observed - target).flatten(1)
    return difference.abs().mean(1) if kind == "l1" else 0.5 * difference.square().mean(1)
