"""What a model says, whether or not it is right: a collapse to one class shows without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import StreamingEvaluator
from .protocols import Record

CONFIDENT = 0.5
"""Score from which an instance counts as predicted."""

STRIDE = 4
"""Every so many rows and columns are looked at for the entropy: the stride of the mask logits."""


def predicted_classes(output: Mapping[str, Any]) -> frozenset[int]:
    """Classes that a frame's prediction has.

    Args:
        output: detectron2's. Of ``sem_seg`` the classes that win a pixel, else of ``panoptic_seg``
            those of its segments, else of ``instances`` those that score at least 0.5.
    """
    if "sem_seg" in output:
        return frozenset(output["sem_seg"].argmax(0).unique().tolist())
    if "panoptic_seg" in output:
        return frozenset(segment["category_id"] for segment in output["panoptic_seg"][1])
    instances = output["instances"]
    return frozenset(instances.pred_classes[instances.scores >= CONFIDENT].tolist())


def mean_entropy(output: Mapping[str, Any]) -> float | None:
    """Mean entropy of a frame's prediction, in nats; None for a panoptic map alone.

    Of ``sem_seg`` that of the class scores of a pixel, normalised to sum 1, over every fourth row
    and column; of ``instances`` that of the score of an instance, a yes or no.
    """
    if "sem_seg" in output:
        scores: Tensor = output["sem_seg"][:, ::STRIDE, ::STRIDE].float().clamp(min=0)
        probs = scores / scores.sum(0).clamp(min=1e-12)
        return torch.special.entr(probs).sum(0).mean().item()
    if "instances" in output and len(output["instances"]):
        scores = output["instances"].scores.float().clamp(0, 1)
        return (torch.special.entr(scores) + torch.special.entr(1 - scores)).mean().item()
    return None


class PredictionEvaluator(StreamingEvaluator):
    """Number of predicted classes and mean entropy of each frame; needs no labels."""

    name: ClassVar[str] = "prediction"
    label_key: ClassVar[str | None] = None
    output_keys: ClassVar[tuple[str, ...]] = ("sem_seg", "panoptic_seg", "instances")

    def record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """``{"classes": number, "entropy": nats or None}``; None for an output of another kind."""
        return self._record(frame, output) if set(self.output_keys) & output.keys() else None

    def _record(self, frame: Mapping[str, Any], output: Any) -> Record:
        entropy = mean_entropy(output)
        finite = entropy is not None and math.isfinite(entropy)
        return {"classes": len(predicted_classes(output)), "entropy": entropy if finite else None}

    def frame_metrics(self, record: Record) -> dict[str, float | None]:
        """The record, under the names of the summary."""
        return {"predicted_classes": record["classes"], "prediction_entropy": record["entropy"]}


def summarize_predictions(records: Sequence[Record]) -> dict[str, float | None]:
    """A run's numbers; a method that collapsed shows in the least and the last ones.

    Args:
        records: in order of video and frame, at least one.
    """
    classes = [record["classes"] for record in records]
    entropies = [record["entropy"] for record in records if record["entropy"] is not None]
    return {
        "predicted_classes_mean": math.fsum(classes) / len(classes),
        "predicted_classes_min": min(classes),
        "predicted_classes_last": classes[-1],
        "prediction_entropy_mean": math.fsum(entropies) / len(entropies) if entropies else None,
        "prediction_entropy_max": max(entropies, default=None),
    }
