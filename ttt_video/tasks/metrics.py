"""Metrics: one class is one number of a run, with its rule, unit, direction and an example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from .labels import LabelInfo

Record = Any
"""JSON values that a task keeps of one frame, in the form in which they are read back."""

FRAMES = (
    "; mean over the frames of a video for which that is defined, of COCO Videos every 10th from "
    "the first; frames without labels are left out, and so are those that could not be read; mean "
    "over videos weighted by their numbers of such frames"
)
"""Ends the rule of every :class:`FrameMean`."""

EXAMPLE_INFO = LabelInfo(classes=("a", "b", "c"), things=frozenset({0}))
"""Describes the data set of every :attr:`Metric.example`."""


class Tally:
    """Collects the records of one video, and joins those of several into a total.

    This class sums dicts of numbers. Tasks with other records have a tally of their own, which
    grows slowly with the video, or not at all.
    """

    def __init__(self) -> None:
        self.total: Any = {}

    def add(self, frame_index: int, record: Record) -> None:
        """Adds a frame."""
        self.total = self.sum([self.total, record])

    @staticmethod
    def sum(many: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the sums of the numbers by key."""
        total: dict[str, Any] = {}
        for counts in many:
            for key, number in counts.items():
                total[key] = total.get(key, 0) + number
        return total

    @classmethod
    def joined(cls, videos: Sequence[Any], info: LabelInfo) -> Any:
        """Returns the total of several videos (at least one, sorted by name) for the metrics."""
        return cls.sum(video.total for video in videos)


def add_counts(many: Iterable[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    """Returns the sums of lists of numbers by class id, sorted by class."""
    total: dict[str, list[Any]] = {}
    for counts in many:
        for k, values in counts.items():
            sums = total.get(k, [0] * len(values))
            total[k] = [a + b for a, b in zip(sums, values, strict=True)]
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


class Metric:
    """One number of a run; of its functions only ``value`` is needed.

    Attributes:
        name: key in ``summary.json``.
        rule: says in words what is averaged over what.
        unit: unit of the value.
        digits: number of digits after the point in tables.
        higher_is_better: None where neither direction is better.
        needs: key of totals and records that have the number; "" if all have it.
        value: computes it from the total of the task's :class:`Tally`; None if it is not defined.
        by_class: computes it from the total for each class id that has one.
        per_class: key of ``by_class`` in ``per_class``; "" stands for the name.
        details: computes further numbers from the total, by name.
        frame: computes it from one record, for the frame's row and curve.
        frame_name: its key in a row's ``metrics``; "" stands for the name.
        axis: label of its curve's axis; None is "NAME of the frame (UNIT)", "" draws no curve.
        example: records of a video's frames, and the value they give with :data:`EXAMPLE_INFO`;
            a test checks it.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    unit: ClassVar[str] = "%"
    digits: ClassVar[int] = 2
    higher_is_better: ClassVar[bool | None] = True
    needs: ClassVar[str] = ""
    value: Callable[..., float | None]
    by_class: Callable[..., Mapping[int, float]] | None = None
    per_class: ClassVar[str] = ""
    details: Callable[..., Mapping[str, float | None]] | None = None
    frame: Callable[..., float | None] | None = None
    frame_name: ClassVar[str] = ""
    axis: ClassVar[str | None] = None
    example: ClassVar[tuple[Sequence[Record], float | None]]

    def is_in(self, content: Any) -> bool:
        """Says whether a total or a record has this number."""
        return not self.needs or self.needs in content

    def axis_label(self) -> str:
        """Returns the label of the curve's axis; "" if no curve is drawn."""
        if self.frame is None or self.axis is not None:
            return self.axis or ""
        return f"{self.name} of the frame ({self.unit})"


def mean(values: Sequence[float]) -> float | None:
    """Returns the exact mean (``fsum``), independent of order; None if there are no values."""
    return math.fsum(values) / len(values) if len(values) else None


def known_mean(values: Iterable[float]) -> float | None:
    """Returns the :func:`mean` without NaN, which stands for None; None if no value is left."""
    return mean([value for value in values if not math.isnan(value)])


class FrameMean(Metric):
    """The mean of single frames' numbers, over the frames that the data set's period leaves.

    It equals the release's mean over videos weighted by their numbers of frames.
    """

    axis = ""
    value = staticmethod(mean)


PROTOCOLS = {"standard": "", "video": "_video_mean", "release": "_frame_release"}
"""Suffixes of headline metrics: all frames pooled, mean over videos, mean over frames."""
