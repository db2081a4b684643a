"""The class distributions of pixels that mask classification implies, and their entropy.

Query q of Mask2Former has class probabilities p_q(k), of which the last is "no object", and at
pixel x a mask probability m_q(x). With o_q = 1 - p_q(no object):

    s_k(x)       = sum_q p_q(k) m_q(x)              (the score that semantic inference compares)
    P(nothing|x) = prod_q (1 - o_q m_q(x))          (no query is an object and covers x)
    P(k|x)       = (1 - P(nothing|x)) s_k(x) / sum_j s_j(x)

"No object" is a statement about a query, so it has no part in s_k; a pixel is nothing only where no
query claims it. Everything is computed at the stride of the mask logits (4 px).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import ImageList
from torch import Tensor

EPSILON = 1e-12
"""Keeps logarithms finite; it is below the smallest score that matters."""


class PixelClasses(NamedTuple):
    """Log probabilities at each pixel.

    classes: (B, K, H, W), log P(k | x, something), which sums to 1 over k.
    something: (B, H, W), log(1 - P(nothing|x)).
    nothing: (B, H, W), log P(nothing|x).
    """

    classes: Tensor
    something: Tensor
    nothing: Tensor

    @classmethod
    def of_logits(cls, logits: Tensor) -> PixelClasses:
        """Returns the distribution of (B, K, H, W) logits of classes, where no pixel is nothing."""
        classes = logits.float().log_softmax(1)
        something = torch.zeros_like(classes[:, 0])
        return cls(classes, something, torch.full_like(something, math.log(EPSILON)))


def pixel_classes(class_logits: Tensor, mask_logits: Tensor) -> PixelClasses:
    """Returns the distribution above in float32.

    ``class_logits`` are (B, Q, K + 1) with "no object" last, ``mask_logits`` (B, Q, H, W).
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        probs = class_logits.float().softmax(-1)[..., :-1]
        masks = mask_logits.float().sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", probs, masks).clamp(min=EPSILON)
        classes = (scores / scores.sum(1, keepdim=True)).log()
        covers = probs.sum(-1)[..., None, None] * masks
        nothing = torch.log1p(-covers.clamp(max=1 - 1e-6)).sum(1)
        something = torch.log((-torch.expm1(nothing)).clamp(min=EPSILON))
    return PixelClasses(classes, something, nothing)


def pixel_entropy(pixels: PixelClasses, *, background: bool) -> Tensor:
    """Returns the entropy of each pixel's distribution, in nats: (B, H, W).

    With ``background`` (instance and panoptic segmentation) a pixel may be nothing: the entropy of
    P(.|x) over K + 1 outcomes. Without (semantic segmentation) every pixel gets a class: the
    entropy of P(k | x, something), at most log K.
    """
    entropy = -(pixels.classes.exp() * pixels.classes).sum(1)
    if not background:
        return entropy
    # The chain rule: something or nothing, and if something, which class.
    something, nothing = pixels.something.exp(), pixels.nothing.exp()
    return something * (entropy - pixels.something) - nothing * pixels.nothing


class PixelLabels(NamedTuple):
    """A prediction as labels to train on.

    classes: (B, N, H, W) int64, the N classes of which a pixel's label is made.
    weights: (B, N, H, W), their shares in it, of sum 1.
    confidence: (B, H, W), the probability that the prediction gives to its label.
    """

    classes: Tensor
    weights: Tensor
    confidence: Tensor


def likeliest_classes(pixels: PixelClasses) -> PixelLabels:
    """Returns the likeliest class of each pixel as its label, with P(k|x)."""
    confidence, labels = pixels.classes.max(1, keepdim=True)
    confidence = (confidence[:, 0] + pixels.something).exp()
    return PixelLabels(labels, torch.ones_like(labels, dtype=confidence.dtype), confidence)


class MainTask(NamedTuple):
    """The output of head h for a batch.

    pixels: the class distributions of pixels.
    inside: (B, H, W) float, 0 at cells that only cover padding, else 1.
    labels: makes labels of such distributions, for methods that train on predictions.
    """

    pixels: PixelClasses
    inside: Tensor
    labels: Callable[[PixelClasses], PixelLabels] = likeliest_classes

    def mean(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Returns the mean of (B, H, W) values over each image, then over the images.

        With ``where``, only those pixels of an image count. An image without any counts as 0.
        """
        weight = self.inside if where is None else self.inside * where
        counted = weight.sum((1, 2)).clamp(min=1.0)
        return ((values * weight).sum((1, 2)) / counted).mean()


def image_area(images: ImageList, rows: int, columns: int) -> Tensor:
    """Returns 1 for cells of a map that cover image, 0 for padding alone: (B, rows, columns)."""
    inside = torch.zeros(len(images), rows, columns, device=images.tensor.device)
    stride = images.tensor.shape[-1] / columns
    for cells, size in zip(inside, images.image_sizes, strict=True):
        rows, columns = covered_cells(size, stride)
        cells[:rows, :columns].fill_(1)
    return inside


def covered_cells(size: Sequence[int], stride: float) -> tuple[int, int]:
    """Returns how many rows and columns of a map an image of (height, width) px reaches into."""
    height, width = size
    return math.ceil(height / stride), math.ceil(width / stride)
