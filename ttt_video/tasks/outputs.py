"""What a model says, whether or not it is right: pure functions of detectron2's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import once

CONFIDENT = 0.5
"""Score from which an instance counts as predicted."""

STRIDE = 4
"""Every so many rows and columns are looked at for the entropy: the stride of the mask logits."""


def class_map(output: Mapping[str, Any]) -> np.ndarray | None:
    """Returns each pixel's predicted class; None for an output of instances alone.

    Args:
        output: detectron2's. The highest of the ``sem_seg`` scores, else the ``panoptic_seg``
            segment's class.

    Returns:
        (H, W) int16, -1 where there is no segment.
    """
    if "sem_seg" in output:
        # On the CPU several times as fast as argmax; both give the first of equals.
        return output["sem_seg"].max(0).indices.to(torch.int16).cpu().numpy()
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        classes = np.full(max([0, *(s["id"] for s in segments)]) + 1, -1, dtype=np.int16)
        for segment in segments:
            classes[segment["id"]] = segment["category_id"]
        return classes[ids.cpu().numpy()]
    return None


def predicted_classes(output: Mapping[str, Any]) -> frozenset[int]:
    """Classes that a frame's prediction has.

    Args:
        output: detectron2's. Of ``sem_seg`` the classes that win a pixel, else of ``panoptic_seg``
            those of its segments, else of ``instances`` those that score at least 0.5.
    """
    classes = once(class_map, output)
    if classes is not None:
        return frozenset((np.flatnonzero(np.bincount(classes.ravel() + 1)) - 1).tolist()) - {-1}
    instances = output["instances"]
    return frozenset(instances.pred_classes[instances.scores >= CONFIDENT].tolist())


def mean_entropy(output: Mapping[str, Any]) -> float | None:
    """Mean entropy of a frame's prediction, in nats; None for a panoptic map alone.

    Of ``sem_seg`` that of the class scores of a pixel, normalised to sum 1, over every fourth row
    and column; of ``instances`` that of the score of an instance, a yes or no. None where it is
    not a finite number.
    """
    entropy = math.nan
    if "sem_seg" in output:
        scores: Tensor = output["sem_seg"][:, ::STRIDE, ::STRIDE].float().clamp(min=0)
        probs = scores / scores.sum(0).clamp(min=1e-12)
        entropy = torch.special.entr(probs).sum(0).mean().item()
    elif "instances" in output and len(output["instances"]):
        scores = output["instances"].scores.float().clamp(0, 1)
        entropy = (torch.special.entr(scores) + torch.special.entr(1 - scores)).mean().item()
    return entropy if math.isfinite(entropy) else None


def scores_are_finite(output: Mapping[str, Any]) -> bool:
    """Whether every score of a frame's ``sem_seg`` and ``instances`` is a finite number.

    Else the weights are broken, most often by a step that was too large; the class map does not
    show it. True of a panoptic map alone, which has no scores; broken weights leave it empty.
    """
    scores = [output["sem_seg"]] if "sem_seg" in output else []
    if "instances" in output:
        scores.append(output["instances"].scores)
    # A sum is finite only where all its terms are, and needs no second tensor of their size.
    return all(math.isfinite(each.sum(dtype=torch.float32).item()) for each in scores)
