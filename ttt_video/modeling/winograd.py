"""Convolutions of 3x3 pixels by a quarter of the multiplications (Winograd; Lavin and Gray,
arXiv:1509.09308): F(4x4, 3x3), as matrix products that autograd differentiates.

Tiles of 6x6 pixels overlap by two and give 4x4 pixels each. Tiles and weights are transformed by
constant matrices, multiplied number by number, summed over channels and transformed back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tables import shared_table

TILE, STEP = 6, 4
"""Sides in px of the square that a tile reads, and of the one that it gives."""

# Lavin and Gray's matrices B^T, G and A^T, of the points 0, 1, -1, 2, -2 and infinity.
_PIXELS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_WEIGHTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_RESULT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


@shared_table(4)
def _transforms(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the matrices for squares instead of lines: (36, 36), (36, 9) and (16, 36)."""
    lines = [torch.tensor(rows, dtype=torch.float64) for rows in (_PIXELS, _WEIGHTS, _RESULT)]
    pixels, weights, result = (torch.kron(line, line).to(dtype) for line in lines)
    return pixels, weights, result


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``F.conv2d(x, weight, bias, padding=1)`` of 3x3 pixels.

    In float32 it is exact to some 1e-6 (relative, L2), where a sum of products is to some 1e-7.

    Args:
        x: (B, C, H, W), float32 or float64.
        weight: (D, C, 3, 3); bias: (D,).

    Returns:
        (B, D, H, W).
    """
    of_pixels, of_weights, of_result = _transforms(x.dtype)
    batch, channels, height, width = x.shape
    below, right = -height % STEP, -width % STEP
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    rows, columns = (height + below) // STEP, (width + right) // STEP
    tiles = F.unfold(x, TILE, padding=1, stride=STEP).view(batch, channels, TILE**2, -1)
    tiles = (of_pixels @ tiles).permute(2, 1, 0, 3).flatten(2)  # (36, C, tiles of all images)
    weight = (of_weights @ weight.flatten(2).flatten(0, 1).t()).view(TILE**2, -1, channels)
    out = (of_result @ torch.bmm(weight, tiles).flatten(1)).view(
        STEP, STEP, -1, batch, rows, columns
    )
    out = out.permute(3, 2, 4, 0, 5, 1).reshape(batch, -1, height + below, width + right)
    out = out[..., :height, :width]
    return out if bias is None else out + bias[:, None, None]
