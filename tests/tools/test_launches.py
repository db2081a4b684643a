"""Counts of operations, against sums by hand."""

from __future__ import annotations

import torch
from costs.launches import count_launches, launches
from tiny import TINY

from ttt_video.config import load_config


def test_kernels_are_counted_forward_and_backward_and_views_are_not():
    x = torch.ones(2, 3, requires_grad=True)
    forward = count_launches(lambda: (x.view(6)[:4] * 2).sum())
    assert dict(forward) == {"mul": 1, "sum": 1}
    loss = (x * 2).sum()
    # The gradient of the sum is a view of 1.
    assert dict(count_launches(loss.backward)) == {"ones_like": 1, "mul": 1}


def test_graphs_leave_little_to_issue():
    """Two micro-batches of a step are two launches; losses, norm and update stay outside."""
    opts = [*TINY, "TTT.BATCH_SIZE", "4", "TTT.MICRO_BATCH_SIZE", "2"]
    counts = launches(load_config("joint_cityscapes.yaml", opts=opts), (32, 64))
    assert counts["step"]["graphs"] == 2
    assert counts["prediction"]["graphs"] == 1
    assert 0 < counts["step"]["outside"] < counts["step"]["eager"] / 5
    assert 0 < counts["prediction"]["outside"] < counts["prediction"]["eager"] / 5
