"""Measures how steady predictions are from one frame to the next, with or without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats.labels import read_sem_seg
from .base import Task, once
from .metrics import Metric, Record
from .outputs import class_map
from .registry import TASK_REGISTRY

ChangeCounts = Mapping[str, int]
"""Pixels of one pair of frames: ``changed`` of ``pixels``, and, if both frames are labelled,
``flickered`` of ``steady``."""


def place_of(frame: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the video of a frame, and its index."""
    return str(frame.get("video_id", "")), int(frame.get("frame_index", 0))


def follows(frame: Mapping[str, Any], before: tuple[str, int]) -> bool:
    """Says whether a frame may be compared with the one at ``before``: it comes right after it."""
    video_id, index = place_of(frame)
    return before == (video_id, index - 1) and not frame.get("after_gap")


def change_counts(
    previous: np.ndarray,
    current: np.ndarray,
    previous_labels: np.ndarray | None = None,
    current_labels: np.ndarray | None = None,
    ignore_label: int = 255,
) -> dict[str, int]:
    """Counts the pixels whose predicted class differs between two adjacent frames.

    Args:
        previous, current: (H, W) predicted classes.
        previous_labels, current_labels: (H, W), ``ignore_label`` where unlabelled, or None.

    Returns:
        ``changed`` and ``pixels``; with labels of both frames also ``flickered`` and ``steady``,
        which count the same among the pixels whose label is one class in both.
    """
    changed = previous != current
    counts = {"changed": int(np.count_nonzero(changed)), "pixels": changed.size}
    if previous_labels is not None and current_labels is not None:
        steady = (previous_labels == current_labels) & (current_labels != ignore_label)
        counts["flickered"] = int(np.count_nonzero(changed & steady))
        counts["steady"] = int(np.count_nonzero(steady))
    return counts


@TASK_REGISTRY.register()
class Steadiness(Task):
    """Counts pixels that change their predicted class from one frame to the next of a video.

    Every frame but a video's first has a record (:data:`ChangeCounts`). With labels of both frames
    (``sem_seg_file_name``) it also counts the pixels that change while their label does not. Models
    that only predict instances have no record.
    """

    name = "temporal"
    output_keys = ("sem_seg", "panoptic_seg")

    def reset(self) -> None:
        super().reset()
        self._previous: dict[str, Any] = {}

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        video_id, index = place_of(frame)
        current: dict[str, Any] = {
            "video_id": video_id,
            "frame_index": index,
            "classes": once(class_map, output),
            "labels": once(read_sem_seg, frame) if "sem_seg_file_name" in frame else None,
        }
        previous, self._previous = self._previous, current
        if not previous or not follows(frame, (previous["video_id"], previous["frame_index"])):
            return None
        if previous["classes"].shape != current["classes"].shape:
            return None
        return change_counts(
            previous["classes"],
            current["classes"],
            previous["labels"],
            current["labels"],
            self.info.ignore_label,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
            for k, v in self._previous.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._previous = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in state.items()}


_EXAMPLE = [
    {"changed": 5, "pixels": 40, "flickered": 1, "steady": 20},
    {"changed": 10, "pixels": 40, "flickered": 3, "steady": 30},
    {"changed": 3, "pixels": 40},
]


class _Share(Metric):
    part = ""

    def value(self, total: ChangeCounts) -> float | None:
        whole = total[self.needs]
        return 100 * total[self.part] / whole if whole else None

    frame = value


@Steadiness.add_metric
class Change(_Share):
    """Share of pixels that change, by motion too, so that neither direction is better."""

    name = "change"
    rule = (
        "share of all pixels whose predicted class differs from the frame before; "
        "motion counts as well; all pairs of adjacent frames pooled"
    )
    higher_is_better = None
    axis = ""
    part, needs = "changed", "pixels"
    example = (_EXAMPLE, 100 * 18 / 120)


@Steadiness.add_metric
class Flicker(_Share):
    """Share of pixels that change while their label does not."""

    name = "flicker"
    rule = (
        "share of the pixels whose predicted class differs from the frame before, "
        "of those whose label is one class in both frames; all pairs of adjacent frames pooled"
    )
    higher_is_better = False
    axis = "flicker (% of pixels)"
    part, needs = "flickered", "steady"
    example = (_EXAMPLE, 100 * 4 / 50)
