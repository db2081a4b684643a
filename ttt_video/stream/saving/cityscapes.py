"""Cityscapes: label ids under the names that its evaluation looks for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ...data.cityscapes import CITYSCAPES_CLASSES, CITYSCAPES_LABEL_IDS
from ...errors import UserError
from ...files import file_stem
from ...formats.images import write_png
from .base import FORMAT_REGISTRY, Format, Job, Predicted
from .masks import label_map, need_classes

_OWN_NAME = re.compile(r"([^_]+_[0-9]{6}_[0-9]{6})(_.*)?")


@FORMAT_REGISTRY.register()
class Cityscapes(Format):
    """``CITY_SEQUENCE_FRAME_pred_labelIds.png``, 8 bit gray: Cityscapes' label ids, 0 for none.

    Frames that are named so keep city, sequence and frame. Others have the video as the city,
    sequence 000000 and their index.
    """

    name = "cityscapes"
    each_frame = "*.png"

    def __init__(self, predicted: Predicted) -> None:
        """Refuses models of other classes."""
        need_classes(self.name, predicted)
        if predicted.names != CITYSCAPES_CLASSES:
            raise UserError(
                f"--save {self.name}: the model's classes ({', '.join(predicted.names[:3])}, ...) "
                "are not Cityscapes' 19: --save masks takes any"
            )
        super().__init__(predicted)
        self.label_ids = np.zeros(256, np.uint8)
        self.label_ids[: len(CITYSCAPES_LABEL_IDS)] = CITYSCAPES_LABEL_IDS

    def frame(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Job:
        """Writes the map."""
        own = _OWN_NAME.fullmatch(self.place.stems(frame))
        name = own[1] if own else f"{_city(self.place.video_id)}_000000_{frame['frame_index']:06d}"
        path = self.place.folder / f"{name}_pred_labelIds.png"
        return partial(write_png, path, self.label_ids.take(label_map(output)), tidy=False)


def _city(video_id: str) -> str:
    """Returns a name without "_", which parts Cityscapes' names; each id has its own."""
    stem = file_stem(video_id)
    if "_" not in stem:
        return stem
    return f"{stem.replace('_', '-')}-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"
