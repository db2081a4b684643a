"""Majority vote over predictions of augmented copies of a frame (paper, Section 5.1)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from .base import ADAPTER_REGISTRY, Adapter
from .ensemble import EnsembleAdapter, wrapped_method


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """One draw from [low, high)."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def coin(generator: torch.Generator) -> bool:
    """True with probability 1/2."""
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
    """SSD's colour jitter as in training: brightness, contrast, saturation and hue.

    Each happens with probability 1/2; contrast comes before or after the other two. The hue turns
    both ways alike, so that the order of the channels does not matter.

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
    """One draw of the training recipe, without its crop: every pixel has to get its vote.

    Attributes:
        scale_range: factor on the network's input size; (1, 1) does not resize.
        flip: mirror left-right with probability 1/2.
        color: :func:`jitter_color`.
    """

    scale_range: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    color: bool = True

    def __call__(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, bool]:
        """An altered (3, h, w) uint8 image, and whether it is mirrored."""
        height, width = image.shape[-2:]
        factor = uniform(*self.scale_range, generator)
        size = (max(round(height * factor), 1), max(round(width * factor), 1))
        if size != (height, width):
            resized = F.interpolate(
                image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True
            )
            image = resized[0].round().clamp(0, 255).to(torch.uint8)
        if self.color:
            image = jitter_color(image, generator)
        mirrored = self.flip and coin(generator)
        return (image.flip(-1) if mirrored else image), mirrored


class MajorityVote(EnsembleAdapter):
    """Each pixel gets the class that most of ``predictions`` predictions give it.

    The first prediction is of the frame as it is and decides ties, so that one prediction is the
    wrapped method's. Draws depend on the seed and on the frame alone: they touch neither the
    wrapped method's random numbers nor those of other frames.
    """

    def __init__(
        self, inner: Adapter, *, predictions: int, augment: VoteAugmentation, seed: int = 0
    ) -> None:
        """``predictions``: at least 1; ``augment`` alters all but the first; ``seed``: of it."""
        super().__init__(inner)
        if predictions < 1:
            raise ValueError(f"a vote needs at least one prediction, not {predictions}")
        self.predictions = predictions
        self.augment = augment
        self.seed = seed

    def predict(self, frame: Any) -> dict[str, Any]:
        """``sem_seg``: (K, H, W) shares of the votes, which sum to 1 in each pixel."""
        name = f"{self.seed}/{frame.get('video_id')}/{frame.get('frame_index')}/vote"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        height, width = frame["image"].shape[-2:]
        frame = {"height": height, "width": width, **frame}
        output = self.inner.predict(frame)
        plain = output["sem_seg"].argmax(0, keepdim=True)
        votes = torch.zeros_like(output["sem_seg"], dtype=torch.float32)
        votes.scatter_(0, plain, 1.5)  # half a vote turns ties, and nothing else
        one = votes.new_ones(()).expand(plain.shape)
        for _ in range(self.predictions - 1):
            image, mirrored = self.augment(frame["image"], generator)
            labels = self.inner.predict({**frame, "image": image})["sem_seg"].argmax(0, True)
            votes.scatter_add_(0, labels.flip(-1) if mirrored else labels, one)
        return {**output, "sem_seg": votes / (self.predictions + 0.5)}


@ADAPTER_REGISTRY.register()
def majority_vote(cfg: CfgNode, model: nn.Module) -> MajorityVote:
    """``--method majority_vote``: ``TTT.ENSEMBLE.PREDICTIONS`` votes."""
    settings = cfg.TTT.ENSEMBLE
    augment = VoteAugmentation(
        scale_range=tuple(settings.SCALE_RANGE), flip=settings.FLIP, color=settings.COLOR
    )
    return MajorityVote(
        wrapped_method(cfg, model),
        predictions=settings.PREDICTIONS,
        augment=augment,
        seed=max(cfg.SEED, 0),
    )
