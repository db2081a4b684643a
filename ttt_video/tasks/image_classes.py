"""Image classification: one class for each image, which is a frame of a stream of images."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .base import Difference, Painter, Task
from .labels import LabelInfo
from .metrics import Metric, Record, Tally, add_counts, mean
from .registry import TASK_REGISTRY

TOP = 5


def prediction(logits: torch.Tensor, label: int) -> Record:
    """Returns ``top``, the ids of the highest logits, best first, and probabilities (softmax).

    Args:
        logits: (K,) float, on any device.
        label: in [0, K).

    Returns:
        ``top`` has up to five ids. ``score`` is the label's probability, and ``scores`` has those
        of ``top``, rounded to 4 digits. If a logit is not finite, ``top`` and ``scores`` are empty
        and ``score`` is None: nothing is predicted.
    """
    logits = logits.detach().double().cpu()
    if not torch.isfinite(logits).all():
        return {"top": [], "score": None, "scores": []}
    top = torch.sort(logits, descending=True, stable=True).indices[:TOP]
    probs = logits.log_softmax(0).exp()
    scores = [round(value, 4) for value in probs[top].tolist()]
    return {"top": top.tolist(), "score": probs[label].item(), "scores": scores}


class Counts(NamedTuple):
    """What is known of some images.

    top1, top5: images by class, and those of them whose class is the first, or among the five.
    losses: cross entropies, of the images that have one.
    steps: images that have a prediction after so many steps, and those of them that are right.
    """

    top1: dict[str, list[int]]
    top5: dict[str, list[int]]
    losses: array[float]
    steps: dict[str, list[int]]


class _Tally(Tally):
    """Keeps 8 bytes an image."""

    def __init__(self) -> None:
        self.counts = Counts({}, {}, array("d"), {})

    def add(self, frame_index: int, record: Record) -> None:
        label, top = record["label"], record["top"]
        _count(self.counts.top1, label, label in top[:1])
        _count(self.counts.top5, label, label in top)
        loss = cross_entropy(record)
        if loss is not None:
            self.counts.losses.append(loss)
        for number, step in enumerate(record.get("steps", ()), 1):
            _count(self.counts.steps, number, label in step["top"][:1])

    @classmethod
    def joined(cls, videos: Sequence[_Tally], info: LabelInfo) -> Counts:
        parts = [video.counts for video in videos]
        losses: array[float] = sum((part.losses for part in parts), array("d"))
        top1, top5, steps = (
            add_counts(getattr(part, name) for part in parts) for name in ("top1", "top5", "steps")
        )
        return Counts(top1, top5, losses, steps)


def _count(counts: dict[str, list[int]], key: int, right: bool) -> None:
    own = counts.setdefault(str(key), [0, 0])
    own[0] += 1
    own[1] += right


def cross_entropy(record: Record) -> float | None:
    """Returns -ln of the label's probability, at most 708; None if nothing is predicted."""
    score = record["score"]
    return None if score is None else -math.log(max(score, sys.float_info.min))


@TASK_REGISTRY.register()
class ImageClassTask(Task):
    """Compares the class of an image (``image_class``: (K,) logits) with ``class_id``.

    A record has ``label``, and ``top`` and ``score`` of :func:`prediction`; with
    ``TTT.RECORD_STEPS`` also ``steps``: these and ``scores`` after each gradient step.
    """

    name = "image_classes"
    kind = "image classification"
    label_keys = ("class_id",)
    output_keys = ("image_class",)
    evaluator_types = ("image_classes",)
    headline = "top1"
    tally = _Tally
    picture_rank = 0
    class_keys = ("classes",)
    classes_key = "MODEL.VIT_MAE.NUM_CLASSES"
    mappers = {"image_classes": "image"}  # noqa: RUF012
    difference = Difference("other_image_class", "{:.2f} % of the images have another class")

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        label = int(frame["class_id"])
        record = {"label": label, **prediction(output["image_class"], label)}
        if self.cfg is None or not self.cfg.TTT.RECORD_STEPS:
            del record["scores"]
        return record

    @classmethod
    def with_steps(cls, record: Record, steps: Sequence[Record]) -> Record:
        """Keeps the predictions after each step."""
        kept = [{key: step[key] for key in step if key != "label"} for step in steps]
        own = {key: record[key] for key in record if key != "scores"}  # a row keeps its other keys
        return {**own, "steps": kept}

    @classmethod
    def differing(cls, output: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Returns 100 if the highest logits are those of two classes, 0 if of one."""
        first, second = (int(each["image_class"].argmax()) for each in (output, other))
        return 100.0 * (first != second)

    @classmethod
    def image_class(cls, record: Mapping[str, Any]) -> int | None:
        """Returns ``class_id``."""
        return record.get("class_id")

    @classmethod
    def draw_labels(cls, canvas: Any, record: Mapping[str, Any], metadata: Any) -> Any:
        """Writes the class over the image."""
        names = cls.class_names(metadata)
        class_id = record["class_id"]
        text = names[class_id] if class_id < len(names) else str(class_id)
        return canvas.draw_text(text, (canvas.output.width / 2, 0))

    @classmethod
    def painter(cls, output: Mapping[str, Any], metadata: Any) -> Painter:
        """Writes the predicted class, and its probability, over the lower end of the image."""
        logits = output["image_class"].detach().float().cpu()
        best = int(logits.argmax())
        names = getattr(metadata, "classes", None) or ()
        name = names[best] if best < len(names) else str(best)
        return partial(_caption, text=f"{name} {100 * logits.softmax(0)[best]:.0f} %")


def _caption(image: np.ndarray, text: str) -> np.ndarray:
    picture = Image.fromarray(image)
    height = max(image.shape[0] // 10, 8)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, image.shape[0] - height, image.shape[1], image.shape[0]), fill=(24, 24, 24))
    font = ImageFont.load_default(size=0.8 * height)
    middle = image.shape[0] - height / 2
    draw.text((2, middle), text, fill=(235, 235, 235), font=font, anchor="lm")
    return np.array(picture)


_EXAMPLE = [
    {"label": 0, "top": [0, 1, 2], "score": 0.5},
    {"label": 1, "top": [0, 1, 2], "score": 0.25},
    {"label": 1, "top": [], "score": None},
    {"label": 2, "top": [2, 0, 1], "score": 0.5},
]


def _share(counts: Mapping[str, Sequence[int]]) -> float | None:
    images, right = (sum(own[i] for own in counts.values()) for i in (0, 1))
    return 100 * right / images if images else None


@ImageClassTask.add_metric
class TopOne(Metric):
    """Accuracy, after the last step and, where they were recorded, after each."""

    name = "top1"
    rule = (
        "share of the images whose class has the highest logit (the first of equals), over all "
        "labelled images; an image without a finite prediction is wrong (top1_step_N: after N "
        "gradient steps, over the images that had as many)"
    )
    example = (_EXAMPLE, 50.0)

    @staticmethod
    def frame(record: Record) -> float:
        return 100.0 * (record["label"] in record["top"][:1])

    @staticmethod
    def value(total: Counts) -> float | None:
        return _share(total.top1)

    @staticmethod
    def by_class(total: Counts) -> dict[int, float]:
        return {int(k): 100 * right / images for k, (images, right) in total.top1.items()}

    @staticmethod
    def details(total: Counts) -> dict[str, float | None]:
        return {f"top1_step_{k}": 100 * right / n for k, (n, right) in total.steps.items()}


@ImageClassTask.add_metric
class TopFive(Metric):
    """Accuracy if five guesses are allowed."""

    name = "top5"
    rule = (
        "share of the images whose class has one of the five highest logits, over all labelled "
        "images; an image without a finite prediction is wrong"
    )
    example = (_EXAMPLE, 75.0)

    @staticmethod
    def value(total: Counts) -> float | None:
        return _share(total.top5)


@ImageClassTask.add_metric
class CrossEntropy(Metric):
    """The main loss l_m."""

    name = "cross_entropy"
    rule = (
        "-ln of the probability of an image's class, at most 708; mean over all labelled images "
        "with a finite prediction"
    )
    unit = "nats"
    digits = 3
    higher_is_better = False
    frame = staticmethod(cross_entropy)
    axis = ""
    example = (_EXAMPLE, 4 * math.log(2) / 3)

    @staticmethod
    def value(total: Counts) -> float | None:
        return mean(total.losses)
