"""What a model says, whether or not it is right: pure functions of detectron2's outputs.

A collapse to one class shows here without labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONFIDENT = 0.5
"""Score from which an instance counts as predicted."""

STRIDE = 4
"""Every so many rows and columns are looked at for the entropy: the stride of the mask logits."""


def class_map(output: Mapping[str, Any]) -> np.ndarray | None:
    """Each pixel's predicted class; None of an output of instances alone.

    Args:
        output: detectron2's. The highest of the ``sem_seg`` scores, else the ``panoptic_seg``
            segment's class. A ``class_map`` in it is taken as it is.

    Returns:
        (H, W) int16, -1 where there is no segment.
    """
    if "class_map" in output:
        return output["class_map"]
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
    classes = class_map(output)
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


def summarize_predictions(
    videos: Sequence[tuple[Sequence[int], Sequence[float]]], nonfinite_frames: int
) -> dict[str, float | None]:
    """A run's numbers; a method that collapsed shows in the least, the last, and the last quarter.

    Args:
        videos: of each, in order, the numbers of predicted classes and the entropies of its frames,
            at least one, in time order; NaN for a frame without an entropy.
        nonfinite_frames: frames of which :func:`scores_are_finite` is false.
    """
    classes = [n for own, _ in videos for n in own]
    entropies = [e for _, own in videos for e in own if not math.isnan(e)]
    result: dict[str, float | None] = {
        "nonfinite_frames": nonfinite_frames,
        "predicted_classes_mean": _mean(classes),
        "predicted_classes_min": min(classes),
        "predicted_classes_last": classes[-1],
        "prediction_entropy_mean": _mean(entropies),
        "prediction_entropy_max": max(entropies, default=None),
    }
    for i, name in enumerate(("predicted_classes", "prediction_entropy")):
        result[f"{name}_first_quarter"] = _mean([n for v in videos for n in _quarter(v[i])])
        result[f"{name}_last_quarter"] = _mean(
            [n for v in videos for n in _quarter(v[i], last=True)]
        )
    return result


def _quarter(values: Sequence[float], *, last: bool = False) -> Sequence[float]:
    """The first quarter, or the last one, of a video: at least one frame."""
    count = max(len(values) // 4, 1)
    return values[-count:] if last else values[:count]


def _mean(values: Sequence[float]) -> float | None:
    """Of any order the same to the last bit; without NaN, and None of nothing else."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None
