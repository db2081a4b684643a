"""How sure the model is of every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...formats.images import write_png
from ...tasks.outputs import confidence
from .base import FORMAT_REGISTRY, Format, Job, Predicted


@FORMAT_REGISTRY.register()
class Confidence(Format):
    """``NAME.png``, 8 bit gray: 255 times :func:`confidence`, rounded."""

    name = "confidence"
    each_frame = "*.png"

    def __init__(self, predicted: Predicted) -> None:
        """Refuses models without scores."""
        predicted.need(
            self.name,
            *("sem_seg", "instances"),
            fix="these have no scores; set MODEL.MASK_FORMER.TEST.SEMANTIC_ON True if it can",
        )
        super().__init__(predicted)

    def frame(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Job:
        """Writes the map."""
        path = self.place.folder / f"{self.place.stems(frame)}.png"
        pixels = (255 * confidence(output)).round().to(torch.uint8).cpu().numpy()
        return partial(write_png, path, pixels, level=1, tidy=False)
