"""Average precision of instance masks, as COCO defines it: pure functions.

A frame's record holds, for every detection, whether it is right or ignored at each of 10 IoU
thresholds and 4 ranges of object size; precision and recall over any set of frames follow from it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
AREA_RANGES = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))
"""Pixels, both ends included: all, small, medium, large."""
MAX_DETECTIONS = 100
"""Of each class in one frame, the highest scoring ones."""

_SHAPE = (len(AREA_RANGES), len(IOU_THRESHOLDS))
_PIXELS_AT_ONCE = 2**16

ClassRecord = Mapping[str, Any]
"""One class in one frame, as JSON has it.

``labelled``: for each area range the number of objects that count. ``scores``: of the detections,
falling. ``right`` and ``ignored``: for each detection an integer with bit 10 a + t set where that
is so in area range a at IoU threshold t; a detection that is neither is a false positive.
"""


ClassPrecision = Mapping[int, np.ndarray]
"""Class id to its (4, 10) AP by area range and IoU threshold, from 0 to 1; NaN without objects."""


def mask_overlaps(predicted: Tensor, labelled: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each prediction, and pixels that each shares with each object.

    Args:
        predicted, labelled: (D, H, W), (G, H, W) masks, 1 inside, else 0, of any type.

    Returns:
        (D,) and (D, G) float64.
    """
    p, g = predicted.flatten(1), labelled.flatten(1)
    sums = torch.zeros(len(p), len(g) + 1, dtype=torch.float64, device=p.device)
    for start in range(0, p.shape[1], _PIXELS_AT_ONCE):
        part = p[:, start : start + _PIXELS_AT_ONCE].float()
        columns = g[:, start : start + _PIXELS_AT_ONCE].to(part)
        # So few ones are summed without rounding in float32.
        ones = part.new_ones(1, part.shape[1])
        sums += part @ torch.cat([columns, ones]).T
    result = sums.cpu().numpy()
    return result[:, -1], result[:, :-1]


def mask_ious(
    shared: np.ndarray, areas: np.ndarray, labelled_areas: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    """(D, G) IoUs, of a crowd the share of the prediction that it covers; 0 where none is shared.

    Args:
        shared: (D, G) pixels.
        areas, labelled_areas: (D,), (G,) pixels.
        crowd: (G,) bool.
    """
    union = areas[:, None] + np.where(crowd, 0.0, labelled_areas - shared)
    return np.divide(shared, union, out=np.zeros(shared.shape), where=shared > 0)


def match_class(
    scores: Sequence[float],
    areas: np.ndarray,
    ious: np.ndarray,
    labelled_areas: np.ndarray,
    crowd: np.ndarray,
) -> dict[str, Any]:
    """Match the detections of one class in one frame to its objects.

    In falling order of score each detection takes, at each threshold, the free object that it
    overlaps most (the last of equals). Crowds and objects out of the area range are taken only when
    nothing else fits, and who takes one is ignored, as are unmatched detections out of the range;
    a crowd may be taken many times.

    Args:
        scores: of D detections.
        areas: (D,) pixels.
        ious: (D, G) of :func:`mask_ious`.
        labelled_areas, crowd: (G,).

    Returns:
        A :data:`ClassRecord`.
    """
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")[:MAX_DETECTIONS]
    ious = ious[order]
    low, high = np.array(AREA_RANGES).T[:, :, None]
    outside = (labelled_areas < low) | (labelled_areas > high)
    passed_over = (crowd | outside)[:, None]  # (A, 1, G)
    right = np.zeros((len(order), *_SHAPE), dtype=bool)
    ignored = np.repeat(
        ((areas[order] < low) | (areas[order] > high)).T[:, :, None], _SHAPE[1], axis=2
    )
    taken = np.zeros((*_SHAPE, len(crowd)), dtype=bool)
    # Pycocotools lets an IoU of 1 - 1e-10 pass for a threshold of 1, which is none of ours.
    for d in np.flatnonzero((ious >= IOU_THRESHOLDS[0]).any(1)):
        free = (ious[d] >= IOU_THRESHOLDS[:, None]) & (~taken | crowd)  # (A, T, G)
        regular = free & ~passed_over
        hit = regular.any(2)
        candidates = np.where(hit[..., None], regular, free)
        matched = candidates.any(2)
        best = len(crowd) - 1 - np.where(candidates, ious[d], -1.0)[..., ::-1].argmax(2)
        a, t = np.nonzero(matched)
        taken[a, t, best[a, t]] = True
        right[d] = hit
        ignored[d] = np.where(matched, ~hit, ignored[d])
    bits = 1 << np.arange(math.prod(_SHAPE), dtype=np.int64).reshape(_SHAPE)
    return {
        "labelled": (~passed_over).sum((1, 2)).tolist(),
        "scores": [_shortest(scores[i]) for i in order],
        "right": (right * bits).sum((1, 2)).tolist(),
        "ignored": (ignored * bits).sum((1, 2)).tolist(),
    }


def _shortest(score: float) -> float:
    """A float32 score with no more digits than tell it from its neighbours: the order stays."""
    single = np.float32(score)
    return float(str(single)) if float(single) == score else float(score)


class Detections:
    """The records of one class in one video, in arrays: about 30 bytes a detection."""

    def __init__(self) -> None:
        self.labelled = [0] * len(AREA_RANGES)
        self.frames = array("q")
        self.scores = array("d")
        self.right = array("q")
        self.ignored = array("q")

    def add(self, frame_index: int, record: ClassRecord) -> None:
        """Adds a frame, in any order of frames."""
        self.labelled = [n + m for n, m in zip(self.labelled, record["labelled"], strict=True)]
        self.frames.extend([frame_index] * len(record["scores"]))
        self.scores.extend(record["scores"])
        self.right.extend(record["right"])
        self.ignored.extend(record["ignored"])


def average_precision(
    videos: Sequence[Detections], ranges: Sequence[int] = range(len(AREA_RANGES))
) -> np.ndarray:
    """AP of one class.

    Args:
        videos: their order, and that of the frames, decides between detections of equal score.
        ranges: positions of the area ranges to compute; NaN elsewhere.

    Returns:
        (4, 10) by area range and IoU threshold, from 0 to 1: the mean over 101 levels of recall of
        the highest precision at that recall or above. NaN in area ranges without an object.
    """
    by_frame = [np.argsort(np.asarray(video.frames), kind="stable") for video in videos]

    def joined(name: str) -> np.ndarray:
        parts = zip(videos, by_frame, strict=True)
        return np.concatenate([np.asarray(getattr(video, name))[order] for video, order in parts])

    result = np.full(_SHAPE, np.nan)
    objects = np.sum([video.labelled for video in videos], axis=0)
    scores = joined("scores")
    order = np.argsort(-scores, kind="stable")
    right, ignored = joined("right")[order], joined("ignored")[order]
    for a in ranges:
        if objects[a] == 0:
            continue
        bits = (a * _SHAPE[1] + np.arange(_SHAPE[1]))[:, None]  # (T, 1)
        is_right = right >> bits & 1
        counts = is_right | ~ignored >> bits & 1
        true, both = np.cumsum(is_right, axis=1), np.cumsum(counts, axis=1)
        precision = true / (both + np.spacing(1))
        # The highest precision from here on.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for t, recall in enumerate(true / objects[a]):
            first = np.searchsorted(recall, RECALL_THRESHOLDS, side="left")
            reached = precision[t][first[first < len(scores)]]
            result[a, t] = math.fsum(reached) / len(RECALL_THRESHOLDS)
    return result


def class_average_precision(videos: Iterable[Mapping[int, Detections]]) -> dict[int, np.ndarray]:
    """:func:`average_precision` of each class, in order of their ids, over several videos."""
    by_class: dict[int, list[Detections]] = {}
    for video in videos:
        for k, own in video.items():
            by_class.setdefault(k, []).append(own)
    return {k: average_precision(own) for k, own in sorted(by_class.items())}


def mean_precision(
    by_class: ClassPrecision, area: int, threshold: int | None = None
) -> float | None:
    """Returns AP in percent, the mean over the classes that have such objects; None if none has.

    Args:
        by_class: of :func:`class_average_precision`.
        area: position among :data:`AREA_RANGES`.
        threshold: position among :data:`IOU_THRESHOLDS`; None for the mean over all of them.
    """
    values = [ap[area] if threshold is None else ap[area, [threshold]] for ap in by_class.values()]
    values = [v for v in values if not np.isnan(v).any()]
    if not values:
        return None
    return 100 * math.fsum(x for v in values for x in v) / (len(values) * len(values[0]))


def frame_average_precision(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """AP of one frame alone, in percent: by the field's rule and by the release's.

    In the release the ground truth are all segments, so that a labelled stuff class, which an
    instance model never predicts, counts as 0 in the mean over classes. None where there is
    nothing to average.

    Args:
        record: ``things``: class id to its record. ``stuff``: number of labelled stuff classes.
    """
    values = []
    for own in record["things"].values():
        if own["labelled"][0]:
            detections = Detections()
            detections.add(0, own)
            values.append(100 * float(np.mean(average_precision([detections], ranges=[0])[0])))
    total, everything = math.fsum(values), len(values) + record["stuff"]
    return (
        total / len(values) if values else None,
        total / everything if everything else None,
    )
