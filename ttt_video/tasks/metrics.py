"""Metrics: one class is one number of a run, with its rule, unit, direction and an example."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
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
    def joined(cls, videos: Sequence[Any]) -> Any:
        """Returns the total of several videos (at least one, sorted by name) for the metrics."""
        return cls.sum(video.total for video in videos)


class Metric(ABC):
    """One number of a run, computed from the total of its task's :class:`Tally`.

    Attributes:
        name: key in ``summary.json``.
        rule: what is averaged over what, in words.
        unit: of the value.
        higher_is_better: None where neither direction is better.
        per_class: key of :meth:`by_class` in ``per_class``; "" stands for the name.
        example: records of a video's frames, and the value they give with
            :data:`EXAMPLE_INFO`; a test checks it.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool | None] = True
    per_class: ClassVar[str] = ""
    example: ClassVar[tuple[Sequence[Record], float | None]]

    def applies(self, total: Any, info: LabelInfo) -> bool:
        """Whether there is such a number; where there is none, the summary has no key for it."""
        return True

    @abstractmethod
    def value(self, total: Any, info: LabelInfo) -> float | None:
        """Returns the number of all frames in the total; None where nothing defines it."""

    def by_class(self, total: Any) -> dict[int, float] | None:
        """Returns the number of each class that has one; None where classes have none."""
        return None

    def details(self, total: Any) -> dict[str, float | None]:
        """Returns further numbers of the same thing, which need no rule of their own."""
        return {}


class FrameMetric(Metric):
    """A metric that a single frame has, too: a number in its row, and a curve.

    Attributes:
        frame_name: key in a row's ``metrics``; "" stands for the name.
        axis: label of the curve's axis; None is "NAME of the frame (UNIT)", and "" draws no curve.
    """

    frame_name: ClassVar[str] = ""
    axis: ClassVar[str | None] = None

    def in_frame(self, record: Record) -> bool:
        """Whether the frame has such a number; where it has none, its row has no key for it."""
        return True

    @abstractmethod
    def frame(self, record: Record) -> float | None:
        """Returns the number of one frame alone; None where nothing defines it."""

    @property
    def axis_label(self) -> str:
        """The label of the curve's axis; "" where none is drawn."""
        return f"{self.name} of the frame ({self.unit})" if self.axis is None else self.axis


class FrameMean(FrameMetric):
    """The mean of single frames' numbers, over the frames that the data set's period leaves."""

    axis = ""

    def value(self, total: Sequence[float], info: LabelInfo) -> float | None:
        """Returns the mean of all frames' numbers.

        The release takes the mean of each video, then the mean over videos with their numbers of
        frames as weights; that is the same.
        """
        return mean(total)


def mean(values: Sequence[float]) -> float | None:
    """Returns the exact mean (``fsum``), independent of order; None if there are no values."""
    return math.fsum(values) / len(values) if len(values) else None


EXAMPLE_INFO = LabelInfo(classes=("a", "b", "c"), things=frozenset({0}))
"""The data set of every :attr:`Metric.example`."""
