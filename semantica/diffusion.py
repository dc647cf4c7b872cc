"""Training mathematics of the diffusion process: noising, the velocity target and weighted losses, as pure functions.

Images are float [B, C, S, S] in [-1, 1]; `logsnr` [B] is the natural-log SNR of each sample, float32 or wider. The
arithmetic and its notation are those of `semantica.solvers`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semantica.errors import UserError
from semantica.solvers import Schedule, alpha_sigma, v_from_x_eps

LOSS_WEIGHTS = ("eps", "sigmoid", "v", "x")


def noise_levels(u: np.ndarray | Tensor, schedule: Schedule) -> Tensor:
    """Log-SNR, float32 on u's device, of the times u in [0, 1]; uniform u gives the schedule's own distribution.

    Computed on the host in float64, because the curve is steep at its ends: draw u on the host.
    """
    u = torch.as_tensor(u)
    return torch.from_numpy(schedule.logsnr(u.cpu().numpy())).float().to(u.device)


def per_sample(logsnr: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of each sample, shaped [B, 1, ...] to multiply `like` [B, ...] or to enter the conversions of
    `semantica.solvers`, say `x_from_v(z, v, *per_sample(logsnr, z))`.
    """
    return alpha_sigma(logsnr.reshape(-1, *[1] * (like.ndim - 1)))


def add_noise(x: Tensor, noise: Tensor, logsnr: Tensor) -> Tensor:
    """z = alpha x + sigma eps. x, noise [B, ...], logsnr [B] -> [B, ...]."""
    alpha, sigma = per_sample(logsnr, x)
    return alpha * x + sigma * noise


def v_target(x: Tensor, noise: Tensor, logsnr: Tensor) -> Tensor:
    """v = alpha eps - sigma x, what the network learns to predict. x, noise [B, ...], logsnr [B] -> [B, ...]."""
    return v_from_x_eps(x, noise, *per_sample(logsnr, x))


def loss_weight(logsnr: Tensor, kind: str = "eps", bias: float = -3.0) -> Tensor:
    """Weight [B] of the squared error of v at each noise level.

    At a given z the errors are tied, eps - eps_hat = alpha (v - v_hat), so a weight on the eps-loss becomes alpha^2
    times that weight on the v-loss:
    - "eps": alpha^2 = sigmoid(logsnr); the eps-loss of simple diffusion (arXiv 2301.11093).
    - "sigmoid": sigmoid(logsnr) sigmoid(bias - logsnr); the sigmoid weight of Kingma & Gao (arXiv 2303.00848) and
      SiD2 (arXiv 2410.19324) on the eps-loss. They integrate over lambda and so carry a further factor -dlambda/dt;
      here noise levels stay distributed as the schedule draws them.
    - "x": sigma^2 = sigmoid(-logsnr); the x-loss || x - x_hat ||^2 that arXiv 2405.14857 is reported to use.
    - "v": 1; the plain v-loss, equal to the SNR + 1 weighting of the x-loss (arXiv 2202.00512).

    `bias`: the log-SNR above which "sigmoid" falls off (-2 to -3 in SiD2). Raises `UserError` for another kind.
    """
    if kind not in LOSS_WEIGHTS:
        raise UserError(f"unknown loss weight {kind!r}: choose one of {', '.join(LOSS_WEIGHTS)}")
    if kind == "v":
        return torch.ones_like(logsnr)
    if kind in ("eps", "x"):
        return torch.sigmoid(logsnr if kind == "eps" else -logsnr)
    return torch.sigmoid(logsnr) * torch.sigmoid(bias - logsnr)


def multiscale_loss(prediction: Tensor, target: Tensor, weight: Tensor, scales: Sequence[int]) -> Tensor:
    """Weighted squared error of mean-pooled images, per sample: [B, C, S, S] twice, weight [B] -> [B].

    loss_s = mean over channels and pixels of (D_s[prediction] - D_s[target])^2, where D_s mean-pools to s x s; the
    result is weight * sum_s (loss_s / s) / sum_s (1 / s). The relative weights 1/s are the paper's (simple diffusion,
    arXiv 2301.11093, multiscale loss: s = 32, 64, ..., S, helpful above 256 pixels); dividing by their sum keeps the
    loss on the scale of the plain one, which `scales=(S,)` gives exactly. Pooling is linear and noise levels are per
    sample, so `loss_weight` turns this v-loss into the paper's eps-loss. Raises `UserError` for no scale at all and for
    one that does not divide S.
    """
    size = prediction.shape[-1]
    if not scales or any(s < 1 or size % s for s in scales):
        raise UserError(f"multi-scale loss: scales {tuple(scales)} must all divide the image size {size}")
    error = prediction - target
    total = sum(1 / s for s in scales)
    losses = [F.avg_pool2d(error, size // s).square().flatten(1).mean(1) * (1 / s / total) for s in scales]
    return weight * sum(losses)
