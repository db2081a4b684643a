"""TTT-MAE No Memory: each frame alone, from the source weights (paper, Equation 1, Table 1)."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from .base import ADAPTER_REGISTRY, require_keys
from .online_ttt_mae import ReconstructionAdapter


@ADAPTER_REGISTRY.register()
def ttt_mae_no_memory(cfg: CfgNode, model: nn.Module) -> ReconstructionAdapter:
    """``--method ttt_mae_no_memory``: ``TTT.STEPS_PER_FRAME`` steps, then all is forgotten."""
    require_keys(cfg, "ttt_mae_no_memory", WINDOW_SIZE=1, RESET="frame")
    return ReconstructionAdapter.from_config(cfg, model)
