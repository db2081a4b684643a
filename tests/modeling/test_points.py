"""Points of masks against detectron2's project PointRend, bit for bit, and by hand."""

from __future__ import annotations

import pytest
import torch
from detectron2.projects.point_rend import point_features as theirs

from ttt_video.modeling.points import point_sample, uncertain_points


def test_values_are_read_as_pointrend_reads_them():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, 5, 7, generator=generator, requires_grad=True)
    points = torch.rand(3, 11, 2, generator=generator) * 1.4 - 0.2  # outside as well
    ours = point_sample(maps, points)
    expected = theirs.point_sample(maps, points, align_corners=False)
    assert torch.equal(ours, expected)
    weights = torch.randn(ours.shape, generator=generator)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), maps)
    (other,) = torch.autograd.grad((expected * weights).sum(), maps)
    assert torch.equal(gradient, other)


def test_values_by_hand():
    maps = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [0.25, 0.5], [0.0, 0.25]]])
    assert point_sample(maps, points).tolist() == [[[1.0, 3.0, 4.0, 3.0, 0.5]]]


@pytest.mark.parametrize("masks", [0, 1, 4])
@pytest.mark.parametrize(
    ("oversample", "importance"), [(3.0, 0.75), (1.0, 0.0), (2.5, 1.0), (3.0, 0.5)]
)
def test_points_are_drawn_as_pointrend_draws_them(masks, oversample, importance):
    logits = torch.randn(masks, 1, 6, 9, generator=torch.Generator().manual_seed(masks))
    drawn = []
    for draw in (
        lambda: uncertain_points(
            logits, 13, oversample_ratio=oversample, importance_sample_ratio=importance
        ),
        lambda: theirs.get_uncertain_point_coords_with_randomness(
            logits, lambda x: -x.abs(), 13, oversample, importance
        ),
    ):
        torch.manual_seed(5)
        drawn.append((draw(), torch.rand(3)))  # the generator too is where it was
    (ours, after), (expected, after_theirs) = drawn
    assert ours.shape == (masks, 13, 2)
    assert torch.equal(ours, expected)
    assert torch.equal(after, after_theirs)
