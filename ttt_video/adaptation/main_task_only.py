"""Main Task Only: the frozen model, trained without reconstruction (paper, Section 4.1)."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from .base import ADAPTER_REGISTRY
from .no_adaptation import NoAdaptation


@ADAPTER_REGISTRY.register()
def main_task_only(cfg: CfgNode, model: nn.Module) -> NoAdaptation:
    """``--method main_task_only``: which training the weights had, only their maker knows."""
    return NoAdaptation(model)
