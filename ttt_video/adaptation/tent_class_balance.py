"""Tent with class balance (paper, Section 5.1, Table 1)."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from .base import ADAPTER_REGISTRY
from .class_balance import ClassBalance
from .tent import build_tent


@ADAPTER_REGISTRY.register()
def tent_class_balance(cfg: CfgNode, model: nn.Module) -> ClassBalance:
    """``--method tent_class_balance``: with Volpi et al.'s heuristic on top."""
    inner = build_tent(cfg, model, "tent_class_balance")
    return ClassBalance(inner, threshold=cfg.TTT.CLASS_BALANCE.THRESHOLD)
