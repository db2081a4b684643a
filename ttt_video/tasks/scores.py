"""Computes the numbers of a run from the records of its frames.

Numbers do not depend on the order of frames, to the last bit, because several processes may write
them. They are None where they are not defined.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from .labels import LabelInfo
from .metrics import FrameMean, Record, Tally, mean
from .registry import headlines, tasks

if TYPE_CHECKING:
    from .base import Task

Row = dict[str, Any]


class ScoredFrame(NamedTuple):
    """The records of one frame, by task."""

    video_id: str
    frame_index: int
    records: Mapping[str, Record]


class _Video:
    """Keeps one task's records of one video.

    ``frames`` has the numbers of single frames, which a :class:`FrameMean` averages.
    """

    def __init__(self, task: type[Task]) -> None:
        self.tally: Tally = task.tally()
        self.frames: dict[FrameMean, array[float]] = {
            metric: array("d") for metric in task.metrics.values() if isinstance(metric, FrameMean)
        }


class Scores:
    """Collects the records of one model on some videos, and computes the numbers."""

    def __init__(self, info: LabelInfo, known: Iterable[type[Task]] | None = None) -> None:
        """
        Args:
            info: names the classes, and says which frames count in means of frames.
            known: tasks that records may belong to; None stands for all that are registered.
        """
        self.info = info
        self._tasks = {task.name: task for task in (tasks() if known is None else known)}
        self._videos: dict[str, dict[str, _Video]] = {}
        self._frames: dict[str, int] = {}
        self._labelled: dict[str, int] = {}

    def add(self, frame: ScoredFrame) -> None:
        """Adds a new frame.

        Raises:
            UserError: it has a record of an unknown task.
        """
        videos = self._videos.setdefault(frame.video_id, {})
        for name, record in frame.records.items():
            if name not in self._tasks:
                raise UserError(
                    f"rows of video {frame.video_id} have records of the task {name!r}, which is "
                    "not registered: --register the file that defines it"
                )
            if name not in videos:
                videos[name] = _Video(self._tasks[name])
            video = videos[name]
            video.tally.add(frame.frame_index, record)
            if frame.frame_index % self.info.period == 0:
                for metric, values in video.frames.items():
                    assert metric.frame is not None
                    value = metric.frame(record)
                    if value is not None:
                        values.append(value)
        self._frames[frame.video_id] = self._frames.get(frame.video_id, 0) + 1
        labelled = any(self._tasks[name].label_keys for name in frame.records)
        self._labelled[frame.video_id] = self._labelled.get(frame.video_id, 0) + labelled

    def result(self) -> Row:
        """Returns metrics by name, ``per_class`` (metric to class to value) and ``videos``.

        ``videos`` has the number of ``frames`` and ``labelled_frames`` and the same metrics of each
        video. Without records the result is empty.
        """
        if not any(self._videos.values()):
            return {}
        videos: dict[str, Row] = {}
        for video_id, kept in sorted(self._videos.items()):
            numbers = self._numbers([kept])
            numbers.pop("per_class", None)
            videos[video_id] = {
                "frames": self._frames[video_id],
                "labelled_frames": self._labelled[video_id],
                **numbers,
            }
        result = self._numbers([kept for _, kept in sorted(self._videos.items())])
        for name in set(headlines()) & result.keys():
            values = [video[name] for video in videos.values() if video.get(name) is not None]
            result[f"{name}_video_mean"] = mean(values)
        return {**dict(sorted(result.items())), "videos": videos}

    def _numbers(self, videos: Sequence[Mapping[str, _Video]]) -> Row:
        result: Row = {}
        per_class: Row = {}
        for name, task in self._tasks.items():
            own = [kept[name] for kept in videos if name in kept]
            if not own:
                continue
            total = task.tally.joined([video.tally for video in own], self.info)
            for metric in task.metrics.values():
                if isinstance(metric, FrameMean):
                    values = [value for video in own for value in video.frames[metric]]
                    result[metric.name] = metric.value(values)
                elif metric.is_in(total):
                    result[metric.name] = metric.value(total)
                if metric.details is not None:
                    result.update(metric.details(total))
                if metric.by_class is not None:
                    classes = metric.by_class(total).items()
                    named = {self.info.name(k): value for k, value in classes}
                    per_class[metric.per_class or metric.name] = named
        return {**result, "per_class": per_class} if per_class else result


def score(
    frames: Iterable[ScoredFrame], info: LabelInfo, known: Iterable[type[Task]] | None = None
) -> Row:
    """Returns :meth:`Scores.result` of frames in any order."""
    scores = Scores(info, known)
    for frame in frames:
        scores.add(frame)
    return scores.result()
