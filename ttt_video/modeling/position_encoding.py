"""Fixed position embeddings: DETR's, with normalisation, and MAE's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tables import shared_table


@shared_table(64)
def sine_position_embedding(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Returns (1, dim, height, width) float32, of which half the channels encode y, half x.

    Coordinates run over (0, 2 pi]. The result is made once per size and shared; callers must not
    write to it.
    """
    half = dim // 2
    exponent = 2 * torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") / half
    frequency = 10000.0**exponent

    def encode(length: int) -> Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        angle = position / (length + 1e-6) * (2 * math.pi)
        angle = angle[:, None] / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    rows = encode(height)[:, None, :].expand(height, width, half)
    columns = encode(width)[None, :, :].expand(height, width, half)
    return torch.cat([rows, columns], dim=2).permute(2, 0, 1).unsqueeze(0).contiguous()


def mae_position_table(rows: int, columns: int, dim: int) -> Tensor:
    """Returns (1, 1 + rows * columns, dim) float32: zeros for the class token, then the patches.

    The first half of the channels encodes the column and the second the row, each as sines and then
    cosines (the published weights were trained with this order, though MAE's code calls the halves
    h and w). ``dim`` is a multiple of 4.
    """
    quarter = dim // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(length: int) -> Tensor:
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    by_column = encode(columns)[None].expand(rows, columns, -1)
    by_row = encode(rows)[:, None].expand(rows, columns, -1)
    patches = torch.cat([by_column, by_row], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros_like(patches[:1]), patches])[None].float()
