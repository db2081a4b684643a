"""CUDA graphs on a real GPU: the rows of a stream with them and without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import TINY

from ttt_video.config import load_config
from ttt_video.stream import Stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RELEASE = [
    "TTT.OPTIMIZER.NAME", "ADAMW", "TTT.OPTIMIZER.BASE_LR", "0.0001", "TTT.OPTIMIZER.RESTART",
    "True", "TTT.OPTIMIZER.CLIP_NORM", "0.01",
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_rows_are_those_without_graphs(tiny_model, make_video, mode, precision):
    """Sums in another order differ in their last bits, and these grow from step to step."""
    opts = [
        *TINY, *RELEASE, "MODEL.DEVICE", "cuda", "TTT.STEP_MODE", mode, "TTT.PRECISION", precision,
        "TTT.MICRO_BATCH_SIZE", "2",
    ]  # fmt: skip
    frames = [*make_video("a", 4, 60, 90), *make_video("b", 3, 96, 64)]
    losses: list[list[float]] = []
    scores: list[list[Any]] = []
    for choice in ("off", "auto"):
        cfg = load_config("joint_cityscapes.yaml", opts=[*opts, "TTT.CUDA_GRAPHS", choice])
        stream = Stream.from_config(cfg, copy.deepcopy(tiny_model).cuda())
        adapter: Any = stream.adapter  # type: ignore[union-attr]
        results = [stream.step(frame) for frame in frames]
        assert all(r.record["skipped_steps"] == 0 for r in results)
        losses.append([r.record["loss_recon"] for r in results])
        scores.append([r.output["sem_seg"] for r in results])
        if choice == "auto":
            for runner in (adapter._replayed._runner, adapter._replayed_prediction):
                assert runner._recordable  # the log says why not
                assert len(runner._graphs) == 2  # one for each size
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for plain, replayed in zip(*scores, strict=True):
        torch.testing.assert_close(replayed, plain, rtol=0.02, atol=0.02)
