"""How much of a picture an edit keeps: MSE, PSNR and SSIM of what lies outside the mask of the edit.

As PIE-Bench has them (Ju et al., arXiv 2310.01506, section 5; github.com/cure-lab/PnPInversion,
evaluation/matrics_calculator.py): both pictures are black inside the mask, and means are over the whole square.
"""

import numpy as np

# Wang et al. 2004: an 11 x 11 Gaussian of 1.5 pixels, and constants for pictures in [0, 1]
WINDOW, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2


def outside(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture uint8 `[H, W, 3]` as float64 in [0, 1], black where the mask, bool `[H, W]`, is set."""
    return picture / 255.0 * ~mask[..., None]


def mse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of two pictures `[H, W, 3]` in [0, 1]."""
    return float(np.square(a - b).mean())


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB, of a mean squared error; nan for pictures that do not differ at all."""
    return -10 * float(np.log10(error)) if error > 0 else float("nan")


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two pictures `[H, W, 3]` in [0, 1], at least 11 pixels each way.

    Wang et al., IEEE Transactions on Image Processing 13 (2004), as torchmetrics computes it: pictures go on beyond
    their edges as in a mirror, and the mean is over all pixels and channels.
    """
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    together = blurred(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + C1) * (2 * together + C2)
    return float((alike / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))).mean())


def blurred(x: np.ndarray) -> np.ndarray:
    """Gaussian means `[H, W, 3]`."""
    weights = np.exp(-0.5 * (np.arange(WINDOW) - WINDOW // 2) ** 2 / SIGMA**2)
    weights /= weights.sum()
    half = WINDOW // 2
    x = np.pad(x, ((half, half), (half, half), (0, 0)), mode="reflect")
    for axis in (0, 1):
        x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis) @ weights
    return x
