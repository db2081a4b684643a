"""KITTI-STEP: class and instance of every pixel as the colours of a PNG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...formats.images import write_png
from .base import FORMAT_REGISTRY, Format, Job, Predicted
from .masks import label_map, need_classes


@FORMAT_REGISTRY.register()
class KittiStep(Format):
    """``%06d.png``, RGB: R = class, 255 for none; 256 G + B = instance, 0 for none.

    The things of a panoptic model are numbered from 1 in each class and frame; they are not
    tracked from frame to frame. A semantic model has no instances.
    """

    name = "kitti_step"
    each_frame = "*.png"

    def __init__(self, predicted: Predicted) -> None:
        """Refuses models without a class for every pixel."""
        need_classes(self.name, predicted)
        super().__init__(predicted)

    def frame(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Job:
        """Writes the map."""
        path = self.place.folder / f"{self.place.stems.six_digits(frame)}.png"
        if "panoptic_seg" not in output:
            return partial(_write, path, label_map(output), None)
        # Not the classes of sem_seg, which an output may have beside it and which may differ.
        classes = label_map({"panoptic_seg": output["panoptic_seg"]})
        ids, segments = output["panoptic_seg"]
        numbers = np.zeros(1 + max((s["id"] for s in segments), default=0), np.uint16)
        count: Counter[int] = Counter()
        for segment in (s for s in segments if s["isthing"]):
            count[segment["category_id"]] += 1
            numbers[segment["id"]] = count[segment["category_id"]]
        return partial(_write, path, classes, numbers[ids.cpu().numpy()])


def _write(path: Any, classes: np.ndarray, instances: np.ndarray | None) -> None:
    pixels = np.zeros((*classes.shape, 3), np.uint8)
    pixels[..., 0] = classes
    if instances is not None:
        pixels[..., 1], pixels[..., 2] = instances >> 8, instances & 255
    write_png(path, pixels, tidy=False)
