"""How alike two pictures are: PSNR, and SSIM on the luma (Wang, Bovik, Sheikh and Simoncelli 2004)."""

import numpy as np
from scipy.ndimage import gaussian_filter

_SIGMA, _C1, _C2 = 1.5, (0.01 * 255) ** 2, (0.03 * 255) ** 2  # of the paper
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Of uint8 pictures [H, W, 3], in dB; infinite where they are equal."""
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Of uint8 pictures [H, W, 3], at most 1; weighted by a Gaussian of 1.5 pixels."""
    x, y = (picture.astype(np.float64) @ _LUMA for picture in (one, other))

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, _SIGMA, truncate=3.5)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    similar = (2 * mx * my + _C1) * (2 * both + _C2) / ((mx**2 + my**2 + _C1) * (vx + vy + _C2))
    return float(similar.mean())
