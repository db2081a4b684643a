"""Panoptic quality (Kirillov et al. 2019) in pure functions of segment maps.

PQ of a class is the sum of the IoUs of matched segments over TP + FP/2 + FN/2. A predicted and a
labelled segment of one class match if their IoU is above 1/2, which makes the match unique.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from .metrics import add_counts

Segments = Sequence[Mapping[str, Any]]
"""detectron2's ``segments_info``: ``id``, ``category_id``, and for labels ``iscrowd``."""

PanopticCounts = Mapping[str, Sequence[Any]]
"""Class id to (true positives, false positives, false negatives, sum of IoUs), as in JSON."""


@dataclass(frozen=True)
class Overlaps:
    """Counts the pixels that segments of a prediction and of the labels share.

    predicted, labelled: the P and G segments.
    shared: (G, P) pixels in labelled segment g and predicted segment p.
    void: (P,) pixels of p that are not labelled.
    predicted_area, labelled_area: (P,), (G,) pixels.
    """

    predicted: Segments
    labelled: Segments
    shared: np.ndarray
    void: np.ndarray
    predicted_area: np.ndarray
    labelled_area: np.ndarray

    def with_void(self, category_id: int | None) -> Overlaps:
        """Returns the same overlaps with the segments of a category (None: of none) as void."""
        keep = np.array([s["category_id"] != category_id for s in self.labelled], dtype=bool)
        return replace(
            self,
            labelled=[s for s, kept in zip(self.labelled, keep, strict=True) if kept],
            shared=self.shared[keep],
            void=self.void + self.shared[~keep].sum(0),
            labelled_area=self.labelled_area[keep],
        )


def measure_overlaps(
    predicted_map: np.ndarray,
    predicted: Segments,
    labelled_map: np.ndarray,
    labelled: Segments,
) -> Overlaps:
    """Counts the pixels that the segments of two maps share.

    Args:
        predicted_map, labelled_map: (H, W) integer ids from 0 (none) to 256^3 - 1.
        predicted, labelled: their segments. Pixels of a labelled segment that is not listed belong
            to no segment and are not void.

    Raises:
        ValueError: sizes differ, or the predicted segments are not those of their map.
    """
    if predicted_map.shape != labelled_map.shape:
        raise ValueError(
            f"prediction {predicted_map.shape} and labels {labelled_map.shape} differ in shape"
        )
    predicted = list({s["id"]: s for s in predicted}.values())
    labelled = list({s["id"]: s for s in labelled}.values())
    rows, columns = len(labelled) + 2, len(predicted) + 2
    pairs = _positions(labelled_map, labelled) * columns + _positions(predicted_map, predicted)
    table = np.bincount(pairs.ravel(), minlength=rows * columns).reshape(rows, columns)
    predicted_area = table[:, 2:].sum(0)
    if table[:, 0].any():
        raise ValueError("the prediction has pixels of segments that its segments_info lacks")
    if (predicted_area == 0).any():
        raise ValueError("the prediction's segments_info has segments without a pixel")
    return Overlaps(
        predicted, labelled, table[2:, 2:], table[1, 2:], predicted_area, table[2:].sum(1)
    )


def _positions(ids: np.ndarray, segments: Segments) -> np.ndarray:
    """Returns each pixel's position: 0 if it is not listed, 1 for id 0, 2... for the segments."""
    listed = [s["id"] for s in segments]
    # A table of all ids is cheaper than sorting, because memory that is not touched costs nothing.
    table = np.zeros(max(int(ids.max(initial=0)), *listed, 0) + 1, dtype=np.intp)
    table[0] = 1
    table[listed] = np.arange(2, len(listed) + 2)
    return table[ids]


def panoptic_counts(overlaps: Overlaps) -> dict[str, list[float]]:
    """Returns TP, FP, FN and IoU sums by the standard rules (panopticapi's).

    Void pixels count for no union. Crowd segments are never matched and never missed. A prediction
    is not false if more than half of it is void, or the (last listed) crowd of its class.
    """
    crowd = np.array([bool(s.get("iscrowd", 0)) for s in overlaps.labelled], dtype=bool)
    matches = _matches(overlaps, overlaps.labelled_area) * ~crowd[:, None]
    excused = overlaps.void.copy()
    for g in np.flatnonzero(crowd):
        own = [p["category_id"] == overlaps.labelled[g]["category_id"] for p in overlaps.predicted]
        excused[own] = (overlaps.void + overlaps.shared[g])[own]
    return _count(overlaps, matches, missed=~crowd, excused=excused)


def panoptic_counts_release(
    overlaps: Overlaps, unlabelled_category: int | None = 255
) -> dict[str, list[float]]:
    """Returns the same by the rules of the release.

    Crowd segments are ordinary ones. Segments of the unlabelled category are not void: they excuse
    no prediction and stay in the unions, but have no place in the mean. A segment's area is the one
    that the label file states, if it does, and IoUs above 1 match nothing.
    """
    counted = overlaps.labelled_area
    areas = [s.get("area", n) for s, n in zip(overlaps.labelled, counted, strict=True)]
    matches = _matches(overlaps, np.array(areas, dtype=float))
    matches[matches > 1] = 0
    everything = np.ones(len(overlaps.labelled), dtype=bool)
    counts = _count(overlaps, matches, missed=everything, excused=overlaps.void)
    counts.pop(str(unlabelled_category), None)
    return counts


def _matches(overlaps: Overlaps, labelled_area: np.ndarray) -> np.ndarray:
    """Returns the (G, P) IoUs of pairs of one class that are above 1/2, else 0."""
    own_area = overlaps.predicted_area - overlaps.void
    union = own_area[None] + labelled_area[:, None] - overlaps.shared
    classes = [
        np.array([s["category_id"] for s in segments], dtype=np.int64)
        for segments in (overlaps.labelled, overlaps.predicted)
    ]
    same = classes[0][:, None] == classes[1][None]
    ious = np.divide(overlaps.shared, union, out=np.zeros(union.shape), where=union > 0)
    return np.where(same & (ious > 0.5), ious, 0.0)


def _count(
    overlaps: Overlaps, matches: np.ndarray, *, missed: np.ndarray, excused: np.ndarray
) -> dict[str, list[float]]:
    counts: dict[str, list[float]] = {}

    def add(segment: Mapping[str, Any], column: int, value: float = 1) -> None:
        counts.setdefault(str(segment["category_id"]), [0, 0, 0, 0.0])[column] += value

    for g, segment in enumerate(overlaps.labelled):
        ious = matches[g][matches[g] > 0].tolist()
        for iou in ious:
            add(segment, 0)
            add(segment, 3, iou)
        if not ious and missed[g]:
            add(segment, 2)
    false = ~(matches > 0).any(0) & (excused / overlaps.predicted_area <= 0.5)
    for p in np.flatnonzero(false):
        add(overlaps.predicted[p], 1)
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def add_panoptic_counts(many: Iterable[PanopticCounts]) -> dict[str, list[Any]]:
    """Pools the counts of several frames, sorted by class.

    IoUs become exact fractions, so that the result does not depend on the order or the groups in
    which frames are added; it may be added again.
    """
    return add_counts(
        {k: (tp, fp, fn, Fraction(iou)) for k, (tp, fp, fn, iou) in counts.items()}
        for counts in many
    )


def class_quality(counts: PanopticCounts) -> dict[int, tuple[float, float, float]]:
    """Returns (PQ, SQ, RQ) in percent of each class that is labelled or predicted."""
    quality = {}
    for k, (tp, fp, fn, iou) in counts.items():
        total = tp + fp / 2 + fn / 2
        if total > 0:
            sq = 100 * float(iou) / tp if tp else 0.0
            quality[int(k)] = (100 * float(iou) / total, sq, 100 * tp / total)
    return quality


def panoptic_quality(
    counts: PanopticCounts, keep: Callable[[int], bool] = lambda _: True
) -> tuple[float, float, float] | None:
    """Returns the means over the kept classes of (PQ, SQ, RQ) in percent; None without classes."""
    values = [value for k, value in class_quality(counts).items() if keep(k)]
    if not values:
        return None
    pq, sq, rq = (math.fsum(column) / len(values) for column in zip(*values, strict=True))
    return pq, sq, rq


def panoptic_quality_release(counts: PanopticCounts) -> float:
    """Returns the PQ of one frame in percent; it is 0 for a frame with nothing to count."""
    quality = panoptic_quality(counts)
    return quality[0] if quality else 0.0
