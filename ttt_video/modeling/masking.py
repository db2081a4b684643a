"""Random patch masks and patches: pure functions, in one place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Patches left visible: ``floor(N * (1 - ratio))``, immune to 1 - 0.8 = 0.1999..."""
    return math.floor(num_patches * (1.0 - mask_ratio) + 1e-6)


def random_patch_mask(
    height: int,
    width: int,
    *,
    patch_size: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One random visibility mask: 1 = visible, 0 = masked (the polarity of the fourth channel).

    Patches are chosen uniformly without replacement (paper, Section 3; He et al., 2021).

    Args:
        height: px; width: px. Patches at the right and bottom may be cut.
        patch_size: side of a patch, px.
        mask_ratio: share of patches hidden, in [0, 1).
        generator: a CPU generator; None uses torch's global one.
        device: where the mask is spelled out in pixels; patches are drawn on the CPU, so that every
            device sees the same mask.

    Returns:
        (1, height, width) float32.
    """
    rows, columns = math.ceil(height / patch_size), math.ceil(width / patch_size)
    patches = torch.zeros(rows * columns)
    order = torch.randperm(rows * columns, generator=generator)
    patches[order[: num_visible_patches(rows * columns, mask_ratio)]] = 1.0
    pixels = patches.to(device).view(rows, columns).repeat_interleave(patch_size, 0)
    pixels = pixels.repeat_interleave(patch_size, 1)
    return pixels[None, :height, :width].contiguous()


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) to (B, N, patch_size**2 * C); each patch holds rows, then columns, then colours.

    H and W must be multiples of ``patch_size``.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height}x{width} is not a multiple of the patch size {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    patches = images.view(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patchify`: (B, N, patch_size**2 * C) to (B, C, H, W)."""
    rows, columns = height // patch_size, width // patch_size
    pixels = patches.view(patches.shape[0], rows, columns, patch_size, patch_size, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)
