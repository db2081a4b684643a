"""Semantic segmentation: a class for every pixel, scored by mean IoU.

A frame's record has the true positive, false positive and false negative pixels of each class,
which serve every way of averaging.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator

from ..errors import UserError
from ..formats.coco_masks import LABELLED_ONLY
from ..formats.labels import check_class_ids, present_ids, read_sem_seg
from ..visualization.overlay import ClassPainter, class_palette
from .base import DO_THEY_AGREE, OTHER_CLASS, Augmented, Painter, Target, Task, once
from .metrics import FRAMES, FrameMean, Metric, Record, Tally, add_counts
from .outputs import class_map, other_classes
from .registry import TASK_REGISTRY
from .stills import CheckedLabels

Counts = Mapping[str, Sequence[int]]
"""Class id to (true positive, false positive, false negative) pixels, without all-zero classes.

Ids are strings and counts are lists, as in JSON.
"""


def confusion_matrix(
    predicted: np.ndarray, labels: np.ndarray, num_classes: int, ignore_label: int = 255
) -> np.ndarray:
    """Counts pixels by (label, prediction): (K, K) int64.

    Args:
        predicted: (H, W) integers in 0..K-1.
        labels: (H, W) integers in 0..K-1, or ``ignore_label``, which does not count.
        num_classes: K.
        ignore_label: label of unlabelled pixels.

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
    if ignore_label >= 0:  # no label is negative
        counts[ignore_label] = 0
    wrong = np.flatnonzero(counts[num_classes:].any(1))
    if len(wrong):
        raise ValueError(f"label {wrong[0] + num_classes} is not a class of 0..{num_classes - 1}")
    return counts[:num_classes]


def class_counts(confusion: np.ndarray) -> dict[str, list[int]]:
    """Returns the :data:`Counts` of a (K, K) confusion matrix."""
    true_positive = np.diagonal(confusion)
    false_positive = confusion.sum(0) - true_positive
    false_negative = confusion.sum(1) - true_positive
    table = np.stack([true_positive, false_positive, false_negative], axis=1).tolist()
    return {str(k): counts for k, counts in enumerate(table) if any(counts)}


def class_iou(counts: Counts) -> dict[int, float]:
    """Returns the IoU in percent of each class that occurs in the labels.

    As in today's detectron2, a class that is only predicted has none; its pixels still count as
    false negatives of other classes.
    """
    return {int(k): 100.0 * t / (t + p + n) for k, (t, p, n) in counts.items() if t + n > 0}


def mean_iou(counts: Counts) -> float | None:
    """Returns the mean of :func:`class_iou` in percent; None if nothing is labelled."""
    values = class_iou(counts).values()
    return math.fsum(values) / len(values) if values else None


def mean_iou_release(counts: Counts) -> float | None:
    """Returns the mean IoU in percent by the release's rule; None if nothing is labelled.

    The rule is that of detectron2 0.6: a class that occurs in no label counts as 0 in the mean if
    it is predicted on labelled pixels.
    """
    values = class_iou(counts).values()
    return math.fsum(values) / len(counts) if values else None


class _PixelTally(Tally):
    sum = staticmethod(add_counts)


@TASK_REGISTRY.register()
class SemanticTask(Task):
    """Reads label maps (``sem_seg_file_name``); a record has the :data:`Counts` of a frame."""

    name = "sem_seg"
    kind = "semantic"
    label_keys = ("sem_seg_file_name",)
    output_keys = ("sem_seg",)
    evaluator_types = ("sem_seg", "cityscapes_sem_seg", "video_sem_seg")
    headline = "mIoU"
    streaming = True
    tally = _PixelTally
    switch = "MODEL.MASK_FORMER.TEST.SEMANTIC_ON"
    picture_rank = 0
    difference = OTHER_CLASS
    mappers = {"mask_former_semantic": "crop"}  # noqa: RUF012

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        predicted, num_classes = once(class_map, output), len(output["sem_seg"])
        labels = once(read_sem_seg, frame)
        assert predicted is not None
        file_name, ignore_label = frame["sem_seg_file_name"], self.info.ignore_label
        classes = len(self.info.classes)
        try:
            confusion = confusion_matrix(predicted, labels, num_classes, ignore_label)
        except ValueError as error:
            check_class_ids(present_ids(labels), classes, ignore_label, file_name)
            raise UserError(
                f"{file_name} does not fit the predictions ({error}): {DO_THEY_AGREE}"
            ) from error
        check_class_ids(np.flatnonzero(confusion.any(1)).tolist(), classes, ignore_label, file_name)
        return class_counts(confusion)

    def missed(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """Counts every labelled pixel as a false negative of its class."""
        if self.record(frame, output) is None:
            return None
        labels = once(read_sem_seg, frame)
        classes, pixels = np.unique(labels[labels != self.info.ignore_label], return_counts=True)
        pairs = zip(classes.tolist(), pixels.tolist(), strict=True)
        return {str(k): [0, 0, count] for k, count in pairs}

    @classmethod
    def painter(cls, output: Mapping[str, Any], metadata: Any) -> Painter:
        """Colours every pixel by its class."""
        count, classes = len(output["sem_seg"]), once(class_map, output)
        assert classes is not None
        names = cls.drawn_names(metadata, count)[:count]
        return ClassPainter(classes, class_palette(metadata, count), names)

    @classmethod
    def differing(cls, output: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Returns the percentage of pixels that have another class."""
        return other_classes(output, other)

    @classmethod
    def label_map(cls, record: Mapping[str, Any]) -> np.ndarray:
        return read_sem_seg(dict(record))

    @classmethod
    def draw_labels(cls, canvas: Any, record: Mapping[str, Any], metadata: Any) -> Any:
        """Draws classes with their names."""
        return canvas.draw_sem_seg(cls.label_map(record), area_threshold=0)

    training_labels = label_map

    @classmethod
    def training_target(cls, labels: Any, record: Mapping[str, Any], image: Augmented) -> Target:
        """Makes one mask per class that occurs in the (H, W) labels."""
        classes = np.unique(labels)
        classes = classes[classes != image.ignore_label]
        return classes.astype(np.int64), labels[None] == classes[:, None, None]

    @classmethod
    def still_evaluator(cls, cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """Scores pixels as detectron2 does; Cityscapes' train ids need no cityscapesScripts."""
        try:
            return SemSegEvaluator(
                dataset_name, output_dir=output_dir, sem_seg_loading_fn=CheckedLabels(dataset_name)
            )
        except KeyError as error:
            raise UserError(
                f"data set {dataset_name!r} has images without {error}; {LABELLED_ONLY}"
            ) from error


@SemanticTask.add_metric
class MeanIoU(Metric):
    """Mean IoU of the pixels of all frames."""

    name = "mIoU"
    rule = (
        "IoU of each class over the pixels of all frames pooled; mean over the classes "
        "that occur in the labels; pixels labelled as void do not count"
    )
    value = frame = staticmethod(mean_iou)
    by_class = staticmethod(class_iou)
    per_class = "IoU"
    example = ([{"0": [1, 0, 1]}, {"0": [3, 1, 0]}], 100 * 4 / 6)


@SemanticTask.add_metric
class MeanIoUOfFrames(FrameMean):
    """Mean over frames of each frame's mean IoU, by the release's rule."""

    name = "mIoU_frame_release"
    rule = (
        "IoU of each class in each single frame; mean over the classes "
        "that are labelled or predicted there, 0 where predicted but not labelled" + FRAMES
    )
    frame = staticmethod(mean_iou_release)
    example = ([{"0": [1, 0, 1]}, {"0": [3, 1, 0], "1": [0, 1, 0]}], (50 + 75 / 2) / 2)
