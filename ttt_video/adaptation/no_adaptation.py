"""The frozen model, which is the baseline of every comparison."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import nn

from .base import ADAPTER_REGISTRY, Adapter
from .window import SlidingWindow


class NoAdaptation(Adapter):
    """Predicts every frame with the source weights."""

    updates = False

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Does nothing."""
        return {}

    def reset(self) -> None:
        """Does nothing: the weights never moved."""


@ADAPTER_REGISTRY.register()
def none(cfg: CfgNode, model: nn.Module) -> NoAdaptation:
    """Builds ``--method none``."""

    return NoAdaptation(model)
