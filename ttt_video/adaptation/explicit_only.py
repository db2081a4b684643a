"""Explicit memory only: a window, and the source weights at every frame (paper, Table 4)."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from .base import ADAPTER_REGISTRY, require_keys
from .online_ttt_mae import ReconstructionAdapter


@ADAPTER_REGISTRY.register()
def explicit_only(cfg: CfgNode, model: nn.Module) -> ReconstructionAdapter:
    """``--method explicit_only``: online TTT-MAE that is reset before every update."""
    require_keys(cfg, "explicit_only", RESET="frame")
    return ReconstructionAdapter.from_config(cfg, model)
