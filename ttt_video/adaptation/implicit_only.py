"""Implicit memory only: the weights go on, the window is the current frame (paper, Table 4)."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from .base import ADAPTER_REGISTRY, require_keys
from .online_ttt_mae import ReconstructionAdapter


@ADAPTER_REGISTRY.register()
def implicit_only(cfg: CfgNode, model: nn.Module) -> ReconstructionAdapter:
    """``--method implicit_only``: online TTT-MAE with k = 1."""
    require_keys(cfg, "implicit_only", WINDOW_SIZE=1, RESET="video")
    return ReconstructionAdapter.from_config(cfg, model)
