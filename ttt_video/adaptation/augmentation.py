"""What happens to a sampled frame before it is masked: crop, mirror image, scale jitter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

PAD_VALUE = 128
"""Fill of crops that reach outside the image, as in detectron2's FixedSizeCrop."""


@dataclass(frozen=True)
class RandomCrop:
    """A random crop of an image on its device; no copy is made until the batch is put together.

    Attributes:
        size: (height, width) of the crop, px; None keeps the whole image. Without scale jitter a
            side of the image that is shorter than the crop's is kept whole.
        flip: mirror left-right with probability 1/2.
        resize: factor on the image's sides before anything is cropped; 0.5 has a step see a
            quarter of the pixels.
        scale_range: large-scale jitter: the image is first resized to fit into the crop's size
            times a factor drawn from this range, and a short crop is padded with 128.
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
        if self.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        if self.resize != 1:
            image = _rescaled(image, self.resize)
        if self.size is None:
            return image
        if self.scale_range is not None:
            low, high = self.scale_range
            factor = low + (high - low) * torch.rand((), generator=generator).item()
            image = self._fitted(image, factor)
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

    def _fitted(self, image: Tensor, factor: float) -> Tensor:
        assert self.size is not None
        height, width = image.shape[-2:]
        return _rescaled(image, factor * min(self.size[0] / height, self.size[1] / width))


def _rescaled(image: Tensor, factor: float) -> Tensor:
    height, width = (max(round(side * factor), 1) for side in image.shape[-2:])
    resized = F.interpolate(
        image[None].float(),
        size=(height, width),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)
