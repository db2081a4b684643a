"""Scores what was predicted in time: of each frame the newest prediction that was finished."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

from ..tasks import Row, Task, build_tasks
from .results import FrameResult
from .sinks import Results, Sink


class StreamingScores(Sink):
    """Adds ``streaming`` to the row, and to the frozen model's part of it.

    It has ``delay_frames``, ``dropped`` and ``latency_seconds`` of :class:`.results.OnTime`, and,
    of a labelled frame, the ``records`` of the prediction that counts, or of none.
    """

    measures = True
    behind = True

    def __init__(self, cfg: CfgNode, dataset_name: str, *, compare: bool) -> None:
        """``cfg`` is resolved; the frozen model has such scores only where it was on time, too."""
        # A record of these tasks depends on its frame and prediction alone: there is nothing to
        # save, and one list serves both models.
        self.tasks = [task for task in build_tasks(dataset_name, cfg) if task.streaming]

    def write(self, results: Results) -> None:
        """Scores one frame."""
        self._add(results.row, results.adapted)
        if results.frozen is not None:
            self._add(results.row["frozen"], results.frozen)

    def _add(self, part: Row, result: FrameResult) -> None:
        on_time = result.on_time
        if on_time is None:
            return
        records = {task.name: _record(task, result) for task in self.tasks}
        known = {name: record for name, record in records.items() if record is not None}
        part["streaming"] = {
            "delay_frames": on_time.delay_frames,
            "dropped": on_time.dropped,
            "latency_seconds": on_time.latency_seconds,
            **({"records": known} if known else {}),
        }


def _record(task: Task, result: FrameResult) -> Any:
    assert result.on_time is not None
    counts = result.on_time.output
    if counts is None:
        return task.missed(result.frame, result.output)
    return task.record(result.frame, counts)
