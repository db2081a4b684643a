"""How sure the model is of every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...formats.images import write_png
from .base import FORMAT_REGISTRY, Format, Job, Predicted


def confidence(output: Mapping[str, Any]) -> Tensor:
    """Returns how sure a prediction is of each pixel: (H, W) float in 0..1.

    For classes of pixels (``sem_seg``) it is the largest score's share of the sum of all, which is
    the probability where scores are probabilities. For instances alone it is the score of the best
    one that covers the pixel, 0 where there is none. It is 0 where a score is not finite.
    """
    if "sem_seg" in output:
        scores = output["sem_seg"].float()
        if not scores.amin() >= 0:  # rare, also NaN; a copy is slower than all the rest
            scores = scores.clamp(min=0)
        return (scores.amax(0) / scores.sum(0).clamp(min=1e-12)).nan_to_num(0.0)
    instances = output["instances"]
    scores = instances.scores.float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    best = torch.zeros(instances.image_size, device=scores.device)
    for index in scores.argsort(stable=True).tolist():  # the best last, on top
        best.masked_fill_(instances.pred_masks[index] > 0, scores[index].item())
    return best


@FORMAT_REGISTRY.register()
class Confidence(Format):
    """``NAME.png``, 8 bit gray: 255 times :func:`confidence`, rounded."""

    name = "confidence"

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
