"""Pure functions of a model's outputs: class maps, entropy, finiteness."""

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
"""Rows and columns between two pixels of the entropy, which is the stride of the mask logits."""


def class_map(output: Mapping[str, Any]) -> np.ndarray | None:
    """Returns each pixel's predicted class, (H, W) int16; None for an output of instances alone.

    It is the class of the highest ``sem_seg`` score, or else of the ``panoptic_seg`` segment, -1
    where there is none.
    """
    if "sem_seg" in output:
        # max is several times as fast as argmax on a CPU; both give the first of equals.
        return output["sem_seg"].max(0).indices.to(torch.int16).cpu().numpy()
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        classes = np.full(max([0, *(s["id"] for s in segments)]) + 1, -1, dtype=np.int16)
        for segment in segments:
            classes[segment["id"]] = segment["category_id"]
        return classes[ids.cpu().numpy()]
    return None


def other_classes(output: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Returns the percentage of pixels whose classes differ between two predictions of a frame."""
    return 100 * float(np.mean(once(class_map, output) != once(class_map, other)))


def predicted_classes(output: Mapping[str, Any]) -> frozenset[int]:
    """Returns the classes of a frame's prediction.

    They are those of pixels (``sem_seg``), else of segments (``panoptic_seg``), else of
    ``instances`` that score at least 0.5, or the one of an image (``image_class``).
    """
    if "image_class" in output:
        return frozenset({int(output["image_class"].argmax())})
    classes = once(class_map, output)
    if classes is not None:
        return frozenset((np.flatnonzero(np.bincount(classes.ravel() + 1)) - 1).tolist()) - {-1}
    instances = output["instances"]
    return frozenset(instances.pred_classes[instances.scores >= CONFIDENT].tolist())


def mean_entropy(output: Mapping[str, Any]) -> float | None:
    """Returns the mean entropy of a frame's prediction in nats; None if it is not finite.

    It is the entropy of a pixel's ``sem_seg`` scores, normalised to sum 1, over every fourth row
    and column, or that of an image's class, or else that of an instance's score as yes or no. A
    panoptic map alone has none.
    """
    entropy = math.nan
    if "sem_seg" in output:
        scores: Tensor = output["sem_seg"][:, ::STRIDE, ::STRIDE].float().clamp(min=0)
        probs = scores / scores.sum(0).clamp(min=1e-12)
        entropy = torch.special.entr(probs).sum(0).mean().item()
    elif "image_class" in output:
        entropy = torch.special.entr(output["image_class"].float().softmax(0)).sum().item()
    elif "instances" in output and len(output["instances"]):
        scores = output["instances"].scores.float().clamp(0, 1)
        entropy = (torch.special.entr(scores) + torch.special.entr(1 - scores)).mean().item()
    return entropy if math.isfinite(entropy) else None


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
    scores = finite_scores(instances).float().clamp(0, 1)
    best = torch.zeros(instances.image_size, device=scores.device)
    for index in scores.argsort(stable=True).tolist():  # the best last, on top
        best.masked_fill_(instances.pred_masks[index] > 0, scores[index].item())
    return best


def finite_scores(instances: Any) -> Tensor:
    """Returns the (N,) scores of instances, 0 for one that is not finite."""
    return instances.scores.nan_to_num(0.0, 0.0, 0.0)


def scores_are_finite(output: Mapping[str, Any]) -> bool:
    """Says whether every score of a frame's prediction is finite, whatever its task.

    A step that was too large breaks the weights, and neither class maps nor colours show it. So all
    floating-point tensors of the output count, scores of instances, and what the model itself says
    (``finite``).
    """
    if not output.get("finite", True):
        return False
    values = (getattr(value, "scores", value) for value in output.values())
    scores = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    # A sum is finite only if all its terms are, and it needs no second tensor of their size.
    return all(math.isfinite(each.sum(dtype=torch.float32).item()) for each in scores)
