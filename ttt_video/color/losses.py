"""Losses of colorization: cross entropy with soft, rebalanced targets, and robust regression."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bins import SoftBins
from .lab import AB_UNIT, at_least_single

BETA = 1 / AB_UNIT
"""Where the robust loss becomes linear: an error of one unit of ab."""


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """Returns the values as they are; their gradient is multiplied by the factor, broadcast."""
    return _ScaledGradient.apply(values, factor)


def classification_loss(
    logits: Tensor,
    targets: SoftBins,
    bin_weights: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Returns the cross entropy of the pixels' colours, in nats, their mean; float32 at least.

    As in Zhang et al. (2016) a pixel's weight, that of its nearest bin, multiplies the gradient and
    not the loss.

    Args:
        logits: (B, Q, H, W).
        targets: of the same size; see :meth:`ColorBins.encode`.
        bin_weights: (Q,), of :func:`rebalancing_weights`; None: all 1.
        counted: (B, H, W), 1 at pixels that count, 0 at padding and in grey images; None: all. The
            loss is the mean of the images' means, and an image without such pixels has 0.
    """
    logits = at_least_single(logits)
    if bin_weights is not None:
        logits = scale_gradient(logits, bin_weights.to(logits)[targets.indices[:, :1]])
    log_probs = logits.log_softmax(1).gather(1, targets.indices)
    return _mean(-(targets.weights * log_probs).sum(1), counted)


def regression_loss(predicted: Tensor, ab: Tensor, counted: Tensor | None = None) -> Tensor:
    """Returns the robust error of predicted colours: smooth L1 of a plus that of b, pixels' mean.

    As in Zhang et al. (2017): an error is squared below one unit of ab, absolute beyond it.

    Args:
        predicted: (B, 2, H, W), in units of 110 (:data:`AB_UNIT`).
        ab: (B, 2, H, W), the colours, in units of ab.
        counted: as in :func:`classification_loss`.

    Returns:
        In units of 110.
    """
    predicted = at_least_single(predicted)
    target = (ab / AB_UNIT).to(predicted)
    errors = F.smooth_l1_loss(predicted, target, beta=BETA, reduction="none")
    return _mean(errors.sum(1), counted)


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    if counted is None:
        return values.mean()
    counted = counted.to(values)
    summed = (values * counted).sum((1, 2))
    return (summed / counted.sum((1, 2)).clamp(min=1)).mean()
