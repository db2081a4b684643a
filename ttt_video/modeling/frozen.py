"""The base class of other architectures, which run frozen in the stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
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

    def __init__(self, cfg: CfgNode) -> None:
        """Reads ``MODEL.PIXEL_*``, which are statistics of uint8 values."""
        super().__init__()
        for name, values in ("mean", cfg.MODEL.PIXEL_MEAN), ("std", cfg.MODEL.PIXEL_STD):
            self.register_buffer(f"pixel_{name}", torch.tensor(values).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """Returns (B, K, h, w) class scores of (B, 3, H, W) normalised images, at any size."""

    def prediction_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """Returns ``scores``, which are probabilities, and ``labels``.

        They are those of :class:`~ttt_video.modeling.interface.ExportableModel`.
        """
        samples = [{"image": image} for image in images]
        pixels = normalized_images(
            samples, self.pixel_mean, self.pixel_std, self.size_divisibility
        ).tensor
        logits = F.interpolate(
            self.logits(pixels), size=pixels.shape[-2:], mode="bilinear", align_corners=False
        )
        scores = logits[..., : images.shape[-2], : images.shape[-1]].softmax(1)
        return {"scores": scores, "labels": scores.argmax(1).int()}

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
