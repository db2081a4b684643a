"""MAE Joint Training: the frozen model, trained with reconstruction (paper, Section 4.1)."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from ..errors import UserError
from ..modeling.interface import parts_of
from .base import ADAPTER_REGISTRY
from .no_adaptation import NoAdaptation


@ADAPTER_REGISTRY.register()
def joint_training(cfg: CfgNode, model: nn.Module) -> NoAdaptation:
    """``--method joint_training``: weights without decoder g were not trained jointly."""
    if "g" not in parts_of(model):
        raise UserError(
            "the weights have no decoder g, so they were not trained jointly: give "
            "others, or call them --method main_task_only"
        )
    return NoAdaptation(model)
