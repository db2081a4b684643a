"""Semantic segmentation counts and mean IoU: pure functions of label maps.

Every number is computed from per-frame counts of true positive, false positive and false negative
pixels by class, so that a frame's record serves every way of averaging.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Counts = Mapping[str, Sequence[int]]
"""Class id to (true positive, false positive, false negative) pixels; all-zero classes left out.

Ids are strings and counts lists, as JSON has them.
"""


def confusion_matrix(
    predicted: np.ndarray, labels: np.ndarray, num_classes: int, ignore_label: int = 255
) -> np.ndarray:
    """Pixels by (label, prediction).

    Args:
        predicted: (H, W) integers in 0..K-1.
        labels: (H, W) integers in 0..K-1, or ``ignore_label``: such pixels do not count.
        num_classes: K.
        ignore_label: label of unlabelled pixels.

    Returns:
        (K, K) int64.

    Raises:
        ValueError: shapes differ, or a label or prediction is out of range.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"prediction {predicted.shape} and labels {labels.shape} differ in shape")
    largest = max(num_classes - 1, ignore_label)
    for name, values, last in (
        ("label", labels, largest),
        ("prediction", predicted, num_classes - 1),
    ):
        for value in (values.min(initial=0), values.max(initial=0)):
            if not 0 <= value <= last:
                raise ValueError(f"{name} {value} is not a class of 0..{num_classes - 1}")
    pairs = labels.astype(np.intp)
    pairs *= num_classes
    pairs += predicted
    counts = np.bincount(pairs.ravel(), minlength=(largest + 1) * num_classes)
    counts = counts.reshape(-1, num_classes)
    counts[ignore_label] = 0
    wrong = np.flatnonzero(counts[num_classes:].any(1))
    if len(wrong):
        raise ValueError(f"label {wrong[0] + num_classes} is not a class of 0..{num_classes - 1}")
    return counts[:num_classes]


def class_counts(confusion: np.ndarray) -> dict[str, list[int]]:
    """:data:`Counts` of (K, K) pixels by (label, prediction)."""
    true_positive = np.diagonal(confusion)
    false_positive = confusion.sum(0) - true_positive
    false_negative = confusion.sum(1) - true_positive
    table = np.stack([true_positive, false_positive, false_negative], axis=1).tolist()
    return {str(k): counts for k, counts in enumerate(table) if any(counts)}


def add_counts(many: Iterable[Counts]) -> dict[str, list[int]]:
    """Counts of several frames pooled, sorted by class."""
    total: dict[str, list[int]] = {}
    for counts in many:
        for k, values in counts.items():
            sums = total.setdefault(k, [0, 0, 0])
            for i, value in enumerate(values):
                sums[i] += value
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def class_iou(counts: Counts) -> dict[int, float]:
    """Intersection over union in percent of the classes that occur in the labels.

    A class that is predicted but never labelled is left out, as in today's detectron2; its pixels
    still count as false negatives of the classes they hide.
    """
    return {int(k): 100.0 * t / (t + p + n) for k, (t, p, n) in counts.items() if t + n > 0}


def mean_iou(counts: Counts) -> float | None:
    """Mean of :func:`class_iou` in percent; None where nothing is labelled."""
    values = class_iou(counts).values()
    return math.fsum(values) / len(values) if values else None


def mean_iou_release(counts: Counts) -> float | None:
    """Mean IoU in percent over the classes that are labelled or predicted; None without labels.

    The rule of detectron2 0.6, on which the authors' release runs: a class that is predicted
    somewhere on labelled pixels, but occurs in no label, counts as 0 in the mean.
    """
    values = class_iou(counts).values()
    return math.fsum(values) / len(counts) if values else None
