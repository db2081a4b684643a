"""The labels of a data set: classes, things and the label of no class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata

from .registry import tasks, tasks_of

logger = logging.getLogger(__name__)

_NEAR = 0.85  # difflib's ratio: a letter or two. Names of the built-in tasks are farther apart.

CLASS_KEYS = ("stuff_classes", "thing_classes")
"""Metadata with the names of the classes, unless a task names other keys."""


def class_metadata(cfg: CfgNode, dataset_name: str) -> Metadata | None:
    """Returns the metadata with names and colours of a model's classes, for all that shows them.

    It is that of the first data set with as many classes or colours as the model has classes, among
    ``dataset_name`` ("" for none), the config's test sets and its training sets; if none has, that
    of the first of these that is no training set; None where there is none.
    """
    shown = [name for name in (dataset_name, *cfg.DATASETS.TEST) if name]
    for name in (*shown, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(name)
        keys = (*CLASS_KEYS, "stuff_colors", "thing_colors")
        counts = [len(metadata.get(key) or ()) for key in keys]
        if cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES in counts:
            return metadata
    return MetadataCatalog.get(shown[0]) if shown else None


@dataclass(frozen=True)
class LabelInfo:
    """Describes the labels of a data set.

    classes: names by contiguous id, may be empty.
    things: ids of the countable classes; None if they are unknown.
    ignore_label: label of pixels that do not count; see also ``unlabelled_category``.
    period: the release scores one of so many frames (10 for COCO Videos).
    """

    classes: tuple[str, ...] = ()
    things: frozenset[int] | None = None
    ignore_label: int = 255
    period: int = 1

    @classmethod
    def of(cls, dataset_name: str | None) -> LabelInfo:
        """Describes a registered data set; None or "" stands for videos without one."""
        if not dataset_name:
            return cls()
        metadata = MetadataCatalog.get(dataset_name)
        meant = tasks_of(metadata.get("evaluator_type"))
        keys = meant[0].class_keys if meant else CLASS_KEYS
        things = metadata.get("thing_dataset_id_to_contiguous_id")
        return cls(
            classes=tuple(next(filter(None, map(metadata.get, keys)), ())),
            things=None if things is None else frozenset(things.values()),
            ignore_label=metadata.get("ignore_label", 255),
            period=metadata.get("label_period", 1),
        )

    @property
    def unlabelled_category(self) -> int | None:
        """The category of segments that do not count: ``ignore_label``, unless that is a class.

        Label maps of 8 bits have no class 255, but COCO's json files may have any number.
        """
        largest = max(len(self.classes) - 1, *(self.things or ()), -1)
        return None if self.ignore_label <= largest else self.ignore_label

    def name(self, class_id: int) -> str:
        """Returns the name of a class, or its id if it has none."""
        return self.classes[class_id] if class_id < len(self.classes) else str(class_id)


def warn_of_near_misses(dataset_name: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Warns where a task would be scored on a data set but for a letter or two in a name.

    Such a task would be left out without a word, because it may just be for other data sets.
    """
    has = "and data set %s has %r: is one misspelt?"
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type") or ""
    for task in (task for task in tasks() if kind not in task.evaluator_types):
        for near in get_close_matches(kind, task.evaluator_types, 1, _NEAR):
            names = (task.name, near, dataset_name, kind)
            logger.warning(f"task %s is for evaluator_type %r, {has}", *names)
    keys = {key for record in records for key in record}
    unread = keys - {key for task in tasks() for key in task.label_keys}
    for task in tasks():
        for key in (key for key in task.label_keys if key not in keys):
            for near in get_close_matches(key, unread, 1, _NEAR):
                names = (task.name, key, dataset_name, near)
                logger.warning(f"task %s reads label key %r, {has}", *names)
