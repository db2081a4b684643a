"""Tent minimises entropy over normalisation parameters (paper, Appendix A.2; Wang et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..modeling.graphs import stacked, unstacked
from ..modeling.interface import OBJECT_OUTPUTS, adaptable
from ..modeling.pixel_classes import pixel_entropy
from .augmentation import RandomCrop
from .base import ADAPTER_REGISTRY, require_classes
from .gradient import GradientAdapter
from .window import Sample


class EntropyAdapter(GradientAdapter):
    """Minimises the mean entropy of the pixels' class distributions; the head h stays h0."""

    parts = ("f", "h")

    def __init__(
        self,
        model: nn.Module,
        *,
        augment: RandomCrop,
        modules: Sequence[str] = ("f",),
        **settings: Any,
    ) -> None:
        """``settings`` are :class:`GradientAdapter`'s; ``augment`` prepares each sample.

        Raises:
            UserError: the model has no classes.
        """
        super().__init__(model, modules=modules, **settings)
        # A bin of colours is no class: many colours are right, and the least entropy has one.
        require_classes(model, "tent")
        self.augment = augment

    def losses(self, batch: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
        """Returns ``loss_entropy`` in nats (:mod:`~ttt_video.modeling.pixel_classes`).

        If the model predicts objects, alone or with classes, a pixel may also be of no object.
        """
        return self._entropy([{"image": self.augment(x["image"], generator)} for x in batch])

    def inputs(self, batch: list[Sample], generator: torch.Generator) -> Sequence[Tensor] | None:
        """Returns the images as one tensor; None if their sizes differ."""
        images = stacked([self.augment(x["image"], generator) for x in batch])
        return None if images is None else (images,)

    def losses_of(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Returns :meth:`losses` of stacked images."""
        return self._entropy(unstacked(inputs[0]))

    def _entropy(self, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        model = adaptable(self.model)
        prediction = model.main_task(inputs)
        background = bool(model.outputs & OBJECT_OUTPUTS)
        entropy = pixel_entropy(prediction.pixels, background=background)
        return {"loss_entropy": prediction.mean(entropy)}


@ADAPTER_REGISTRY.register()
def tent(cfg: CfgNode, model: nn.Module) -> EntropyAdapter:
    """Builds ``--method tent``, with both kinds of memory."""
    return EntropyAdapter(
        model, augment=RandomCrop.from_config(cfg), **GradientAdapter.config_arguments(cfg)
    )
