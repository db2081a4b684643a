"""From records to numbers: every protocol by its name, with its rule in words.

Everything here is independent of the order in which frames were recorded, to the last bit: several
processes may have written them. Values are in percent; None where nothing defines them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from detectron2.data import MetadataCatalog

from .instances import (
    Detections,
    class_average_precision,
    frame_average_precision,
    summarize_precision,
)
from .panoptic import (
    add_panoptic_counts,
    class_quality,
    panoptic_quality,
    panoptic_quality_release,
)
from .prediction import summarize_predictions
from .sem_seg import add_counts, class_iou, mean_iou, mean_iou_release
from .temporal import add_changes, change_shares

Record = Any
"""What an evaluator keeps of one frame: JSON values, in the form in which they are read back."""

Row = dict[str, Any]

_FRAMES = (
    "; mean over the frames of a video for which that is defined, of COCO Videos every 10th from "
    "the first; frames without labels are left out, and so are those that could not be read; mean "
    "over videos weighted by their numbers of such frames"
)
_AP = (
    "mean over 101 levels of recall of the precision of each class's masks, all frames pooled; at "
    "most 100 detections of a class per frame; crowds are ignored; mean over the labelled classes; "
)
_VIDEO_MEAN = "{} of each video by itself; mean over videos, each weighs the same"


@dataclass(frozen=True)
class LabelInfo:
    """What a data set says of its labels.

    classes: names by contiguous id, may be empty.
    things: ids of the countable classes; None where nobody says.
    ignore_label: of pixels that do not count; see also ``unlabelled_category``.
    period: every how many frames the release scores one (10 for COCO Videos).
    """

    classes: tuple[str, ...] = ()
    things: frozenset[int] | None = None
    ignore_label: int = 255
    period: int = 1

    @classmethod
    def of(cls, dataset_name: str | None) -> LabelInfo:
        """Of a registered data set; None or "" for videos without one."""
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

    @property
    def unlabelled_category(self) -> int | None:
        """Category of segments that do not count: ``ignore_label``, unless that is a class.

        Label maps of 8 bits have no class 255, but COCO's json files may have any number.
        """
        largest = max(len(self.classes) - 1, *(self.things or ()), -1)
        return None if self.ignore_label <= largest else self.ignore_label

    def name(self, class_id: int) -> str:
        """The class's name, else its id."""
        return self.classes[class_id] if class_id < len(self.classes) else str(class_id)


Self = TypeVar("Self", bound="Tally")


class Tally(ABC):
    """What the numbers of one task need of one video's records; grows slowly or not at all.

    Attributes:
        rules: metric to its rule in words.
        main: the metric that is averaged over videos and frames too, if any.
        frame_values: of the frames that the release scores.
    """

    rules: ClassVar[Mapping[str, str]]
    main: ClassVar[str] = ""

    def __init__(self) -> None:
        self.frame_values = array("d")

    @abstractmethod
    def add(self, frame_index: int, record: Record) -> None:
        """Adds a frame."""

    @staticmethod
    def release(record: Record) -> float | None:
        """The number of one frame by the rules of the authors' release."""
        return None

    @classmethod
    @abstractmethod
    def pooled(cls: type[Self], videos: Sequence[Self], info: LabelInfo) -> Row:
        """The field's numbers of all frames of the videos; ``per_class`` nested.

        Args:
            videos: at least one, sorted by name.
            info: names the classes.
        """


class SemSegTally(Tally):
    """Confusion counts."""

    main = "mIoU"
    rules: ClassVar = {
        "mIoU": "IoU of each class over the pixels of all frames pooled; mean over the classes "
        "that occur in the labels; pixels labelled as void do not count",
        "mIoU_frame_release": "IoU of each class in each single frame; mean over the classes "
        "that are labelled or predicted there, 0 where predicted but not labelled" + _FRAMES,
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, list[int]] = {}

    def add(self, frame_index: int, record: Record) -> None:
        self.counts = add_counts([self.counts, record])

    @staticmethod
    def release(record: Record) -> float | None:
        return mean_iou_release(record)

    @classmethod
    def pooled(cls, videos: Sequence[SemSegTally], info: LabelInfo) -> Row:
        counts = add_counts(video.counts for video in videos)
        ious = {info.name(k): v for k, v in class_iou(counts).items()}
        return {"mIoU": mean_iou(counts), "per_class": {"IoU": ious}}


class PanopticTally(Tally):
    """Matched, false and missed segments."""

    main = "PQ"
    rules: ClassVar = {
        "PQ": "sum of IoUs above 1/2 over TP + FP/2 + FN/2 of each class, all frames pooled; "
        "mean over the classes that are labelled or predicted; void pixels (and the unlabelled "
        "category) count for no union, crowds are never missed, predictions of which more than "
        "half is void or crowd of their class are not false",
        "SQ": "as PQ, but the mean IoU of the matched segments; 0 where none is matched",
        "RQ": "as PQ, but TP over TP + FP/2 + FN/2",
        "PQ_things": "PQ, mean over the thing classes",
        "PQ_stuff": "PQ, mean over the stuff classes",
        "PQ_frame_release": "PQ of each single frame; crowds are ordinary segments; the "
        "unlabelled category is not void; areas of labelled segments as their file states "
        "them; a frame without any segment counts as 0" + _FRAMES,
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, list[Any]] = {}

    def add(self, frame_index: int, record: Record) -> None:
        self.counts = add_panoptic_counts([self.counts, record["standard"]])

    @staticmethod
    def release(record: Record) -> float | None:
        return panoptic_quality_release(record["release"])

    @classmethod
    def pooled(cls, videos: Sequence[PanopticTally], info: LabelInfo) -> Row:
        counts = add_panoptic_counts(video.counts for video in videos)
        pq, sq, rq = panoptic_quality(counts) or (None, None, None)
        result: Row = {"PQ": pq, "SQ": sq, "RQ": rq}
        if (things := info.things) is not None:
            of_things = panoptic_quality(counts, lambda k: k in things)
            of_stuff = panoptic_quality(counts, lambda k: k not in things)
            result["PQ_things"] = of_things and of_things[0]
            result["PQ_stuff"] = of_stuff and of_stuff[0]
        by_class = {info.name(k): values for k, values in class_quality(counts).items()}
        per_class = {
            metric: {name: values[i] for name, values in by_class.items()}
            for i, metric in enumerate(("PQ", "SQ", "RQ"))
        }
        return {**result, "per_class": per_class}


class InstanceTally(Tally):
    """Detections, about 30 bytes each."""

    main = "AP"
    rules: ClassVar = {
        "AP": _AP + "mean over IoU thresholds 0.50, 0.55, ..., 0.95",
        "AP50": _AP + "IoU threshold 0.50",
        "AP75": _AP + "IoU threshold 0.75",
        "APs": _AP + "as AP, objects of up to 32^2 pixels",
        "APm": _AP + "as AP, objects of 32^2 to 96^2 pixels",
        "APl": _AP + "as AP, objects of 96^2 pixels and more",
        "AP_frame_release": "AP of each single frame; mean over the classes labelled there, "
        "where all segments are objects: a labelled stuff class counts as 0, and so does a frame "
        "without predictions" + _FRAMES,
    }

    def __init__(self) -> None:
        super().__init__()
        self.classes: dict[int, Detections] = {}

    def add(self, frame_index: int, record: Record) -> None:
        for k, own in record["things"].items():
            self.classes.setdefault(int(k), Detections()).add(frame_index, own)

    @staticmethod
    def release(record: Record) -> float | None:
        return frame_average_precision(record)[1]

    @classmethod
    def pooled(cls, videos: Sequence[InstanceTally], info: LabelInfo) -> Row:
        by_class = class_average_precision(video.classes for video in videos)
        aps = {info.name(k): summarize_precision({k: ap})["AP"] for k, ap in by_class.items()}
        labelled = {name: ap for name, ap in aps.items() if ap is not None}
        return {**summarize_precision(by_class), "per_class": {"AP": labelled}}


class TemporalTally(Tally):
    """Pixels that changed."""

    rules: ClassVar = {
        "flicker": "share of the pixels whose predicted class differs from the frame before, "
        "of those whose label is one class in both frames; all pairs of adjacent frames pooled",
        "change": "share of all pixels whose predicted class differs from the frame before; "
        "motion counts as well; all pairs of adjacent frames pooled",
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def add(self, frame_index: int, record: Record) -> None:
        self.counts = add_changes([self.counts, record])

    @classmethod
    def pooled(cls, videos: Sequence[TemporalTally], info: LabelInfo) -> Row:
        return dict(change_shares(add_changes(video.counts for video in videos)))


class PredictionTally(Tally):
    """Numbers of predicted classes, and entropies: 24 bytes a frame."""

    rules: ClassVar = {
        "predicted_classes_mean": "number of classes that a frame's prediction has; mean over "
        "frames, labelled or not (min: the least, last: of the last frame of the last video, "
        "first_quarter and last_quarter: mean over these frames of every video)",
        "prediction_entropy_mean": "entropy of a frame's prediction in nats, mean over pixels "
        "(instances: of their scores); mean over frames, labelled or not (max: the largest, "
        "first_quarter and last_quarter: mean over these frames of every video)",
        "nonfinite_frames": "number of frames with a predicted score that is not finite",
    }

    def __init__(self) -> None:
        super().__init__()
        self.frames = array("q")
        self.classes = array("q")
        self.entropies = array("d")
        self.nonfinite = 0

    def add(self, frame_index: int, record: Record) -> None:
        entropy = record["entropy"]
        self.frames.append(frame_index)
        self.classes.append(record["classes"])
        self.entropies.append(math.nan if entropy is None else entropy)
        self.nonfinite += not record.get("finite", True)  # rows of earlier versions

    @classmethod
    def pooled(cls, videos: Sequence[PredictionTally], info: LabelInfo) -> Row:
        in_order = []
        for video in videos:
            order = sorted(range(len(video.frames)), key=video.frames.__getitem__)
            classes = [video.classes[i] for i in order]
            in_order.append((classes, [video.entropies[i] for i in order]))
        return dict(summarize_predictions(in_order, sum(video.nonfinite for video in videos)))


TASKS: dict[str, type[Tally]] = {
    "sem_seg": SemSegTally,
    "panoptic_seg": PanopticTally,
    "instances": InstanceTally,
    "temporal": TemporalTally,
    "prediction": PredictionTally,
}
"""Name of an evaluator to what is made of its records."""

_RULES = {
    **{name: rule for task in TASKS.values() for name, rule in task.rules.items()},
    **{f"{main}_video_mean": _VIDEO_MEAN.format(main) for t in TASKS.values() if (main := t.main)},
}


def rules(metrics: Iterable[str]) -> dict[str, str]:
    """The rule of each metric in words."""
    return {name: _RULES[name] for name in sorted(metrics) if name in _RULES}


class ScoredFrame(NamedTuple):
    """The records of one frame, by evaluator."""

    video_id: str
    frame_index: int
    records: Mapping[str, Record]


class Scores:
    """The numbers of one model on some videos, from one frame's records after another."""

    def __init__(self, info: LabelInfo) -> None:
        self.info = info
        self._tallies: dict[str, dict[str, Tally]] = {}
        self._frames: dict[str, int] = {}
        self._labelled: dict[str, int] = {}

    def add(self, frame: ScoredFrame) -> None:
        """Adds a frame, which must be a new one."""
        tallies = self._tallies.setdefault(frame.video_id, {})
        for name, record in frame.records.items():
            if name not in tallies:
                tallies[name] = TASKS[name]()
            tallies[name].add(frame.frame_index, record)
            if tallies[name].main and frame.frame_index % self.info.period == 0:
                value = tallies[name].release(record)
                if value is not None:
                    tallies[name].frame_values.append(value)
        self._frames[frame.video_id] = self._frames.get(frame.video_id, 0) + 1
        labelled = any(TASKS[name].main for name in frame.records)
        self._labelled[frame.video_id] = self._labelled.get(frame.video_id, 0) + labelled

    def result(self) -> Row:
        """Metric to value, ``per_class`` (metric to class to value) and ``videos``: video to
        ``frames``, ``labelled_frames`` (how many there are) and the same metrics. Empty without
        records.
        """
        if not any(self._tallies.values()):
            return {}
        videos: dict[str, Row] = {}
        for video_id, tallies in sorted(self._tallies.items()):
            numbers = self._numbers([tallies])
            numbers.pop("per_class", None)
            counts = {
                "frames": self._frames[video_id],
                "labelled_frames": self._labelled[video_id],
            }
            videos[video_id] = {**counts, **numbers}
        result = self._numbers([tallies for _, tallies in sorted(self._tallies.items())])
        for name in {task.main for task in TASKS.values()} & result.keys():
            values = [video[name] for video in videos.values() if video.get(name) is not None]
            result[f"{name}_video_mean"] = mean(values)
        return {**dict(sorted(result.items())), "videos": videos}

    def _numbers(self, videos: Sequence[Mapping[str, Tally]]) -> Row:
        result: Row = {}
        per_class: Row = {}
        for name, task in TASKS.items():
            own = [tallies[name] for tallies in videos if name in tallies]
            if not own:
                continue
            numbers = task.pooled(own, self.info)
            per_class.update(numbers.pop("per_class", {}))
            result.update(numbers)
            if task.main:
                result[f"{task.main}_frame_release"] = release_mean(t.frame_values for t in own)
        return {**result, "per_class": per_class} if per_class else result


def score(frames: Iterable[ScoredFrame], info: LabelInfo) -> Row:
    """:meth:`Scores.result` of frames in any order."""
    scores = Scores(info)
    for frame in frames:
        scores.add(frame)
    return scores.result()


def release_mean(videos: Iterable[Sequence[float]]) -> float | None:
    """The release's average of single frames' numbers.

    It takes the mean of each video, then the mean over videos with their numbers of frames as
    weights; that is the mean over all frames.
    """
    return mean([value for video in videos for value in video])


def mean(values: Sequence[float]) -> float | None:
    """Of any order the same to the last bit; None of nothing."""
    return math.fsum(values) / len(values) if len(values) else None
