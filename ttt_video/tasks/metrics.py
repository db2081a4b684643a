"""Metrics: one class is one number of a run, with its rule, unit, direction and an example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from .labels import LabelInfo

Record = Any
"""What a task keeps of one frame: JSON values, in the form in which they are read back."""

FRAMES = (
    "; mean over the frames of a video for which that is defined, of COCO Videos every 10th from "
    "the first; frames without labels are left out, and so are those that could not be read; mean "
    "over videos weighted by their numbers of such frames"
)
"""The end of the rule of every :class:`FrameMean`."""

EXAMPLE_INFO = LabelInfo(classes=("a", "b", "c"), things=frozenset({0}))
"""The data set of every :attr:`Metric.example`."""


class Tally:
    """Collects the records of one video, and joins those of several into a total.

    This one sums dicts of numbers. A task whose records are something else has its own; it grows
    slowly with the video, or not at all.
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


class Metric:
    """One number of a run. Functions that are None are left out; only ``value`` is needed.

    Attributes:
        name: key in ``summary.json``.
        rule: what is averaged over what, in words.
        unit: of the value.
        digits: after the point, in tables.
        higher_is_better: None where neither direction is better.
        needs: key that a total and a record must have, else there is no such number.
        value: of the total of the task's :class:`Tally`; it gives None where nothing defines it.
        by_class: of the total: the number of each class id that has one.
        per_class: key of ``by_class`` in ``per_class``; "" stands for the name.
        details: of the total: further numbers of the same thing, by name.
        frame: of one record: the number of that frame alone, for its row and curve.
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
        """Whether a total or a record has this number."""
        return not self.needs or self.needs in content

    def axis_label(self) -> str:
        """Returns the label of the curve's axis; "" where none is drawn."""
        if self.frame is None or self.axis is not None:
            return self.axis or ""
        return f"{self.name} of the frame ({self.unit})"


def mean(values: Sequence[float]) -> float | None:
    """Returns the exact mean (``fsum``), independent of order; None if there are no values."""
    return math.fsum(values) / len(values) if len(values) else None


class FrameMean(Metric):
    """The mean of single frames' numbers, over the frames that the data set's period leaves.

    The release takes the mean of each video, then the mean over videos with their numbers of frames
    as weights; that is the same.
    """

    axis = ""
    value = staticmethod(mean)


PROTOCOLS = {"standard": "", "video": "_video_mean", "release": "_frame_release"}
"""Suffixes of the headline metrics: all frames pooled, the mean of each video's, or of frames'."""
