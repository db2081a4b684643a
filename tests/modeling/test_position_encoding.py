"""The sine position embedding against its formula, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from ttt_video.modeling.position_encoding import sine_position_embedding

CPU = torch.device("cpu")


def formula(height: int, width: int, dim: int, channel: int, y: int, x: int) -> float:
    """DETR: the first half of the channels is y, the second x; sine and cosine alternate."""
    half = dim // 2
    length, position = (height, y) if channel < half else (width, x)
    channel %= half
    angle = 2 * math.pi * (position + 1) / (length + 1e-6)
    angle /= 10000 ** (2 * (channel // 2) / half)
    return math.sin(angle) if channel % 2 == 0 else math.cos(angle)


@pytest.mark.parametrize(("height", "width", "dim"), [(1, 1, 4), (3, 5, 8), (7, 2, 12)])
def test_every_value(height, width, dim):
    position = sine_position_embedding(height, width, dim, CPU)
    assert position.shape == (1, dim, height, width)
    assert position.dtype == torch.float32
    for c in range(dim):
        for y in range(height):
            for x in range(width):
                expected = formula(height, width, dim, c, y, x)
                assert position[0, c, y, x].item() == pytest.approx(expected, abs=1e-5)


def test_made_once_per_size():
    assert sine_position_embedding(3, 4, 8, CPU) is sine_position_embedding(3, 4, 8, CPU)
    assert sine_position_embedding(4, 3, 8, CPU).shape == (1, 8, 4, 3)


def test_made_in_inference_mode_serves_training():
    """The stream predicts first and trains on the same size after."""
    with torch.inference_mode():
        position = sine_position_embedding(11, 13, 8, CPU)  # a size of this test alone
    weight = torch.ones(8, 1, 1, requires_grad=True)
    (position * weight).sum().backward()
    torch.testing.assert_close(weight.grad[:, 0, 0], position.sum((0, 2, 3)))
