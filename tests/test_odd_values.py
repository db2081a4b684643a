"""Any value of a config's key works, or is refused by one line: no key ends in a traceback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ttt_video import Stream
from ttt_video.config import KEYS, get_cfg, validate_config
from ttt_video.config.borrowed import BORROWED
from ttt_video.errors import UserError

pytestmark = pytest.mark.slow

FRAMES = [np.random.default_rng(k).integers(0, 256, (64, 96, 3), np.uint8) for k in range(2)]
METHODS = {
    "LN_ADAPT": "ln_adapt",
    "LINE_SEARCH": "online_ttt_mae_line_search",
    "SELF_TRAIN": "self_train",
    "CLASS_BALANCE": "self_train",
    "ENSEMBLE": "majority_vote",
}
"""The methods that read these sections of ``TTT``; others are read by the paper's."""


def value_of(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def odd_values(usual: object) -> list[Any]:
    """Returns values of the type that the key takes, which yacs lets through."""
    if isinstance(usual, bool):
        return [not usual]
    if isinstance(usual, int):
        return [-1, 0, 1, 3, 7]
    if isinstance(usual, float):
        return [-1.0, 0.0, 2.5, float("nan"), float("inf")]
    if isinstance(usual, list | tuple):
        return [[], [1], [0, 0], ["x"], [-1.0, 1.0], [0, 0, 0, 0], [1] * 5]
    return ["", "x"]


def cases(prefix: str, keys: Any) -> list[tuple[str, Any]]:
    defaults = get_cfg()
    names = [key for key in keys if key.startswith(prefix)]
    return [(key, value) for key in names for value in odd_values(value_of(defaults, key))]


def unless_refused(action: Callable[[], Any]) -> Any:
    """Returns what a function returns; None if it refuses in one line what it is given."""
    message = ""
    try:
        return action()
    except UserError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    return None


@pytest.mark.parametrize(
    ("key", "value"),
    [case for case in cases("MODEL.", [*BORROWED, *KEYS]) if "RESNETS" not in case[0]]
    + [("MODEL.SEM_SEG_HEAD.CONVS_DIM", value) for value in (0, 1, 48)]
    + [("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", value) for value in (-1, 0, 3)]
    + [("MODEL.SEM_SEG_HEAD.IN_FEATURES", value) for value in ([], ["x"])],
)
def test_a_model_is_built_and_predicts_or_is_refused(tiny_cfg, key, value):
    tiny_cfg.merge_from_list([key, value])

    @torch.no_grad()
    def predict():
        validate_config(tiny_cfg)
        image = torch.from_numpy(FRAMES[0]).permute(2, 0, 1)
        return build_model(tiny_cfg).eval()([{"image": image, "height": 64, "width": 96}])

    for output in unless_refused(predict) or ():
        assert output["sem_seg"].shape[-2:] == (64, 96)


@pytest.mark.parametrize(
    ("key", "value"), [case for case in cases("TTT.", KEYS) if case[0] != "TTT.BY_METHOD"]
)
def test_a_stream_runs_or_is_refused(tiny_cfg, tiny_model, key, value):
    method = METHODS.get(key.split(".")[1], "online_ttt_mae")
    tiny_cfg.merge_from_list(["TTT.METHOD", method, "TTT.BATCH_SIZE", 2, key, value])

    def run():
        validate_config(tiny_cfg)
        return len(list(Stream.from_config(tiny_cfg, tiny_model).run(FRAMES)))

    assert unless_refused(run) in (None, len(FRAMES))
