"""Fixtures of methods that read norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from torch import Tensor

from ttt_video.adaptation.head_signal import measure_head
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


@pytest.fixture
def head(tiny_model: Any, make_video: Any) -> dict[str, Tensor]:
    """Measurements of the tiny model's head on a few frames."""
    images = [frame["image"] for name in "abcd" for frame in make_video(f"source {name}")]
    return measure_head(tiny_model, images, ["h"])


@pytest.fixture
def change_cfg(
    cfg_with_statistics: Callable[..., CfgNode], head: dict[str, Tensor], tmp_path: Path
) -> CfgNode:
    """The tiny config of learn_on_change."""
    file = tmp_path / "head.safetensors"
    save_safetensors(head, file)
    # A step without a look at the loss after it is a single pass.
    pairs = ["TTT.OPTIMIZER.MAX_LOSS_GROWTH", 0.0, "TTT.LEARN_ON_CHANGE.SOURCE_HEAD", str(file)]
    return cfg_with_statistics("learn_on_change", *pairs)
