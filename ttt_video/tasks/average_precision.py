"""Average precision of instance masks as COCO defines it, in pure functions.

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
"""Ranges of pixels, both ends included: all, small, medium, large."""
MAX_DETECTIONS = 100
"""Only so many detections of a class in a frame count, by falling score."""

_SHAPE = (len(AREA_RANGES), len(IOU_THRESHOLDS))
_PIXELS_AT_ONCE = 2**16

ClassRecord = Mapping[str, Any]
"""One class in one frame, as in JSON.

``labelled`` has for each area range the number of objects that count. ``scores`` has those of the
detections, falling. ``right`` and ``ignored`` have an integer for each detection, with bit 10 a + t
set if it is so in area range a at IoU threshold t; a detection that is neither is a false positive.
"""


ClassPrecision = Mapping[int, np.ndarray]
"""Class id to its :func:`average_precision`."""


def mask_overlaps(predicted: Tensor, labelled: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Counts the pixels of each prediction (D,), and those it shares with each object (D, G).

    ``predicted`` (D, H, W) and ``labelled`` (G, H, W) are masks of any type, 1 inside, else 0; the
    results are float64.
    """
    p, g = predicted.flatten(1), labelled.flatten(1)
    sums = torch.zeros(len(p), len(g) + 1, dtype=torch.float64, device=p.device)
    for start in range(0, p.shape[1], _PIXELS_AT_ONCE):
        part = p[:, start : start + _PIXELS_AT_ONCE].float()
        columns = g[:, start : start + _PIXELS_AT_ONCE].to(part)
        # float32 sums so few ones without rounding.
        ones = part.new_ones(1, part.shape[1])
        sums += part @ torch.cat([columns, ones]).T
    result = sums.cpu().numpy()
    return result[:, -1], result[:, :-1]


def mask_ious(
    shared: np.ndarray, areas: np.ndarray, labelled_areas: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    """Returns the (D, G) IoUs; for a crowd it is the share of the prediction that it covers.

    ``shared`` (D, G), ``areas`` (D,) and ``labelled_areas`` (G,) count pixels; ``crowd`` is bool.
    """
    union = areas[:, None] + np.where(crowd, 0.0, labelled_areas - shared)
    return np.divide(shared, union, out=np.zeros(shared.shape), where=shared > 0)


def match_class(
    scores: Sequence[float] | np.ndarray,
    areas: np.ndarray,
    ious: np.ndarray,
    labelled_areas: np.ndarray,
    crowd: np.ndarray,
) -> ClassRecord:
    """Matches the detections of one class in one frame to its objects; returns the record.

    In falling order of score each detection takes, at each threshold, the free object that it
    overlaps most (the last of equals). It takes a crowd or an object out of the area range only if
    nothing else fits, and is then ignored, as are unmatched detections out of the range. A crowd
    may be taken many times.

    Args:
        scores: (D,), in any order.
        areas: (D,) pixels.
        ious: (D, G) from :func:`mask_ious`.
        labelled_areas: (G,) pixels.
        crowd: (G,) bool.
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
    # Pycocotools lets an IoU of 1 - 1e-10 pass for a threshold of 1, which is not used here.
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
    """Returns a float32 score with the fewest digits that tell it from its neighbours."""
    single = np.float32(score)
    return float(str(single)) if float(single) == score else float(score)


class Detections:
    """Keeps the records of one class in one video in arrays, about 30 bytes a detection."""

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
    """Returns the AP of one class, (4, 10) by area range and IoU threshold, from 0 to 1.

    It is the mean over 101 levels of recall of the highest precision at that recall or above; NaN
    in area ranges without an object, and outside of ``ranges``. The order of videos and frames
    decides between detections of equal score.
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
        # Precision becomes the highest one at this recall or above.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for t, recall in enumerate(true / objects[a]):
            first = np.searchsorted(recall, RECALL_THRESHOLDS, side="left")
            reached = precision[t][first[first < len(scores)]]
            result[a, t] = math.fsum(reached) / len(RECALL_THRESHOLDS)
    return result


def class_average_precision(videos: Iterable[Mapping[int, Detections]]) -> dict[int, np.ndarray]:
    """Returns the :func:`average_precision` of each class over several videos, sorted by id."""
    by_class: dict[int, list[Detections]] = {}
    for video in videos:
        for k, own in video.items():
            by_class.setdefault(k, []).append(own)
    return {k: average_precision(own) for k, own in sorted(by_class.items())}


def mean_precision(
    by_class: ClassPrecision, area: int, threshold: int | None = None
) -> float | None:
    """Returns AP in percent, the mean over the classes that have such objects; None if none has.

    ``area`` and ``threshold`` are positions in :data:`AREA_RANGES` and :data:`IOU_THRESHOLDS`; None
    takes the mean over all thresholds.
    """
    values = [ap[area] if threshold is None else ap[area, [threshold]] for ap in by_class.values()]
    values = [v for v in values if not np.isnan(v).any()]
    if not values:
        return None
    return 100 * math.fsum(x for v in values for x in v) / (len(values) * len(values[0]))


def frame_average_precision(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns the AP of one frame in percent by COCO's rule and by the release's.

    The release takes all segments as objects, so that a labelled stuff class, which an instance
    model never predicts, counts as 0 in the mean over classes. None means that there is nothing to
    average.

    Args:
        record: ``things``, class id to its record, and ``stuff``, number of labelled stuff classes.
    """
    values = []
    for own in record["things"].values():
        if own["labelled"][0]:
            detections = Detections()
            detections.add(0, own)
            values.append(100 * float(np.mean(average_precision([detections], ranges=[0])[0])))
    total, everything = math.fsum(values), len(values) + record["stuff"]
    return total / len(values) if values else None, total / everything if everything else None
