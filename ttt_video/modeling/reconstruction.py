"""The self-supervised loss l_s: mean squared error between pixels and their reconstruction."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Mean and standard deviation of each patch over all its pixels and colours.

    Returns:
        Two tensors of the shape of ``pixels`` (B, C, H, W), constant within a patch.
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
    """Mean squared error over a region of each image, then the mean over the images.

    Args:
        prediction: (B, 3, H, W).
        pixels: (B, 3, H, W), normalised RGB.
        visible: (B, 1, H, W), 1 = visible, 0 = masked.
        region: "masked" or "visible" count those pixels inside the images; "all" counts every
            pixel, padding included, as the published code does.
        inside: (B, 1, H, W), 1 = image, 0 = padding.
        normalize_patch: side in px of the patches whose target is normalised to zero mean and unit
            variance (He et al., 2021), or None.

    Returns:
        A float32 scalar; an image whose region is empty counts as 0.
    """
    prediction = prediction.float()
    target = pixels
    if normalize_patch is not None:
        mean, std = patch_statistics(pixels, normalize_patch)
        target = (pixels - mean) / std
    error = (prediction - target).square()
    if region == "all":
        return error.mean()
    weight = inside * (1 - visible if region == "masked" else visible)
    # Per image, so that a batch's loss is the mean of its micro-batches' losses: padding and cut
    # patches make the number of counted pixels differ between images.
    summed = (error * weight).sum(dim=(1, 2, 3))
    counted = weight.sum(dim=(1, 2, 3)) * error.shape[1]
    return (summed / counted.clamp(min=1.0)).mean()


def to_pixel_units(prediction: Tensor, pixels: Tensor, normalize_patch: int | None) -> Tensor:
    """A prediction in the units of ``pixels``, to look at: (B, 3, H, W).

    A per-patch normalised prediction is brought back with its target's statistics, as in MAE's own
    pictures.
    """
    if normalize_patch is None:
        return prediction
    mean, std = patch_statistics(pixels, normalize_patch)
    return prediction * std + mean
