"""Self-training with class balance (paper, Section 5.1, Table 1)."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from .base import ADAPTER_REGISTRY
from .class_balance import ClassBalance
from .self_train import self_train


@ADAPTER_REGISTRY.register()
def self_train_class_balance(cfg: CfgNode, model: nn.Module) -> ClassBalance:
    """``--method self_train_class_balance``: with Volpi et al.'s heuristic on top."""
    return ClassBalance(self_train(cfg, model), threshold=cfg.TTT.CLASS_BALANCE.THRESHOLD)
