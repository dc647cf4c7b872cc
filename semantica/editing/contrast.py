"""PatchNCE: features of one picture's patches told apart by those of another, as pure functions.

Contrastive Denoising Score (Nam et al., arXiv 2311.18608) keeps a picture's layout by it: the feature of a patch is to
stay closer to that of the same patch of the source than to those of other patches (Park et al., arXiv 2007.15651).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semantica.errors import UserError


def patches(features: Tensor, size: int) -> Tensor:
    """Unit vectors of square patches: `[B, N / size^2, C]` of a square grid's features `[B, N, C]`, row by row.

    Features are averaged over `size` x `size` of them first; fp32, or wider where they are.

    Raises:
        UserError: N is no square number.
    """
    side = math.isqrt(features.shape[1])
    if side**2 != features.shape[1]:
        raise UserError(f"features of {features.shape[1]} places: only square pictures are edited")
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    grid = wide.transpose(1, 2).unflatten(2, (side, side))
    return F.normalize(F.avg_pool2d(grid, size).flatten(2).transpose(1, 2), dim=-1, eps=1e-7)


def patch_nce(query: Tensor, key: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean over patches i of -log( exp(k_i . q_i / tau) / sum_j exp(k_i . q_j / tau) ) (arXiv 2311.18608, eq. 8).

    The authors' code has the diagonal twice, once as the positive and once masked by -10: exp(-10 / tau) more in the
    sum, 1e-62 at their tau.

    Args:
        query: unit vectors `[B, P, C]` of the picture that is changed.
        key: of the one that it is to stay like; a constant, its gradient is not asked for.
        temperature: tau.

    Returns:
        `[B]`.
    """
    logits = key.detach() @ query.transpose(1, 2) / temperature
    return -logits.log_softmax(-1).diagonal(dim1=1, dim2=2).mean(1)


def contrast(
    query: Mapping[str, Tensor],
    key: Mapping[str, Tensor],
    rng: np.random.Generator,
    count: int = 256,
    sizes: Sequence[int] = (1, 2),
    temperature: float = 0.07,
) -> Tensor:
    """Sum of `patch_nce` over layers and patch sizes.

    Args:
        query, key: features `[B, N, C]` by layer.
        rng: draws which patches are compared, the same of both.
        count: patches of each layer and size, at most.
        sizes: sides of the patches; one that is larger than a layer's grid is left out there.

    Returns:
        `[B]`.

    Raises:
        UserError: as `patches`; no layer has two patches of these sizes.
    """
    losses = []
    for name, features in query.items():
        for size in sizes:
            if features.shape[1] < (2 * size) ** 2:
                continue
            own, other = patches(features, size), patches(key[name], size)
            picked = torch.from_numpy(rng.permutation(own.shape[1])[:count]).to(own.device)
            losses.append(patch_nce(own[:, picked], other[:, picked], temperature))
    if not losses:
        raise UserError(f"no attention here has two patches of {' or '.join(map(str, sizes))} places a side")
    return sum(losses)
