"""The only list of tasks, with the questions that go to all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from detectron2.utils.registry import Registry

if TYPE_CHECKING:
    from .base import Task
    from .metrics import Metric

TASK_REGISTRY = Registry("TTT_TASK")
TASK_REGISTRY.__doc__ = """
Subclasses of :class:`ttt_video.tasks.Task`. A file of ``--register`` adds others, and metrics by
``Task.add_metric``.
"""

_VIDEO_MEAN = "_video_mean"
STREAMING = "streaming_"
"""Begins the name of a headline by what was predicted in time."""


def tasks() -> list[type[Task]]:
    """Returns all tasks, the built-in ones first."""
    return [task for _, task in TASK_REGISTRY]


def tasks_of(evaluator_type: str | None) -> list[type[Task]]:
    """Returns the tasks that a data set's ``evaluator_type`` means; the first is its main one."""
    return [task for task in tasks() if evaluator_type in task.evaluator_types]


def metrics() -> dict[str, Metric]:
    """Returns the metrics of all tasks by name."""
    return {name: metric for task in tasks() for name, metric in task.metrics.items()}


def headlines() -> list[str]:
    """Returns the metrics that tasks are judged by."""
    return [task.headline for task in tasks() if task.headline]


def streaming_headlines() -> list[str]:
    """Returns the headlines that predictions which come in time have, too."""
    return [STREAMING + task.headline for task in tasks() if task.streaming]


def _plain(name: str) -> Metric | None:
    """Returns the metric of a name, which may be that of its mean over videos, or be streaming."""
    return metrics().get(name.removeprefix(STREAMING).removesuffix(_VIDEO_MEAN))


def sign(name: str) -> int:
    """Returns -1 for a metric, or its mean over videos, that is better when lower, else 1."""
    metric = _plain(name)
    return -1 if metric is not None and metric.higher_is_better is False else 1


def arrow(name: str) -> str:
    """Returns the direction in which a metric gets better, "↑" or "↓"; "" where neither is."""
    metric = _plain(name)
    if metric is None or metric.higher_is_better is None:
        return ""
    return "↑" if metric.higher_is_better else "↓"


def digits(name: str) -> int:
    """Returns how many digits after the point a metric has in tables."""
    metric = _plain(name)
    return 2 if metric is None else metric.digits


def rules(names: Iterable[str]) -> dict[str, str]:
    """Returns the rules of metrics in words, sorted by name; other names are left out."""
    known = {name: metric.rule for name, metric in metrics().items()}
    for name in streaming_headlines():
        known[name] = (
            f"{name.removeprefix(STREAMING)} of the newest prediction that was finished when the "
            "frame came, whatever frame that is of; without one all labels are missed; all "
            "labelled frames, also those that were dropped"
        )
    for headline in [*headlines(), *streaming_headlines()]:
        known[headline + _VIDEO_MEAN] = (
            f"{headline} of each video by itself; mean over videos, each weighs the same"
        )
    return {name: known[name] for name in sorted(names) if name in known}
