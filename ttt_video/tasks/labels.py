"""The labels of a data set: classes, things and the label of no class."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.data import MetadataCatalog

from .registry import tasks_of

CLASS_KEYS = ("stuff_classes", "thing_classes")
"""Metadata with the names of the classes, unless a task names other keys."""


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
