"""Every registered method keeps the contract."""

from __future__ import annotations

import pytest
import torch
from contract import AdapterContract
from torch import nn

from ttt_video.adaptation import ADAPTER_REGISTRY, NoAdaptation, ReconstructionAdapter
from ttt_video.adaptation.base import build_adapter
from ttt_video.errors import UserError


class TestNoAdaptation(AdapterContract):
    method = "none"
    adapts = False

    def test_is_the_model_itself(self, runner, tiny_model, make_video):
        video = make_video()
        results = list(runner.run(video))
        with torch.no_grad():
            expected = [tiny_model([frame])[0]["sem_seg"] for frame in video]
        for result, scores in zip(results, expected, strict=True):
            assert torch.equal(result.output["sem_seg"], scores)
            assert result.record == {}


class TestOnlineTTTMAE(AdapterContract):
    method = "online_ttt_mae"


class TestOnlineTTTMAEWithEverySourceOfRandomness(AdapterContract):
    method = "online_ttt_mae"
    settings = (
        "TTT.STEP_MODE", "train",
        "TTT.SAMPLING", "shuffled_epochs",
        "TTT.OPTIMIZER.NAME", "ADAMW",
        "TTT.OPTIMIZER.BASE_LR", 0.001,
        "TTT.OPTIMIZER.WEIGHT_DECAY", 0.05,
        "TTT.OPTIMIZER.CLIP_NORM", 0.01,
        "TTT.MICRO_BATCH_SIZE", 3,
        "TTT.CROP.SIZE", "[32, 64]",
        "TTT.CROP.FLIP", True,
        "TTT.CROP.SCALE_RANGE", "[0.5, 2.0]",
    )  # fmt: skip


class TestMajorityVoteOverOnlineTTTMAE(AdapterContract):
    method = "majority_vote"
    settings = (
        "TTT.ENSEMBLE.METHOD", "online_ttt_mae",
        "TTT.ENSEMBLE.PREDICTIONS", 2,
        "TTT.ENSEMBLE.SCALE_RANGE", "[0.5, 1.2]",
    )  # fmt: skip


class TestTemporalSmoothingOverOnlineTTTMAE(AdapterContract):
    method = "temporal_smoothing"
    settings = ("TTT.ENSEMBLE.METHOD", "online_ttt_mae", "TTT.ENSEMBLE.WINDOW_SIZE", 2)


def test_every_registered_method_is_under_contract():
    tested = {cls.method for cls in AdapterContract.__subclasses__()}
    assert tested == {name for name, _ in ADAPTER_REGISTRY}


def test_methods_by_name(tiny_cfg, tiny_model):
    for name, cls in (("none", NoAdaptation), ("online_ttt_mae", ReconstructionAdapter)):
        tiny_cfg.TTT.METHOD = name
        assert type(build_adapter(tiny_cfg, tiny_model)) is cls


def test_an_unknown_method_is_named_with_those_there_are(tiny_cfg):
    tiny_cfg.TTT.METHOD = "online_ttt"
    with pytest.raises(UserError, match=r"'online_ttt'.*none, online_ttt_mae"):
        build_adapter(tiny_cfg, nn.Identity())
