"""Takes noise out of a picture: non-local means, as strong as the noise that the picture has.

Non-local means average pixels whose surroundings are alike (Buades, Coll and Morel, "A non-local
algorithm for image denoising", CVPR 2005), so edges and small things stay where a blur takes them
away with the noise. How strong the noise is depends on the brightness, and is estimated from the
picture by that (Liu et al., "Automatic estimation and removal of noise from a single image", TPAMI
2008). Nothing is built for a frame but its own values; no value is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .denoising_cpu import averaged_on_cpu

BINS = 16
"""Equal ranges of brightness, each with a noise of its own."""
SAMPLES = 8192
"""The most pixels that the noise is estimated from; of a larger picture every n-th each way."""
ENOUGH = 32
"""Pixels without which a range of brightness has the noise of the nearest one that has them."""
REACH, SPACING = 12, 3
"""Pixels are compared in a disc of this radius, on a lattice of this spacing and next to each
other: a wide disc on a lattice is worth more than a narrow one without gaps that costs the same."""
GROUP = 2**23
"""So many pixels are compared at once, where whole pictures are: few operations, bounded memory."""
MEDIAN_OF_NOISE = 0.6745 * 6
"""Median of a Laplacian's magnitude, [1, -2, 1] each way, on noise of deviation 1."""
MOST = 2048
"""Laplacians of this magnitude and more count alike; their noise has a deviation of 500."""
ROUNDING = 12**-0.5
"""Deviation of the error of rounding to whole values."""


def denoised(image: Tensor, strength: float = 1.0) -> Tensor:
    """Returns (C, H, W) uint8 without noise; the same object under 3x3 pixels.

    Args:
        image: (C, H, W) uint8.
        strength: what is taken for noise, as a multiple of what is found.
    """
    channels, height, width = image.shape
    if min(height, width) < 3:
        return image
    pixels = image.float()
    brightness = pixels.sum(0)
    # Brightness, and in a picture with colours the difference that tells red from blue.
    planes = torch.stack([brightness, pixels[0] - pixels[-1]][: 1 + (channels > 1)])
    noise = noise_levels(planes, channels).mul_(strength)
    # Where noise has the deviation 1 whatever the brightness, two pixels differ by noise alone
    # where the mean of their surroundings' squared differences is 2.
    place = brightness.long()
    planes[0] = (1 / noise[0]).cumsum(0)[place]
    planes[1:] /= noise[1:, place]
    planes = pad(planes, [1] * 4, mode="reflect")
    average = averaged_on_cpu if image.device.type == "cpu" else averaged
    return average(planes, pixels, neighbours()).round_().to(image.dtype)


def averaged(planes: Tensor, pixels: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
    """Returns (C, H, W) means of pixels whose surroundings are alike.

    Args:
        planes: (P, H + 2, W + 2) what surroundings are compared by, with noise of deviation 1.
        pixels: (C, H, W).
        offsets: (down, right) of the pixels that are compared with one, down or right of it; those
            opposite to it are compared, too.
    """
    height, width = pixels.shape[-2:]
    reach = max(max(down, abs(right)) for down, right in offsets)
    # Beyond the picture there are pixels whose value and weight are 0.
    own = torch.cat([pixels, torch.ones_like(pixels[:1])])
    around, surroundings = (pad(x, [reach] * 4) for x in (own, planes))
    total = around.clone()

    def at(values: Tensor, down: int, right: int, more: int = 0) -> Tensor:
        top, left = reach + down, reach + right
        return values[:, top : top + height + more, left : left + width + more]

    size = max(1, GROUP // (height * width))
    for group in (offsets[i : i + size] for i in range(0, len(offsets), size)):
        difference = torch.stack([at(surroundings, *offset, 2) for offset in group])
        weight = _sums_of_3x3(difference.sub_(planes).square_().sum(1))
        weight.mul_(-1 / (18 * len(planes))).add_(2).clamp_(0, 1).square_()
        alike = torch.stack([at(around, *offset) for offset in group])
        at(total, 0, 0).add_(alike.mul_(weight[:, None]).sum(0))
        for offset, one in zip(group, own * weight[:, None], strict=True):
            at(total, *offset).add_(one)  # each weight is that of a pair
    *channels, weights = at(total, 0, 0)
    return torch.stack(channels) / weights


def noise_levels(planes: Tensor, channels: int) -> Tensor:
    """Returns (P, 256 * channels) deviation of each plane's noise at each brightness.

    It is that by which the mean over planes of squared differences is 2 where noise alone differs.

    A Laplacian leaves little of a picture but noise, and the median leaves out its edges.

    Args:
        planes: (P, H, W) sums and differences of up to ``channels`` channels, of whole values in
            [0, 255] each; the first is the sum of all, the brightness. 3x3 or larger.
        channels: of the picture.
    """
    _, height, width = planes.shape
    every = max(1, math.ceil(((height - 2) * (width - 2) / SAMPLES) ** 0.5))
    rows = [planes[:, i : height - 2 + i : every] for i in range(3)]
    columns = [slice(i, width - 2 + i, every) for i in range(3)]
    bent = rows[0] - 2 * rows[1] + rows[2]
    bent = bent[..., columns[0]] - 2 * bent[..., columns[1]] + bent[..., columns[2]]
    around = rows[0][0] + rows[1][0] + rows[2][0]
    around = around[:, columns[0]] + around[:, columns[1]] + around[:, columns[2]]
    constants = _constants(channels, planes.device)
    bins = (around.flatten() * (BINS / (9 * 256 * channels))).long()
    # Whole values are counted, which is faster than to sort them.
    values = bent.abs_().flatten(1).clamp_max_(MOST - 1).long().add_(bins, alpha=MOST)
    table = torch.zeros(len(planes), BINS * MOST, dtype=torch.int32, device=planes.device)
    table.scatter_add_(1, values, constants.one.expand_as(values))
    smaller = table.view(-1, BINS, MOST).cumsum(2, dtype=torch.int32)
    counts = smaller[0, :, -1]
    levels = (smaller <= counts[:, None] // 2).sum(2)
    enough = counts >= counts.max().clamp_max(ENOUGH)
    nearest = (constants.apart + (BINS * ~enough)).argmin(1)
    found = levels[:, nearest] / MEDIAN_OF_NOISE
    levels = found.clamp_min(ROUNDING * channels**0.5)
    # A plane without noise, such as the colours of a grey picture, adds no difference to the mean.
    share = (found / levels).square().mean(0).clamp_min(1 / len(planes))
    levels = levels * share.sqrt()
    return torch.lerp(levels[:, constants.below], levels[:, constants.above], constants.share)


def _sums_of_3x3(values: Tensor) -> Tensor:
    """Returns (..., H - 2, W - 2) sums over the 3x3 surroundings of (..., H, W)."""
    rows = values[..., :-2, :] + values[..., 1:-1, :]
    rows += values[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1]
    sums += rows[..., 2:]
    return sums


class _Constants:
    """How far bins are apart; and of a brightness, the bins whose middles it lies between."""

    def __init__(self, channels: int, device: torch.device) -> None:
        bins = torch.arange(BINS, device=device)
        self.apart = (bins[:, None] - bins).abs()
        self.one = torch.ones(1, 1, dtype=torch.int32, device=device)
        place = torch.arange(256.0 * channels, device=device) * (BINS / (256 * channels)) - 0.5
        place.clamp_(0, BINS - 1)
        self.below, self.share = place.long(), place.frac()
        self.above = (self.below + 1).clamp_max(BINS - 1)


@cache
def _constants(channels: int, device: torch.device) -> _Constants:
    return _Constants(channels, device)


@cache
def neighbours() -> tuple[tuple[int, int], ...]:
    """Returns one offset (down, right) of each pair of opposite ones."""
    reach = range(-REACH, REACH + 1)
    return tuple(
        (down, right)
        for down in range(REACH + 1)
        for right in reach
        if (down, right) > (0, 0)
        and down**2 + right**2 <= REACH**2
        and (down**2 + right**2 <= 2 or (down % SPACING == 0 and right % SPACING == 0))
    )
