"""What a data set says of its labels."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.data import MetadataCatalog

from .registry import tasks_of

CLASS_KEYS = ("stuff_classes", "thing_classes")
"""Metadata that lists the names of the classes, unless a task says otherwise."""


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
        """Returns that of a registered data set; None or "" stands for videos without one."""
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
        """Category of segments that do not count: ``ignore_label``, unless that is a class.

        Label maps of 8 bits have no class 255, but COCO's json files may have any number.
        """
        largest = max(len(self.classes) - 1, *(self.things or ()), -1)
        return None if self.ignore_label <= largest else self.ignore_label

    def name(self, class_id: int) -> str:
        """Returns the class's name, else its id."""
        return self.classes[class_id] if class_id < len(self.classes) else str(class_id)
