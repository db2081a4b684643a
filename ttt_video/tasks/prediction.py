"""Statistics of predictions, which show without labels that a model collapses."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from .base import Task
from .labels import LabelInfo
from .metrics import Metric, Record, Tally, known_mean, mean
from .outputs import mean_entropy, predicted_classes, scores_are_finite
from .registry import TASK_REGISTRY, tasks


class Predictions(NamedTuple):
    """Numbers of classes and entropies (NaN for none) of each video with classes, in time order;
    and the number of frames with scores that are not finite, of all videos."""

    classes: list[list[int]]
    entropies: list[list[float]]
    nonfinite: int


class _FrameTally(Tally):
    """Keeps 24 bytes a frame."""

    def __init__(self) -> None:
        self.frames = array("q")
        self.classes = array("q")
        self.entropies = array("d")
        self.nonfinite = 0

    def add(self, frame_index: int, record: Record) -> None:
        self.nonfinite += not record.get("finite", True)  # earlier versions did not record it
        if "classes" not in record:
            return
        entropy = record["entropy"]
        self.frames.append(frame_index)
        self.classes.append(record["classes"])
        self.entropies.append(math.nan if entropy is None else entropy)

    @classmethod
    def joined(cls, videos: Sequence[_FrameTally], info: LabelInfo) -> Predictions:
        with_classes = [video for video in videos if video.frames]
        orders = [sorted(range(len(v.frames)), key=v.frames.__getitem__) for v in with_classes]
        pairs = list(zip(with_classes, orders, strict=True))
        return Predictions(
            [[video.classes[i] for i in order] for video, order in pairs],
            [[video.entropies[i] for i in order] for video, order in pairs],
            sum(video.nonfinite for video in videos),
        )


@TASK_REGISTRY.register()
class PredictionStatistics(Task):
    """Counts predicted classes and measures their entropy; says of all outputs if they are finite.

    Outputs of any task have a record; one without classes, such as colours, has only ``finite``.
    """

    name = "prediction"
    output_keys = ("sem_seg", "panoptic_seg", "instances", "image_class")
    tally = _FrameTally

    def record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """Returns the record of a frame whose output some task knows; see the base class."""
        if any(key in output for task in tasks() for key in task.output_keys):
            return self._record(frame, output)
        return super().record(frame, output)

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        record: Record = {}
        if any(key in output for key in self.output_keys):
            record["classes"] = len(predicted_classes(output))
            record["entropy"] = mean_entropy(output)
        return {**record, "finite": scores_are_finite(output)}


class _OfClasses(Metric):
    """A number that outputs without classes do not have."""

    higher_is_better = None

    def is_in(self, content: Any) -> bool:
        return bool(content.classes if isinstance(content, Predictions) else "classes" in content)


def _quarters(name: str, videos: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Returns the means over the first and last quarter of every video, at least one frame."""
    pairs = [(video, max(len(video) // 4, 1)) for video in videos]
    return {
        f"{name}_first_quarter": known_mean(x for video, n in pairs for x in video[:n]),
        f"{name}_last_quarter": known_mean(x for video, n in pairs for x in video[-n:]),
    }


_EXAMPLE = [
    {"classes": 4, "entropy": 0.5, "finite": True},
    {"classes": 2, "entropy": None, "finite": False},
    {"classes": 3, "entropy": 1.5},
]


@PredictionStatistics.add_metric
class PredictedClasses(_OfClasses):
    """Number of predicted classes, which falls when a method collapses."""

    name = "predicted_classes_mean"
    rule = (
        "number of classes that a frame's prediction has; mean over "
        "frames, labelled or not (min: the least, last: of the last frame of the last video, "
        "first_quarter and last_quarter: mean over these frames of every video)"
    )
    unit = "classes"
    frame = staticmethod(itemgetter("classes"))
    frame_name = "predicted_classes"
    axis = "predicted classes"
    example = (_EXAMPLE, 3.0)

    @staticmethod
    def value(total: Predictions) -> float | None:
        return mean([n for video in total.classes for n in video])

    @staticmethod
    def details(total: Predictions) -> dict[str, float | None]:
        if not total.classes:
            return {}
        return {
            "predicted_classes_min": min(n for video in total.classes for n in video),
            "predicted_classes_last": total.classes[-1][-1],
            **_quarters("predicted_classes", total.classes),
        }


@PredictionStatistics.add_metric
class PredictionEntropy(_OfClasses):
    """Entropy of the scores, which falls, or rises to its limit, when a method collapses."""

    name = "prediction_entropy_mean"
    rule = (
        "entropy of a frame's prediction in nats, mean over pixels "
        "(instances: of their scores); mean over frames, labelled or not (max: the largest, "
        "first_quarter and last_quarter: mean over these frames of every video)"
    )
    unit = "nats"
    frame = staticmethod(itemgetter("entropy"))
    frame_name = "prediction_entropy"
    axis = "entropy of the prediction (nats)"
    example = (_EXAMPLE, 1.0)

    @staticmethod
    def value(total: Predictions) -> float | None:
        return known_mean(e for video in total.entropies for e in video)

    @staticmethod
    def details(total: Predictions) -> dict[str, float | None]:
        if not total.entropies:
            return {}
        known = (e for video in total.entropies for e in video if not math.isnan(e))
        return {
            "prediction_entropy_max": max(known, default=None),
            **_quarters("prediction_entropy", total.entropies),
        }


@PredictionStatistics.add_metric
class NonfiniteFrames(Metric):
    """Number of frames whose scores are broken."""

    name = "nonfinite_frames"
    rule = "number of frames with a predicted score that is not finite"
    unit = "frames"
    higher_is_better = False
    value = staticmethod(attrgetter("nonfinite"))
    example = (_EXAMPLE, 1)
