"""Checks that a data set and a model have the same classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import attrgetter

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import UserError
from .base import Task, label_type
from .registry import tasks_of

logger = logging.getLogger(__name__)


def check_predicted_classes(cfg: CfgNode, dataset_name: str) -> None:
    """Refuses a data set whose labels a model's predictions cannot be compared with.

    A data set without an ``evaluator_type`` has no labels to compare, and every model suits it.

    Args:
        cfg: the model's config.
        dataset_name: a data set that was loaded, because COCO's classes are read with its json;
            "" for videos without a data set.

    Raises:
        UserError: the numbers of classes differ.
    """
    if not dataset_name:
        return
    for task in tasks_of(label_type(dataset_name, cfg))[:1]:
        _compare(dataset_name, task, *task.predicted_classes(cfg))


def check_trained_classes(cfg: CfgNode, dataset_name: str, task: type[Task]) -> None:
    """Refuses a data set whose labels a model cannot be trained on.

    The data set must have been loaded.

    Raises:
        UserError: the numbers of classes differ, or the values that stand for "no class".
    """
    metadata = MetadataCatalog.get(dataset_name)
    _compare(dataset_name, task, attrgetter(task.classes_key)(cfg), "classes")
    ignored, ours = metadata.get("ignore_label"), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if not task.objects_key and ignored is not None and ignored != ours:
        raise UserError(
            f"data set {dataset_name} marks pixels of no class by {ignored}, but "
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ours}: set it to {ignored}"
        )


def check_same_classes(dataset_names: Sequence[str]) -> None:
    """Refuses data sets of one task that have the same classes in another order.

    Their ids would mean other things, and nothing but the scores would tell. Other names, of which
    nobody knows what they mean, are logged. The data sets must have been loaded.

    Raises:
        UserError: the orders differ.
    """
    first: dict[type[Task], tuple[str, list[str]]] = {}
    for name in dataset_names:
        metadata = MetadataCatalog.get(name)
        for task in tasks_of(metadata.get("evaluator_type", None))[:1]:
            names = task.class_names(metadata)
            other, others = first.setdefault(task, (name, names))
            differing = [k for k, (a, b) in enumerate(zip(others, names, strict=False)) if a != b]
            if not differing or len(others) != len(names):
                continue
            k = differing[0]
            words = f"class {k} is {others[k]!r} in data set {other}, and {names[k]!r} in {name}"
            if sorted(names) == sorted(others):
                raise UserError(f"{words}: register both with their classes in the same order")
            logger.warning("%s, as are %d of %d classes", words, len(differing), len(names))


def _compare(dataset_name: str, task: type[Task], predicted: int, what: str) -> None:
    labelled = len(task.class_names(MetadataCatalog.get(dataset_name)))
    if labelled and labelled != predicted:
        raise UserError(
            f"data set {dataset_name} has {labelled} classes, but the model {predicted} {what}: "
            f"choose a model of these classes, or set {task.classes_key} (with TTT.NEW_CLASSES "
            "True to train a new class layer)"
        )
