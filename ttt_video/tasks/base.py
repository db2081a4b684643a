"""What a task is: which labels it reads, the record of a frame, its metrics, its picture."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """What became of a training image.

    shape: (height, width) after ``transforms``.
    ignore_label: label of pixels without ground truth.
    """

    shape: tuple[int, int]
    transforms: TransformList
    ignore_label: int


Painter = Callable[[np.ndarray], np.ndarray]
"""Draws a prediction over an (h, w, 3) uint8 RGB frame; gives (H, W, 3) uint8 RGB."""

DO_THEY_AGREE = "do the model's classes and the frame's size agree with its labels?"

AnyMetric = TypeVar("AnyMetric", bound=type[Metric])


class Task(DatasetEvaluator):
    """Scores one model on one data set, one frame at a time::

        task = SemanticTask(LabelInfo.of(dataset_name))
        for frame, output in stream:
            record = task.record(frame, output)      # JSON, kept in the frame's row
            task.frame_metrics(record)               # numbers of this frame alone, for curves
        score(the records of all rows, info)         # every number of the summary
        task.painter(output, metadata)(image)        # the overlay

    A subclass under :data:`TASK_REGISTRY` is all that a new task needs, with ``name``,
    ``output_keys``, :meth:`_record` and metrics by :meth:`add_metric`. One that trains the model,
    too, has ``mappers`` and the methods named ``training_*``. ``process`` and ``evaluate`` are
    detectron2's interface, for ``inference_on_dataset``.

    Attributes:
        name: key of the records in a row.
        kind: word for messages; also names the mappers of training.
        label_keys: keys of a labelled frame; frames without have no record. Empty: the task needs
            no labels, and every frame that can be scored has a record.
        output_keys: any of these outputs of a model can be scored.
        evaluator_types: ``evaluator_type`` of the data sets that mean the task.
        headline: the metric that the task is judged by, which is averaged over videos, too.
        tally: collects the records for the metrics.
        metrics: by name; see :meth:`add_metric`.
        switch: config key that makes the model give the output.
        picture_rank: of the outputs of one frame, that of the task with the highest rank is drawn;
            0 and the first of equals unless the task says otherwise. None: it has no picture.
        class_keys: metadata that lists the names of the classes; the first that is there does.
        objects_key: label key of the list of objects; "" where each pixel has a class.
        mappers: values of ``INPUT.DATASET_MAPPER_NAME`` that train for the task, to the way of
            cropping ("crop" or "lsj").
        still_name: its results' name in the evaluation of training.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = ""
    label_keys: ClassVar[tuple[str, ...]] = ()
    output_keys: ClassVar[tuple[str, ...]]
    evaluator_types: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[str] = ""
    tally: ClassVar[type[Tally]] = Tally
    metrics: ClassVar[dict[str, Metric]]
    switch: ClassVar[str] = ""
    picture_rank: ClassVar[int | None] = None
    class_keys: ClassVar[tuple[str, ...]] = CLASS_KEYS
    objects_key: ClassVar[str] = ""
    mappers: ClassVar[Mapping[str, str]] = {}
    still_name: ClassVar[str] = ""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "name" in cls.__dict__:  # else it is a variant of a task
            if any(task.name == cls.name for task in tasks()):
                raise ValueError(f"there is a task {cls.name!r} already: choose another name")
            cls.metrics = {}
            cls.still_name = cls.__dict__.get("still_name", cls.name)

    @classmethod
    def add_metric(cls, metric: AnyMetric) -> AnyMetric:
        """Decorator: adds a metric that reads this task's records.

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
        self,
        info: LabelInfo | None = None,
        *,
        required: bool = False,
        cfg: CfgNode | None = None,
    ) -> None:
        """
        Args:
            info: classes and void label of the data set.
            required: a labelled frame whose output cannot be scored is an error, not skipped.
            cfg: resolved; None stands for a task without settings of its own.
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
        """Whether a frame has this task's labels; False for a task that needs none."""
        return bool(cls.label_keys) and all(key in frame for key in cls.label_keys)

    def record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """Returns the record of one frame: small, JSON values only; None if there is no such.

        Args:
            frame: a dataset dict with the data set's label keys.
            output: what the model made of it, in detectron2's format.

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
        """Returns :meth:`record` of a labelled frame and an output that can be scored."""

    @classmethod
    def frame_metrics(cls, record: Record) -> dict[str, float | None]:
        """Returns the numbers of one frame alone; None where nothing defines them."""
        return {
            metric.frame_name or metric.name: metric.frame(record)
            for metric in cls.metrics.values()
            if metric.frame is not None and metric.is_in(record)
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns what must survive an interruption between two frames; tensors, plain values."""
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

        Other processes than the first return nothing.
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
        """Returns what :func:`overlay_painter` does for an output of this task."""
        raise NotImplementedError(f"{cls.__name__} has no picture")

    @classmethod
    def label_map(cls, record: Mapping[str, Any]) -> np.ndarray | None:
        """Returns the (H, W) labels as they are stored: classes, or ids of ``objects_key``.

        None where labels are no map.
        """
        return None

    @classmethod
    def label_classes(cls, record: Mapping[str, Any]) -> np.ndarray | None:
        """Returns the (H, W) labelled classes, -1 where there is none; None: labels are no map."""
        ids = cls.label_map(record)
        if ids is None or not cls.objects_key:
            return ids
        classes = np.full(ids.shape, -1, np.int32)
        for segment in record[cls.objects_key]:
            classes[ids == segment["id"]] = segment["category_id"]
        return classes

    @classmethod
    def draw_labels(cls, canvas: Any, record: Mapping[str, Any], metadata: Any) -> Any:
        """Draws the labels of a record on detectron2's ``Visualizer``; returns its picture."""
        return canvas.draw_dataset_dict(record)

    # ---- training on stills, and its data sets

    @classmethod
    def class_names(cls, metadata: Any) -> list[str]:
        """Returns the names of a data set's classes by contiguous id; [] where nobody says."""
        return list(metadata.get(cls.class_keys[0]) or [])

    @classmethod
    def predicted_classes(cls, cfg: CfgNode) -> tuple[int, str]:
        """Returns how many classes the predictions of a config's model have, and what they are."""
        return cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, "classes"

    @classmethod
    def check_records(
        cls, records: Iterable[Mapping[str, Any]], *, everywhere: bool = False
    ) -> None:
        """Refuses a data set whose labels this task cannot read.

        Args:
            records: of the data set.
            everywhere: each of them must have labels.

        Raises:
            UserError: names the first fault.
        """

    @classmethod
    def training_labels(cls, record: Mapping[str, Any]) -> Any:
        """Reads what :meth:`training_target` needs: an (H, W, ...) map, or a list of objects."""
        raise NotImplementedError(f"{cls.__name__} trains nothing")

    @classmethod
    def training_target(cls, labels: Any, record: Mapping[str, Any], image: Augmented) -> Target:
        """Makes the target of one augmented image.

        Args:
            labels: of :meth:`training_labels`; a map is transformed already.
            record: of the image.
            image: what it became.
        """
        raise NotImplementedError(f"{cls.__name__} trains nothing")

    @classmethod
    def still_evaluator(cls, cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """Returns what evaluates a data set of stills during training.

        Args:
            cfg: resolved.
            dataset_name: registered; its ``evaluator_type`` is one of this task's.
            output_dir: for the evaluator's files.

        Raises:
            UserError: the data set lacks what the evaluator needs.
        """
        return cls(LabelInfo.of(dataset_name), required=True)


class Shared(dict[str, Any]):
    """A frame or an output of a model, with what several tasks compute from it."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self._known: dict[Callable[..., Any], Any] = {}

    def once(self, function: Callable[[Any], Any]) -> Any:
        """Returns ``function(self)``, which is computed the first time alone."""
        if function not in self._known:
            self._known[function] = function(self)
        return self._known[function]


def once(function: Callable[[Any], Any], content: Mapping[str, Any]) -> Any:
    """Returns ``function(content)``; of one :class:`Shared` it is computed only once."""
    return content.once(function) if isinstance(content, Shared) else function(content)


def build_tasks(dataset_name: str | None, cfg: CfgNode | None = None) -> list[Task]:
    """Returns the tasks of one model on one data set; a second model needs a list of its own.

    Args:
        dataset_name: registered; its ``evaluator_type`` says what is scored, and a frame labelled
            for it that cannot be is an error. Without a data set, or without that, every frame is
            scored on whatever labels it has. Tasks that need no labels, and those that name no
            ``evaluator_types``, are always there.
        cfg: resolved; without it no task asks a network that a key names.
    """
    info = LabelInfo.of(dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type") if dataset_name else None
    meant = tasks_of(kind)
    return [
        task(info, required=task in meant, cfg=cfg)
        for task in tasks()
        if not task.label_keys or not task.evaluator_types or task in meant or not meant
    ]


def score_frame(
    scorers: Sequence[Task], frame: Mapping[str, Any], output: Mapping[str, Any]
) -> Row:
    """Returns ``records`` and ``metrics`` of one frame's row; {} where nothing can be scored."""
    frame, output = Shared(frame), Shared(output)
    records: Row = {}
    metrics: Row = {}
    for task in scorers:
        record = task.record(frame, output)
        if record is not None:
            records[task.name] = record
            metrics.update(task.frame_metrics(record))
    return {"records": records, "metrics": metrics} if records else {}


def overlay_painter(output: Mapping[str, Any], metadata: Any) -> Painter:
    """Returns a function that draws a model's output over its frame, also later in another thread.

    What needs the output is done here, on its device; what is kept of it is a map of the pixels.
    Of several predictions that of the task with the highest ``picture_rank`` is drawn. Pixels
    without a prediction keep the image.

    Args:
        output: detectron2's output of one frame, on any device.
        metadata: detectron2 ``Metadata`` of the data set, or any object with its colours.

    Raises:
        ValueError: there is nothing to draw.
    """
    drawn = [task for task in tasks() if task.picture_rank is not None]
    able = [task for task in drawn if any(key in output for key in task.output_keys)]
    if not able:
        keys = ", ".join(dict.fromkeys(key for task in drawn for key in task.output_keys))
        raise ValueError(f"no {keys} to draw in an output with keys {sorted(output)}")
    best = max(able, key=lambda task: task.picture_rank or 0)
    return best.painter(output, metadata)
