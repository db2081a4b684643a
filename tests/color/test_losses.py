"""Losses of colorization by hand and against PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ttt_video.color.bins import ColorBins, SoftBins
from ttt_video.color.losses import classification_loss, regression_loss, scale_gradient


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def targets() -> SoftBins:
    return ColorBins().double().encode(30 * noise(2, 2, 3, 4))


def test_cross_entropy_is_torchs_with_soft_targets(targets):
    logits = noise(2, 313, 3, 4, seed=1)
    expected = F.cross_entropy(logits, targets.dense(313))
    torch.testing.assert_close(classification_loss(logits, targets), expected)


def test_two_pixels_by_hand():
    # Probabilities 1/4 and 3/4; targets all of bin 0, and half and half, bin 1 first.
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(3)]]).double()[None, :, None]
    logits.requires_grad_()
    targets = SoftBins(
        torch.tensor([[0, 1], [1, 0]])[None, :, None],
        torch.tensor([[1.0, 0.5], [0.0, 0.5]]).double()[None, :, None],
    )
    weights = torch.tensor([2.0, 10.0])
    loss = classification_loss(logits, targets, weights)
    first, second = math.log(4), (math.log(4) + math.log(4 / 3)) / 2
    assert loss.item() == pytest.approx((first + second) / 2)
    loss.backward()
    # (p - target) / pixels, times the weight of the pixel's nearest bin: 2 and 10.
    expected = [[-0.75 / 2 * 2, -0.25 / 2 * 10], [0.75 / 2 * 2, 0.25 / 2 * 10]]
    torch.testing.assert_close(logits.grad[0, :, 0], torch.tensor(expected).double())


def test_weights_scale_the_gradient_and_leave_the_loss(targets):
    weights = torch.rand(313, generator=torch.Generator().manual_seed(0)).double() + 0.5
    plain, weighted = (noise(2, 313, 3, 4, seed=1).requires_grad_() for _ in range(2))
    loss = classification_loss(plain, targets)
    same = classification_loss(weighted, targets, weights)
    assert torch.equal(loss, same)
    loss.backward()
    same.backward()
    nearest = targets.dense(313).argmax(1)
    torch.testing.assert_close(weighted.grad, plain.grad * weights[nearest][:, None])


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_only_pixels_that_count_have_a_part(targets, kind):
    def loss(values, counted=None, rows=slice(None)):
        if kind == "regression":
            return regression_loss(values[:, :2, rows], ab[:, :, rows], counted)
        return classification_loss(
            values[:, :, rows], SoftBins(*(t[:, :, rows] for t in targets)), None, counted
        )

    values, ab = noise(2, 313, 3, 4, seed=1), 50 * noise(2, 2, 3, 4, seed=2)
    counted = torch.ones(2, 3, 4)
    torch.testing.assert_close(loss(values, counted), loss(values))
    counted[:, 1:] = 0
    torch.testing.assert_close(loss(values, counted), loss(values, rows=slice(1)))
    values.requires_grad_()
    nothing = loss(values, torch.zeros(2, 3, 4))
    nothing.backward()
    assert nothing.item() == 0
    assert not values.grad.any()


def test_regression_by_hand():
    # Errors of 55 and 0.5 in a and b: 1/2 - 1/220 beyond a unit, 0.5^2 / 2 / 110 below it.
    ab = torch.tensor([-55.0, 11.0])[None, :, None, None]
    predicted = torch.tensor([0.0, 11.5 / 110])[None, :, None, None]
    expected = 0.5 - 1 / 220 + 0.125 / 110
    assert regression_loss(predicted, ab).item() == pytest.approx(expected, abs=1e-7)


def test_regression_is_torchs_huber():
    predicted, ab = noise(2, 2, 5, 6), 110 * noise(2, 2, 5, 6, seed=1)
    # Huber's loss is smooth L1 times its threshold; the channels' mean is half their sum.
    expected = 2 * 110 * F.huber_loss(predicted, ab / 110, delta=1 / 110)
    torch.testing.assert_close(regression_loss(predicted, ab), expected)


def test_half_precision_is_summed_in_single(targets):
    logits = noise(2, 313, 3, 4, seed=1).half()
    loss = classification_loss(logits, SoftBins(targets.indices, targets.weights.float()))
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), targets.dense(313))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_scaled_gradient_by_hand():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = scale_gradient(x, torch.tensor([3.0]))
    assert torch.equal(y, x)
    (y * torch.tensor([5.0, 7.0])).sum().backward()
    assert x.grad.tolist() == [15.0, 21.0]
