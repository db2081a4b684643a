"""Numbers of coloured pictures: pure functions of pixels, and of what a network says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..color.lab import rgb_to_lab


def peak_signal_noise_ratio(squared_error: float, values: float) -> float:
    """Returns the PSNR in dB of pictures of 8 bits.

    Equal pictures count as if one value were off by one level, which is the least error that there
    is: infinity has no mean.

    Args:
        squared_error: sum over all values of both pictures' difference squared.
        values: their number, 3 H W.
    """
    return 10 * math.log10(255**2 * values / max(squared_error, 1))


def ciede2000(first: Tensor, second: Tensor) -> Tensor:
    """Returns the colour difference CIEDE2000 with all weights 1.

    Sharma, Wu and Dalal: The CIEDE2000 color-difference formula, Color Research and Application 30
    (2005); the comments name its equations.

    Args:
        first, second: (..., 3, H, W) L*a*b*, float64.

    Returns:
        (..., H, W) float64; about 1 is just noticeable.
    """
    (l1, a1, b1), (l2, a2, b2) = first.unbind(-3), second.unbind(-3)
    chroma = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    g = 0.5 * (1 - torch.sqrt(chroma**7 / (chroma**7 + 25.0**7)))  # (4)
    a1, a2 = (1 + g) * a1, (1 + g) * a2  # (5)
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)  # (6)
    h1 = torch.rad2deg(torch.atan2(b1, a1)) % 360  # (7)
    h2 = torch.rad2deg(torch.atan2(b2, a2)) % 360
    grey = c1 * c2 == 0
    difference = h2 - h1
    difference = difference - 360 * (difference > 180).double() + 360 * (difference < -180).double()
    difference = torch.where(grey, 0.0, difference)  # (10)
    d_hue = 2 * torch.sqrt(c1 * c2) * torch.sin(torch.deg2rad(difference / 2))  # (11)
    total = h1 + h2
    apart = (h1 - h2).abs() > 180
    hue = torch.where(apart, torch.where(total < 360, total + 360, total - 360), total) / 2
    hue = torch.where(grey, total, hue)  # (14)
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2  # (12), (13)

    def cosine(factor: int, shift: float) -> Tensor:
        return torch.cos(torch.deg2rad(factor * hue + shift))

    t = 1 - 0.17 * cosine(1, -30) + 0.24 * cosine(2, 0) + 0.32 * cosine(3, 6)
    t = t - 0.20 * cosine(4, -63)  # (15)
    turn = 60 * torch.exp(-(((hue - 275) / 25) ** 2))  # twice (16)
    rotation = -2 * torch.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * torch.sin(torch.deg2rad(turn))
    square = (light - 50) ** 2
    d_light = (l2 - l1) / (1 + 0.015 * square / torch.sqrt(20 + square))  # (8), (18)
    d_chroma = (c2 - c1) / (1 + 0.045 * chroma)  # (9), (19)
    d_hue = d_hue / (1 + 0.015 * chroma * t)  # (20)
    summed = d_light**2 + d_chroma**2 + d_hue**2 + rotation * d_chroma * d_hue  # (22)
    return torch.sqrt(summed.clamp(min=0))


def mean_ciede2000(first: Tensor, second: Tensor) -> float:
    """Returns the mean CIEDE2000 of two (3, H, W) uint8 RGB pictures."""
    labs = [rgb_to_lab(picture.double() / 255) for picture in (first, second)]
    return float(ciede2000(*labs).cpu().numpy().mean())


def colorfulness(rgb: np.ndarray) -> float:
    """Returns how colourful an (H, W, 3) uint8 RGB picture is; 0 if it is grey.

    Hasler and Suesstrunk: Measuring colourfulness in natural images (2003), M3: deviations are the
    population's, and nothing is made absolute.
    """
    red, green, blue = rgb.reshape(-1, 3).T.astype(np.float64)
    rg, yb = red - green, (red + green) / 2 - blue
    return math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())


def channel_histograms(rgb: np.ndarray) -> np.ndarray:
    """Returns (3, 256) int64: how often each level is in each channel of (H, W, 3) uint8."""
    return np.stack([np.bincount(rgb[..., c].ravel(), minlength=256) for c in range(3)])


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the Jensen-Shannon divergence of two histograms in nats, averaged over channels.

    Args:
        first, second: (C, N) counts.

    Returns:
        From 0, equal, to ln 2, without a common level.
    """
    p, q = (h / h.sum(1, keepdims=True) for h in (first, second))
    middle = (p + q) / 2

    def divergence(part: np.ndarray) -> np.ndarray:
        logs = np.log(np.divide(part, middle, out=np.ones_like(part), where=part > 0))
        return np.asarray((part * logs).sum(1))

    return float(((divergence(p) + divergence(q)) / 2).mean())


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float | None:
    """Returns the Frechet distance of the normal distributions that two sets of features have.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with means m and unbiased covariances C (Heusel et
    al. 2017). With C = A^T A, the trace of the root is the sum of the singular values of A1 A2^T:
    no root of a singular matrix is needed where there are fewer pictures than features.

    Args:
        first, second: (N, D), (M, D).

    Returns:
        None for fewer than two pictures, which have no covariance.
    """
    if min(len(first), len(second)) < 2:
        return None
    means, roots = [], []
    for features in (first, second):
        x = features.astype(np.float64)
        means.append(x.mean(0))
        x = (x - means[-1]) / math.sqrt(len(x) - 1)
        roots.append(np.asarray(np.linalg.qr(x, mode="r")) if len(x) > x.shape[1] else x)
    own = float((roots[0] ** 2).sum() + (roots[1] ** 2).sum())
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return max(float(((means[0] - means[1]) ** 2).sum()) + own - 2 * shared, 0.0)


def inception_scores(logits: np.ndarray, splits: int) -> Sequence[float]:
    """Returns the Inception Score of each split: exp of the mean divergence from its mean.

    Salimans et al. 2016. Picture i is in split i modulo ``splits``: neighbours in a video resemble
    each other, and splits of whole scenes would have few classes.

    Args:
        logits: (N, K) of the classes, up to a constant for each picture.
        splits: their number.

    Returns:
        () for fewer pictures than splits.
    """
    if len(logits) < splits:
        return ()
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    logs = x - np.log(np.exp(x).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        own = logs[i::splits]
        probs = np.exp(own)
        middle = np.log(probs.mean(0))
        scores.append(math.exp((probs * (own - middle)).sum(1).mean()))
    return scores
