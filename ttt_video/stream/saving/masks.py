"""Indexed PNG: a class for every pixel, with the colours inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...errors import UserError
from ...files import write_atomically
from ...formats.images import write_png
from ...tasks import once
from ...tasks.outputs import class_map
from .base import FORMAT_REGISTRY, VOID, Format, Job, Place, Predicted


def label_map(output: Mapping[str, Any]) -> np.ndarray:
    """Returns each pixel's class, (H, W) uint8; 255 where there is none."""
    classes = once(class_map, output)
    assert classes is not None
    return classes.astype(np.uint8)  # -1 becomes 255


def need_classes(what: str, predicted: Predicted) -> None:
    """Refuses a model that has no class for every pixel, or more classes than 8 bits hold.

    Raises:
        UserError: it is such a model.
    """
    predicted.need(what, "sem_seg", "panoptic_seg", fix="its pixels have no class")
    if len(predicted.names) > VOID:
        raise UserError(
            f"--save {what}: the model has {len(predicted.names)} classes, and 8 bits hold {VOID}: "
            "--save coco"
        )


@FORMAT_REGISTRY.register()
class Masks(Format):
    """``NAME.png``, 8 bit with a palette: class ids, 255 for none; ``classes.json`` names them."""

    name = "masks"
    each_frame = "*.png"

    def __init__(self, predicted: Predicted) -> None:
        """Makes the palette."""
        need_classes(self.name, predicted)
        super().__init__(predicted)
        self.palette = np.zeros((256, 3), np.uint8)
        self.palette[: len(predicted.colors)] = predicted.colors

    def start(self, place: Place) -> None:
        """Writes the list of classes."""
        super().start(place)
        named = zip(self.predicted.names, self.predicted.colors.tolist(), strict=True)
        classes = [{"id": k, "name": name, "color": color} for k, (name, color) in enumerate(named)]
        classes.append({"id": VOID, "name": "void", "color": [0, 0, 0]})
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in classes)
        write_atomically(
            place.folder / "classes.json",
            lambda part: part.write_text(f"[\n{lines}\n]\n", encoding="utf-8"),
        )

    def frame(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Job:
        """Writes the map."""
        path = self.place.folder / f"{self.place.stems(frame)}.png"
        return partial(write_png, path, label_map(output), palette=self.palette, tidy=False)
