"""Changes frames at random: crops for gradient steps, and altered copies for a majority vote."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from ..color.lab import in_three_channels, is_one_plane

PAD_VALUE = 128
"""Fill of crops that reach outside the image, as in detectron2's FixedSizeCrop."""


@dataclass(frozen=True)
class RandomCrop:
    """Crops an image at random, on its device and without a copy.

    Attributes:
        size: (height, width) of the crop, px; None keeps the whole image. Without scale jitter a
            side of the image that is shorter than the crop's is kept whole.
        flip: mirror left-right with probability 1/2.
        resize: factor on the image's sides before the crop; 0.5 leaves a quarter of the pixels.
        scale_range: large-scale jitter: the image is resized to fit into the crop's size times a
            factor drawn from this range, and a short crop is padded with 128.
    """

    size: tuple[int, int] | None = None
    flip: bool = False
    scale_range: tuple[float, float] | None = None
    resize: float = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> RandomCrop:
        """Reads ``TTT.CROP.*``."""
        crop = cfg.TTT.CROP
        return cls(
            size=tuple(crop.SIZE) or None,
            flip=crop.FLIP,
            scale_range=tuple(crop.SCALE_RANGE) or None,
            resize=crop.RESIZE,
        )

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Augments one (3, H, W) uint8 image with draws from a CPU generator."""
        if is_one_plane(image):
            return in_three_channels(self._augmented(image[:1], generator))
        return self._augmented(image, generator)

    def _augmented(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if self.flip and coin(generator):
            image = image.flip(-1)
        if self.resize != 1:
            image = _rescaled(image, self.resize)
        if self.size is None:
            return image
        if self.scale_range is not None:
            fit = min(side / own for side, own in zip(self.size, image.shape[-2:], strict=True))
            image = _rescaled(image, uniform(*self.scale_range, generator) * fit)
        top, left = (
            int(torch.randint(max(length - side, 0) + 1, (), generator=generator))
            for length, side in zip(image.shape[-2:], self.size, strict=True)
        )
        image = image[:, top : top + self.size[0], left : left + self.size[1]]
        if self.scale_range is not None:
            height, width = image.shape[-2:]
            padding = (0, self.size[1] - width, 0, self.size[0] - height)
            image = F.pad(image, padding, value=PAD_VALUE)
        return image


def _rescaled(image: Tensor, factor: float) -> Tensor:
    size = tuple(max(round(side * factor), 1) for side in image.shape[-2:])
    if size == image.shape[-2:]:
        return image
    resized = F.interpolate(
        image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Returns one draw from [low, high)."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def coin(generator: torch.Generator) -> bool:
    """Returns True with probability 1/2."""
    return torch.rand((), generator=generator).item() < 0.5


def shift_hsv(pixels: Tensor, *, hue: float = 0.0, saturation: float = 1.0) -> Tensor:
    """Turns the hue by a share of the circle and multiplies the saturation (at most to 1).

    Args:
        pixels: (3, H, W) float in 0..255, RGB (for BGR the hue turns the other way).
        hue: 1 is the full circle; saturation: factor, at least 0.
    """
    value, low = pixels.amax(0), pixels.amin(0)
    chroma = value - low
    safe = chroma.clamp(min=1e-6)
    r, g, b = pixels
    turn = torch.where(
        value == r,
        (g - b) / safe,
        torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe),
    )
    turn = turn + 6 * hue
    chroma = torch.minimum(chroma * saturation, value)
    # Red, green and blue are one curve over the colour circle, read at three places.
    place = (torch.tensor([5.0, 3.0, 1.0], device=pixels.device)[:, None, None] + turn) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def jitter_color(image: Tensor, generator: torch.Generator) -> Tensor:
    """Applies SSD's colour jitter as in training: brightness, contrast, saturation and hue.

    Each is applied with probability 1/2; contrast comes before or after the other two. The hue
    turns both ways alike, so that the order of the channels does not matter.

    Args:
        image: (3, H, W) uint8.
        generator: on the CPU.
    """
    pixels = image.float()
    if coin(generator):
        pixels = (pixels + uniform(-32, 32, generator)).clamp(0, 255)
    contrast = uniform(0.5, 1.5, generator) if coin(generator) else 1.0
    saturation = uniform(0.5, 1.5, generator) if coin(generator) else 1.0
    hue = uniform(-0.1, 0.1, generator) if coin(generator) else 0.0
    if coin(generator):
        pixels = shift_hsv((pixels * contrast).clamp(0, 255), hue=hue, saturation=saturation)
    else:
        pixels = shift_hsv(pixels, hue=hue, saturation=saturation) * contrast
    return pixels.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class VoteAugmentation:
    """Applies the training recipe without its crop, because every pixel needs its vote.

    Attributes:
        scale_range: factor on the network's input size; (1, 1) does not resize.
        flip: mirror left-right with probability 1/2.
        color: :func:`jitter_color`.
    """

    scale_range: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    color: bool = True

    def __call__(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, bool]:
        """Returns an altered (3, h, w) uint8 image, and whether it is mirrored."""
        image = _rescaled(image, uniform(*self.scale_range, generator))
        if self.color:
            image = jitter_color(image, generator)
        mirrored = self.flip and coin(generator)
        return (image.flip(-1) if mirrored else image), mirrored
