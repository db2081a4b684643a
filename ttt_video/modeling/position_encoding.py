"""Fixed sine position embeddings as DETR's, with normalisation."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # a shared tensor must also serve autograd
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
