"""Tent: entropy minimisation over normalisation parameters (paper, Appendix A.2; Wang 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .augmentation import RandomCrop
from .base import ADAPTER_REGISTRY
from .gradient import GradientAdapter
from .pixel_classes import main_task, pixel_entropy
from .window import Sample


class EntropyAdapter(GradientAdapter):
    """Minimises the mean entropy of the pixels' class distributions; the head h stays h0."""

    parts = ("backbone", "sem_seg_head")

    def __init__(
        self,
        model: nn.Module,
        *,
        augment: RandomCrop,
        modules: Sequence[str] = ("backbone",),
        **settings: Any,
    ) -> None:
        """``settings`` are :class:`GradientAdapter`'s; ``augment`` prepares each sample."""
        super().__init__(model, modules=modules, **settings)
        self.augment = augment

    def losses(self, batch: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
        """``loss_entropy`` in nats (:mod:`~ttt_video.adaptation.pixel_classes`).

        Of a model that also segments semantically, objects decide: its pixels may be nothing.
        """
        inputs = [{"image": self.augment(x["image"], generator)} for x in batch]
        prediction = main_task(self.model, inputs)
        background = bool(self.model.instance_on or self.model.panoptic_on)
        entropy = pixel_entropy(prediction.pixels, background=background)
        return {"loss_entropy": prediction.mean(entropy)}


@ADAPTER_REGISTRY.register()
def tent(cfg: CfgNode, model: nn.Module) -> EntropyAdapter:
    """``--method tent``: in the same loop as online TTT-MAE, with both memories."""
    return EntropyAdapter(
        model, augment=RandomCrop.from_config(cfg), **GradientAdapter.config_arguments(cfg)
    )
