"""The auxiliary loss l_s, the mean squared error between pixels and their reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .masking import patchify, unpatchify


@dataclass(frozen=True)
class ReconstructionTask:
    """The settings of l_s: ``TTT.RECON.*``.

    Attributes:
        weight: of the loss in joint training.
        region: see :func:`reconstruction_loss`.
        normalize_patch: see :func:`reconstruction_loss`.
    """

    weight: float
    region: str
    normalize_patch: int | None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ReconstructionTask:
        """Returns those of a config; the patches are the mask's."""
        recon = cfg.TTT.RECON
        patch = cfg.TTT.MASK_PATCH_SIZE if recon.NORMALIZE_TARGET else None
        return cls(recon.WEIGHT, recon.REGION, patch)


def patch_statistics(pixels: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each patch over its pixels and colours.

    Both have the shape of ``pixels`` (B, C, H, W) and are constant within a patch.
    """
    patches = patchify(pixels, patch_size)
    mean = patches.mean(dim=-1, keepdim=True).expand_as(patches)
    # MAE's choice: the unbiased variance plus 1e-6.
    std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt().expand_as(patches)
    size = pixels.shape[-2:]
    return unpatchify(mean, patch_size, *size), unpatchify(std, patch_size, *size)


def reconstruction_loss(
    prediction: Tensor,
    pixels: Tensor,
    visible: Tensor,
    *,
    region: str,
    inside: Tensor,
    normalize_patch: int | None = None,
) -> Tensor:
    """Returns the mean over images of the mean squared error over a region of each.

    Args:
        prediction: (B, 3, H, W).
        pixels: (B, 3, H, W), normalised RGB.
        visible: (B, 1, H, W), 1 = visible, 0 = masked.
        region: "masked" or "visible" counts such pixels inside the images; "all" counts every
            pixel, padding included, as the release does.
        inside: (B, 1, H, W), 1 = image, 0 = padding.
        normalize_patch: side in px of the patches whose target is normalised to zero mean and unit
            variance (He et al., 2021), or None.

    Returns:
        A scalar, float32 unless the prediction is float64. An image whose region is empty counts
        as 0.
    """
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    target = pixels
    if normalize_patch is not None:
        mean, std = patch_statistics(pixels, normalize_patch)
        target = (pixels - mean) / std
    error = (prediction - target).square()
    if region == "all":
        return error.mean()
    weight = inside * (1 - visible if region == "masked" else visible)
    # Padding and cut patches make the number of counted pixels differ between images. A mean for
    # each image keeps a batch's loss the mean of its micro-batches' losses.
    summed = (error * weight).sum(dim=(1, 2, 3))
    counted = weight.sum(dim=(1, 2, 3)) * error.shape[1]
    return (summed / counted.clamp(min=1.0)).mean()


def to_pixel_units(prediction: Tensor, pixels: Tensor, normalize_patch: int | None) -> Tensor:
    """Returns a prediction in the units of ``pixels``, to look at: (B, 3, H, W).

    As in MAE's own pictures, the target's statistics undo a normalisation of patches.
    """
    if normalize_patch is None:
        return prediction
    mean, std = patch_statistics(pixels, normalize_patch)
    return prediction * std + mean
