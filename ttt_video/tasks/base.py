"""The base class of tasks: labels, the record of a frame, metrics, pictures, training."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import TransformList
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..errors import UserError
from .labels import CLASS_KEYS, LabelInfo
from .metrics import Metric, Record, Tally
from .registry import tasks, tasks_of
from .scores import Row, ScoredFrame, score

Target = tuple[np.ndarray, np.ndarray]
"""Classes (N,) int64 and masks (N, H, W) bool of a training image, N >= 0."""


class Augmented(NamedTuple):
    """A training image after augmentation.

    shape: (height, width) after ``transforms``.
    ignore_label: label of pixels without ground truth.
    """

    shape: tuple[int, int]
    transforms: TransformList
    ignore_label: int


Painter = Callable[[np.ndarray], np.ndarray]
"""Draws a prediction over an (h, w, 3) uint8 RGB frame; returns (H, W, 3) uint8 RGB."""


class Difference(NamedTuple):
    """What a task says of two models that predict the same frame.

    name: key of the number, in rows and summary.
    words: a sentence about the mean over frames, with the number as ``{}``.
    """

    name: str
    words: str


OTHER_CLASS = Difference("other_class", "{:.2f} % of the pixels have another class")
"""Of tasks whose predictions are classes of pixels."""

DO_THEY_AGREE = "do the model's classes and the frame's size agree with its labels?"

AnyMetric = TypeVar("AnyMetric", bound=type[Metric])


COLOR_LABELS = "video_color"
"""The ``evaluator_type`` of frames that are labelled with their own colours."""


class Task(DatasetEvaluator):
    """Scores one model on one data set, one frame at a time::

        task = SemanticTask(LabelInfo.of(dataset_name))
        for frame, output in stream:
            record = task.record(frame, output)      # JSON, kept in the frame's row
            task.frame_metrics(record)               # numbers of this frame alone, for curves
        score(the records of all rows, info)         # every number of the summary
        task.painter(output, metadata)(image)        # the overlay

    A new task is a subclass under :data:`TASK_REGISTRY` with ``name``, ``output_keys``,
    :meth:`_record` and metrics by :meth:`add_metric`. A task that trains the model also has
    ``mappers`` and the methods ``training_*``. ``process`` and ``evaluate`` are detectron2's
    interface, for ``inference_on_dataset``.

    Attributes:
        name: key of the records in a row.
        kind: word for messages; also names the mappers of training.
        label_keys: keys of a labelled frame; other frames have no record. If empty, every frame
            that can be scored has a record.
        output_keys: outputs of a model, any of which can be scored.
        evaluator_types: ``evaluator_type`` of the data sets that mean the task.
        headline: the metric that the task is judged by, which is averaged over videos, too.
        tally: collects the records for the metrics.
        metrics: metrics by name; see :meth:`add_metric`.
        streaming: whether its headline also says how good predictions are that come in time
            (:class:`~ttt_video.stream.OnTimeStream`); :meth:`missed` is needed for it.
        switch: config key that makes the model give the output.
        picture_rank: the task of the highest rank (the first of equals) is drawn; None: it has no
            picture.
        difference: the number of :meth:`differing`; None: the task has none.
        input_title: what the frame itself is called in pictures.
        label_titles: what :meth:`label_pictures` of a labelled frame are called.
        class_keys: metadata with the names of the classes; the first key that exists counts.
        classes_key: config key with the number of the model's classes.
        objects_key: label key of the list of objects; "" where each pixel has a class.
        mappers: values of ``INPUT.DATASET_MAPPER_NAME`` that train for the task, with the way of
            cropping ("crop" or "lsj").
        still_name: name of its results in the evaluation of training.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = ""
    label_keys: ClassVar[tuple[str, ...]] = ()
    output_keys: ClassVar[tuple[str, ...]]
    evaluator_types: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[str] = ""
    tally: ClassVar[type[Tally]] = Tally
    metrics: ClassVar[dict[str, Metric]]
    streaming: ClassVar[bool] = False
    switch: ClassVar[str] = ""
    picture_rank: ClassVar[int | None] = None
    difference: ClassVar[Difference | None] = None
    input_title: ClassVar[str] = "original"
    label_titles: ClassVar[tuple[str, ...]] = ()
    class_keys: ClassVar[tuple[str, ...]] = CLASS_KEYS
    classes_key: ClassVar[str] = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
    objects_key: ClassVar[str] = ""
    mappers: ClassVar[Mapping[str, str]] = {}
    still_name: ClassVar[str] = ""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "name" in cls.__dict__:  # otherwise it is a variant of a task
            if any(task.name == cls.name for task in tasks()):
                raise ValueError(f"there is a task {cls.name!r} already: choose another name")
            cls.metrics = {}
            cls.still_name = cls.__dict__.get("still_name", cls.name)

    @classmethod
    def add_metric(cls, metric: AnyMetric) -> AnyMetric:
        """Adds a metric that reads this task's records; a decorator.

        Raises:
            ValueError: there is a metric of that name already, or it lacks an attribute.
        """
        name = getattr(metric, "name", None)
        if any(name in task.metrics for task in [*tasks(), cls]):
            raise ValueError(f"there is a metric {name!r} already")
        for attribute in ("name", "rule", "example", "value"):
            if not hasattr(metric, attribute):
                raise ValueError(f"the metric {metric.__name__} has no {attribute!r}: give it one")
        cls.metrics[metric.name] = metric()
        return metric

    def __init__(
        self, info: LabelInfo | None = None, *, required: bool = False, cfg: CfgNode | None = None
    ) -> None:
        """
        Args:
            info: classes and void label of the data set.
            required: makes a labelled frame an error if its output cannot be scored.
            cfg: resolved; a task without settings of its own needs none.
        """
        self.info = info or LabelInfo()
        self.required = required
        self.cfg = cfg
        self.reset()

    def reset(self) -> None:
        """Forgets all frames."""
        self._frames: list[ScoredFrame] = []

    @classmethod
    def labels(cls, frame: Mapping[str, Any]) -> bool:
        """Says whether a frame has this task's labels; False for a task that needs none."""
        return bool(cls.label_keys) and all(key in frame for key in cls.label_keys)

    def record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """Returns the record of one frame, small and of JSON values, or None.

        Args:
            frame: a dataset dict with the data set's label keys.
            output: the model's output for it, in detectron2's format.

        Raises:
            UserError: the labels cannot be read, do not fit the output, or need another output.
        """
        if self.label_keys and not self.labels(frame):
            return None
        if any(key in output for key in self.output_keys):
            return self._record(frame, output)
        if self.required:
            switch = f": switch the output on ({self.switch})" if self.switch else ""
            raise UserError(
                f"{frame.get('file_name')} is labelled for {self.name}, but the model's outputs "
                f"are {', '.join(output) or 'none'}{switch}"
            )
        return None

    @abstractmethod
    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """Returns the record of a labelled frame whose output can be scored."""

    def missed(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """Returns the record of a labelled frame without any prediction: all labels are missed.

        None of tasks that are not :attr:`streaming`, and of frames that have no record.

        Args:
            frame: see :meth:`record`.
            output: a prediction that came too late; its size and classes alone may be looked at.
        """
        return None

    @classmethod
    def with_steps(cls, record: Record, steps: Sequence[Record]) -> Record:
        """Returns the record with what it keeps of the records after each gradient step."""
        return record

    @classmethod
    def frame_metrics(cls, record: Record) -> dict[str, float | None]:
        """Returns the numbers of one frame alone; None where they are not defined."""
        return {
            metric.frame_name or metric.name: metric.frame(record)
            for metric in cls.metrics.values()
            if metric.frame is not None and metric.is_in(record)
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on after a frame, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but got {sorted(state)}")

    # ---- detectron2's interface

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Collects the records of a batch."""
        for frame, output in zip(inputs, outputs, strict=True):
            record = self.record(frame, output)
            if record is not None:
                video_id = str(frame.get("video_id", ""))
                index = int(frame.get("frame_index", len(self._frames)))
                self._frames.append(ScoredFrame(video_id, index, {self.name: record}))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns ``{name: {metric: value}}`` over all processes, NaN where undefined.

        Only the first process returns something.
        """
        frames = list(itertools.chain(*comm.gather(self._frames)))
        if not comm.is_main_process():
            return {}
        scores = score(frames, self.info, [type(self)])
        per_class = scores.pop("per_class", {})
        scores.pop("videos", None)
        for metric, values in per_class.items():
            scores.update({f"{metric}-{name}": value for name, value in values.items()})
        number = {k: float("nan") if v is None else v for k, v in scores.items()}
        return {self.name: number}

    # ---- pictures

    @classmethod
    def painter(cls, output: Mapping[str, Any], metadata: Any) -> Painter:
        """Returns a function that draws an output of this task; see :func:`overlay_painter`."""
        raise NotImplementedError(f"{cls.__name__} has no picture")

    @classmethod
    def label_pictures(cls, frame: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
        """Returns what pictures of a frame end with: (H, W, 3) uint8 RGB labels by their titles."""
        return {}

    @classmethod
    def differing(cls, output: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Returns how much two predictions of a frame differ; see :attr:`difference`."""
        raise NotImplementedError(f"{cls.__name__} compares no predictions")

    @classmethod
    def drawn_names(cls, metadata: Any, count: int) -> tuple[str, ...]:
        """Returns the names of the classes for pictures; () if not all ``count`` are known."""
        known = (getattr(metadata, key, None) for key in cls.class_keys)
        names = tuple(next(filter(None, known), ()))
        return names if len(names) >= count else ()

    @classmethod
    def label_map(cls, record: Mapping[str, Any]) -> np.ndarray | None:
        """Returns the (H, W) labels as stored, classes or ids of objects; None: there is no map."""
        return None

    @classmethod
    def label_classes(cls, record: Mapping[str, Any]) -> np.ndarray | None:
        """Returns the (H, W) labelled classes, -1 for none; None: there is no map."""
        ids = cls.label_map(record)
        if ids is None or not cls.objects_key:
            return ids
        classes = np.full(ids.shape, -1, np.int32)
        for segment in record[cls.objects_key]:
            classes[ids == segment["id"]] = segment["category_id"]
        return classes

    @classmethod
    def image_class(cls, record: Mapping[str, Any]) -> int | None:
        """Returns the class of a whole image; None for a task of pixels or objects."""
        return None

    @classmethod
    def draw_labels(cls, canvas: Any, record: Mapping[str, Any], metadata: Any) -> Any:
        """Draws the labels of a record on detectron2's ``Visualizer`` and returns its picture."""
        return canvas.draw_dataset_dict(record)

    # ---- training on stills, and its data sets

    @classmethod
    def class_names(cls, metadata: Any) -> list[str]:
        """Returns the names of a data set's classes by contiguous id; [] if they are unknown."""
        return list(metadata.get(cls.class_keys[0]) or [])

    @classmethod
    def predicted_classes(cls, cfg: CfgNode) -> tuple[int, str]:
        """Returns how many classes a config's model predicts, and the word for them."""
        return attrgetter(cls.classes_key)(cfg), "classes"

    @classmethod
    def check_records(
        cls, records: Iterable[Mapping[str, Any]], *, everywhere: bool = False
    ) -> None:
        """Refuses labels that this task cannot read; with ``everywhere``, all records have labels.

        Raises:
            UserError: names the first fault.
        """

    @classmethod
    def require_labels(cls, record: Mapping[str, Any]) -> None:
        """Raises UserError if a training image lacks the labels of this task."""
        if not cls.labels(record):
            missing = [key for key in cls.label_keys if key not in record]
            raise UserError(
                f"{record['file_name']}: the {cls.kind} task needs {missing[0]!r} in the dataset; "
                "choose another INPUT.DATASET_MAPPER_NAME or data set, or TTT.JOINT pretrain, "
                "which needs no labels"
            )

    @classmethod
    def training_labels(cls, record: Mapping[str, Any]) -> Any:
        """Reads the labels for :meth:`training_target`: an (H, W, ...) map or a list of objects."""
        raise NotImplementedError(f"{cls.__name__} trains nothing")

    @classmethod
    def training_target(cls, labels: Any, record: Mapping[str, Any], image: Augmented) -> Target:
        """Makes the target of an augmented image; a map of ``labels`` is augmented already."""
        raise NotImplementedError(f"{cls.__name__} trains nothing")

    @classmethod
    def still_evaluator(cls, cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """Returns the evaluator of a data set of stills during training.

        Raises:
            UserError: the data set lacks labels that the evaluator needs.
        """
        return cls(LabelInfo.of(dataset_name), required=True)


class Shared(dict[str, Any]):
    """A frame or an output that keeps what several tasks compute from it."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Shared:
        """Returns ``content`` itself where it is one already."""
        return content if isinstance(content, cls) else cls(content)

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.known: dict[Callable[..., Any], Any] = {}


def once(function: Callable[[Any], Any], content: Mapping[str, Any]) -> Any:
    """Returns ``function(content)``, which is computed only once for a :class:`Shared`."""
    if not isinstance(content, Shared):
        return function(content)
    if function not in content.known:
        content.known[function] = function(content)
    return content.known[function]


def label_type(dataset_name: str | None, cfg: CfgNode | None = None) -> str | None:
    """Returns a data set's ``evaluator_type``; None where it has none.

    Grey frames (``INPUT.GREY``) have their own colours as labels, whatever else their data set has.
    """
    if not dataset_name:
        return None
    if cfg is not None and cfg.INPUT.GREY != "off":
        return COLOR_LABELS
    return MetadataCatalog.get(dataset_name).get("evaluator_type")


def build_tasks(dataset_name: str | None, cfg: CfgNode | None = None) -> list[Task]:
    """Returns the tasks of one model on one data set; a second model needs a list of its own.

    They are the tasks that the data set's ``evaluator_type`` means, which require that all labelled
    frames can be scored, and those that need no labels or have no ``evaluator_types``. Without a
    data set, or without its type, they are all tasks. ``cfg`` is resolved; without it no task asks
    a network that a key names.
    """
    info = LabelInfo.of(dataset_name)
    meant = tasks_of(label_type(dataset_name, cfg))
    return [
        task(info, required=task in meant, cfg=cfg)
        for task in tasks()
        if not task.label_keys or not task.evaluator_types or task in meant or not meant
    ]


def score_frame(
    scorers: Sequence[Task], frame: Mapping[str, Any], output: Mapping[str, Any]
) -> Row:
    """Returns ``records`` and ``metrics`` of one frame's row; {} if nothing can be scored."""
    frame, output = Shared.of(frame), Shared.of(output)
    records: Row = {}
    metrics: Row = {}
    for task in scorers:
        record = task.record(frame, output)
        if record is not None:
            records[task.name] = record
            metrics.update(task.frame_metrics(record))
    return {"records": records, "metrics": metrics} if records else {}


def drawn_task(output: Mapping[str, Any]) -> type[Task]:
    """Returns the task that draws an output: the one of the highest ``picture_rank``.

    Raises:
        ValueError: the output has nothing to draw.
    """
    drawn = [task for task in tasks() if task.picture_rank is not None]
    able = [task for task in drawn if any(key in output for key in task.output_keys)]
    if not able:
        keys = ", ".join(dict.fromkeys(key for task in drawn for key in task.output_keys))
        raise ValueError(f"no {keys} to draw in an output with keys {sorted(output)}")
    return max(able, key=lambda task: task.picture_rank or 0)


def overlay_painter(output: Mapping[str, Any], metadata: Any) -> Painter:
    """Returns a function that draws a model's output over its frame, later or in another thread.

    The function keeps a map of the pixels, and not the output; if it has a ``legend()``, that is
    shown below. It is that of :func:`drawn_task`; pixels without a prediction keep the image.

    Args:
        output: detectron2's output of one frame, on any device.
        metadata: detectron2 ``Metadata`` of the data set, or any object with its colours.

    Raises:
        ValueError: the output has nothing to draw.
    """
    return drawn_task(output).painter(output, metadata)


def differences(output: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Returns how much two models' predictions of a frame differ, by :attr:`Difference.name`.

    It is the number of the task of the highest ``picture_rank`` that has one.
    """
    able = [
        task
        for task in tasks()
        if task.difference is not None and any(key in output for key in task.output_keys)
    ]
    if not able:
        return {}
    best = max(able, key=lambda task: task.picture_rank or 0)
    assert best.difference is not None
    return {best.difference.name: best.differing(output, other)}
