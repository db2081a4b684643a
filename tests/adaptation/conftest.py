"""Fixtures of methods that read norm statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from torch import Tensor

from ttt_video.adaptation.norm_statistics import measure_statistics
from ttt_video.config import merge_method
from ttt_video.modeling.weights import save_safetensors


@pytest.fixture
def source(tiny_model: Any, make_video: Any) -> dict[str, Tensor]:
    """Statistics of the tiny model's norms on a few frames."""
    return measure_statistics(tiny_model, [f["image"] for f in make_video("source")])


@pytest.fixture
def cfg_with_statistics(
    tiny_cfg: CfgNode, source: dict[str, Tensor], tmp_path: Path
) -> Callable[..., CfgNode]:
    """Returns a function that gives a method the tiny config, with large steps on two samples."""

    def config(method: str, *pairs: Any) -> CfgNode:
        file = tmp_path / "norms.safetensors"
        save_safetensors(source, file)
        merge_method(tiny_cfg, method)
        own = ["TTT.BATCH_SIZE", 2, "TTT.OPTIMIZER.BASE_LR", 0.1]
        own += ["TTT.LN_ADAPT.SOURCE_STATISTICS", str(file)]
        tiny_cfg.merge_from_list([*own, *pairs])
        return tiny_cfg

    return config
