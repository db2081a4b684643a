"""Corrects a frame before a model sees it: its noise, and its colours."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .denoising import denoised

LITTLE = 2.0
"""Values of [0, 255] below which an effect is about none."""


class ImageCorrection:
    """Takes noise out of a picture, brings its colours nearer to training images', and blurs it.

    It is stateless: each frame is corrected by its own noise, channel means and deviations.
    """

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        """
        Args:
            mean: (C,) of each channel on training images, of values in [0, 255].
            deviation: (C,) from a picture's own mean, the same.
        """
        self.mean, self.deviation = mean.float(), deviation.float()

    def __call__(
        self, image: Tensor, *, colours: float = 0.0, blur: float = 0.0, denoise: float = 0.0
    ) -> Tensor:
        """Returns a corrected picture; the same object where all are 0.

        Args:
            image: (C, H, W) uint8.
            colours: share in [0, 1] of the way to the training images' means and, by the power of
                it, to their deviations.
            blur: deviation of a Gaussian in pixels.
            denoise: what is taken out as noise, as a multiple of what is found.
        """
        if denoise:  # first, because noise adds to the deviations that colours go by
            image = denoised(image, denoise)
        if colours:
            image = self._coloured(image, colours)
        if blur:
            image = _blurred(image, blur)
        return image

    def _coloured(self, image: Tensor, share: float) -> Tensor:
        pixels = image.float()
        flat = pixels.flatten(1)
        mean = flat.mean(1)  # two means are ten times as fast as std_mean on a CPU
        deviation = (flat.square().mean(1) - mean.square()).clamp_min(0).sqrt()
        # A picture of one colour has no contrast that could be raised.
        factor = (self.deviation.to(mean.device) / deviation.clamp_min(1.0)) ** share
        centre = torch.lerp(mean, self.mean.to(mean.device), share)
        shift = centre - factor * mean
        pixels = torch.addcmul(shift.view(-1, 1, 1), pixels, factor.view(-1, 1, 1))
        return pixels.round_().clamp_(0, 255).to(image.dtype)


def effect(image: Tensor, corrected: Tensor) -> Tensor:
    """Returns what a correction does to a picture: (2, C) mean of the change, and its deviation.

    Args:
        image: (C, H, W) uint8.
        corrected: the same after the correction.
    """
    change = (corrected.float() - image).flatten(1)
    mean = change.mean(1)
    return torch.stack([mean, (change.square().mean(1) - mean.square()).clamp_min(0).sqrt()])


def effect_moved(before: Tensor, now: Tensor) -> float:
    """Returns how far an effect is from another, as a share of the larger one; at most 2.

    Both are :func:`effect`'s. With noise gone a blur has a third of its effect, and with a shift of
    the colours over their correction has another, at the very frame where that happens.
    """
    larger = max(float(before.norm()), float(now.norm()), LITTLE)
    return float((now - before).norm()) / larger


def _blurred(image: Tensor, deviation: float) -> Tensor:
    """Returns (C, H, W) uint8 after a Gaussian, whose borders mirror the picture.

    Sums of shifted pictures are 6 times as fast on a CPU as torchvision's convolution.
    """
    # It is cut off where the picture is too small for it.
    reach = min(math.ceil(3 * deviation), *(side - 1 for side in image.shape[-2:]))
    weights = [math.exp(-((i / deviation) ** 2) / 2) for i in range(-reach, 1)]
    total = 2 * sum(weights) - 1
    pixels = pad(image.float(), [reach] * 4, mode="reflect")
    for axis in (1, 2):
        size = pixels.shape[axis] - 2 * reach
        out = pixels.narrow(axis, reach, size) / total
        for i, weight in enumerate(weights[:-1]):
            pair = pixels.narrow(axis, i, size) + pixels.narrow(axis, 2 * reach - i, size)
            out.add_(pair, alpha=weight / total)
        pixels = out
    return pixels.round_().to(image.dtype)
