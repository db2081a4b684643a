"""The base class of other architectures, which run frozen in the stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor, nn

from ..errors import UserError
from .interface import normalized_images, output_size


class FrozenSegmenter(nn.Module, ABC):
    """A network of another library that speaks detectron2's dicts; for evaluation only."""

    pixel_mean: Tensor
    pixel_std: Tensor

    outputs: ClassVar = frozenset({"sem_seg"})

    size_divisibility = 0
    """Batches are padded to a multiple of so many px; 0 for not at all."""

    def __init__(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        """``pixel_mean`` and ``pixel_std`` are those of uint8 values in ``INPUT.FORMAT`` order."""
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        """The device of the model, to which it moves its inputs."""
        return self.pixel_mean.device

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """Returns (B, K, h, w) class scores of (B, 3, H, W) normalised images, at any size."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Returns ``sem_seg``, (K, height, width) class probabilities, for each input.

        Raises:
            UserError: the model is in training mode.
        """
        if self.training:
            name = type(self).__name__
            raise UserError(f"{name} is a frozen baseline here: train it with its own library")
        batch = normalized_images(
            batched_inputs, self.pixel_mean, self.pixel_std, self.size_divisibility
        )
        logits = F.interpolate(
            self.logits(batch.tensor),
            size=batch.tensor.shape[-2:],
            mode="bilinear",
            align_corners=False,
        )
        results = []
        for x, scores, size in zip(batched_inputs, logits, batch.image_sizes, strict=True):
            scores = sem_seg_postprocess(scores, size, *output_size(x, size))
            results.append({"sem_seg": scores.softmax(0)})
        return results
