"""From records to numbers: every protocol by its name, with its rule in words.

All functions are pure, and independent of the order in which frames were recorded: several
processes may have written them. Values are in percent; None where nothing defines them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from detectron2.data import MetadataCatalog

from .sem_seg import add_counts, class_iou, mean_iou, mean_iou_release

Record = Any
"""What an evaluator keeps of one frame: JSON values, in the form in which they are read back."""

Row = dict[str, Any]


@dataclass(frozen=True)
class LabelInfo:
    """What a data set says of its labels.

    classes: names by contiguous id, may be empty.
    things: ids of the countable classes; None where nobody says.
    ignore_label: of pixels and segments that do not count.
    period: every how many frames the release scores one (10 for COCO Videos).
    """

    classes: tuple[str, ...] = ()
    things: frozenset[int] | None = None
    ignore_label: int = 255
    period: int = 1

    @classmethod
    def of(cls, dataset_name: str | None) -> LabelInfo:
        """Of a registered data set; None for videos without one."""
        if not dataset_name:
            return cls()
        metadata = MetadataCatalog.get(dataset_name)
        instances_only = metadata.get("evaluator_type") == "video_instance"
        names = None if instances_only else metadata.get("stuff_classes")
        things = metadata.get("thing_dataset_id_to_contiguous_id")
        return cls(
            classes=tuple(names or metadata.get("thing_classes") or ()),
            things=None if things is None else frozenset(things.values()),
            ignore_label=metadata.get("ignore_label", 255),
            period=metadata.get("label_period", 1),
        )

    def name(self, class_id: int) -> str:
        """The class's name, else its id."""
        return self.classes[class_id] if class_id < len(self.classes) else str(class_id)


class ScoredFrame(NamedTuple):
    """The records of one frame, by evaluator."""

    video_id: str
    frame_index: int
    records: Mapping[str, Record]


@dataclass(frozen=True)
class Task:
    """How the records of one evaluator become numbers.

    pooled: of any set of frames, in order of video and frame; ``per_class`` nested.
    main: the pooled number that is also averaged over videos, if any.
    release: the number of one frame by the rules of the authors' release, if any.
    rules: metric to its rule.
    """

    pooled: Callable[[Sequence[Record], LabelInfo], Row]
    main: str = ""
    release: Callable[[Record], float | None] | None = None
    rules: Mapping[str, str] = field(default_factory=dict)


def _sem_seg(records: Sequence[Record], info: LabelInfo) -> Row:
    pooled = add_counts(records)
    ious = {info.name(k): v for k, v in class_iou(pooled).items()}
    return {"mIoU": mean_iou(pooled), "per_class": {"IoU": ious}}


TASKS: dict[str, Task] = {
    "sem_seg": Task(
        _sem_seg,
        main="mIoU",
        release=mean_iou_release,
        rules={
            "mIoU": "IoU of each class over the pixels of all frames pooled; mean over the classes "
            "that occur in the labels; pixels labelled as void do not count",
            "mIoU_frame_release": "IoU of each class in each single frame; mean over the classes "
            "that are labelled or predicted there, 0 where predicted but not labelled; mean over "
            "the frames of a video; mean over videos weighted by their numbers of frames",
        },
    ),
}

_VIDEO_MEAN = "{} of each video by itself; mean over videos, each weighs the same"


def score(frames: Iterable[ScoredFrame], info: LabelInfo) -> Row:
    """Every number of one model.

    Returns:
        Metric to value, ``per_class`` (metric to class to value) and ``videos`` (video to
        ``frames``, the number of frames scored, and the same metrics). Empty without records.
    """
    ordered = sorted(frames, key=lambda frame: (frame.video_id, frame.frame_index))
    if not ordered:
        return {}
    by_video: dict[str, list[ScoredFrame]] = {}
    for frame in ordered:
        by_video.setdefault(frame.video_id, []).append(frame)
    videos: dict[str, Row] = {}
    for video_id, own in by_video.items():
        numbers = _numbers(own, info)
        numbers.pop("per_class", None)
        videos[video_id] = {"frames": len(own), **numbers}
    result = _numbers(ordered, info)
    for name in {task.main for task in TASKS.values()} & result.keys():
        values = [video[name] for video in videos.values() if video.get(name) is not None]
        result[f"{name}_video_mean"] = mean(values)
    return {**dict(sorted(result.items())), "videos": videos}


def _numbers(ordered: Sequence[ScoredFrame], info: LabelInfo) -> Row:
    result: Row = {}
    per_class: Row = {}
    for name, task in TASKS.items():
        own = [frame for frame in ordered if name in frame.records]
        if not own:
            continue
        numbers = task.pooled([frame.records[name] for frame in own], info)
        per_class.update(numbers.pop("per_class", {}))
        result.update(numbers)
        if task.release is not None:
            result[f"{task.main}_frame_release"] = frame_mean(own, name, info.period)
    return {**result, "per_class": per_class} if per_class else result


def frame_mean(frames: Iterable[ScoredFrame], name: str, period: int = 1) -> float | None:
    """The release's average: of each scored frame's own number.

    The mean over a video's frames, averaged over videos with their numbers of frames as weights,
    is the mean over all frames. Frames without ground truth have no number and are left out.

    Args:
        frames: in any order.
        name: of the task.
        period: frames whose index it divides are scored, counted from 0.
    """
    release = TASKS[name].release
    assert release is not None
    scored = (f.records[name] for f in frames if f.frame_index % period == 0 and name in f.records)
    return mean([value for value in map(release, scored) if value is not None])


def mean(values: Sequence[float]) -> float | None:
    """Of any order the same to the last bit; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def rules(metrics: Iterable[str]) -> dict[str, str]:
    """The rule of each metric in words."""
    known = {name: rule for task in TASKS.values() for name, rule in task.rules.items()}
    known |= {f"{m}_video_mean": _VIDEO_MEAN.format(m) for t in TASKS.values() if (m := t.main)}
    return {name: known[name] for name in sorted(metrics) if name in known}
