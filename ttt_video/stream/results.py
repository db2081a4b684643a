"""What a stream made of one frame, as arrays of the frame's own size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..tasks.colorization import color_picture
from ..tasks.outputs import CONFIDENT, class_map, confidence


@dataclass(frozen=True)
class Segment:
    """A part of a frame that is one object, or all pixels of a class without objects.

    Attributes:
        label: its class.
        mask: (H, W) bool, the pixels that belong to it.
        score: confidence from 0 to 1; None for a segment of a panoptic map, which has none.
    """

    label: int
    mask: np.ndarray
    score: float | None = None


@dataclass(frozen=True)
class OnTime:
    """What a stream of frames that do not wait (:class:`.on_time.OnTimeStream`) says of a frame.

    Attributes:
        output: the newest prediction that was finished when the frame came; None: there was none.
        delay_frames: how many frames ago the frame came that it is of; None without an output.
        dropped: whether the frame was never looked at.
        latency_seconds: from the frame's coming to its own prediction; None of a dropped frame.
    """

    output: Mapping[str, Any] | None
    delay_frames: int | None = None
    dropped: bool = False
    latency_seconds: float | None = None


@dataclass
class FrameResult:
    """What a stream made of one frame.

    ``labels``, ``scores``, ``segments`` and ``colors`` are computed when they are first asked for.
    They are NumPy arrays with the height H and the width W of the frame that was given, and None
    from a model that does not predict such a thing.

    Attributes:
        frame: the frame, labels included, for evaluators.
        output: detectron2's outputs, by the weights after this frame's update unless
            ``TTT.PREDICT`` is "before".
        record: scalars of the update, such as ``loss_recon``; empty for a frame without one. With a
            frame budget also those of :class:`ttt_video.stream.BudgetedStream`.
        adapt_seconds: wall time of the update; that of a video's first frame includes what an
            offline method spent on the video before.
        predict_seconds: wall time of the prediction.
        ready_seconds: wall time from taking up the frame to its prediction.
        steps: with ``TTT.RECORD_STEPS``, what the stream keeps of each gradient step of the update.
        on_time: with ``TTT.CLOCK.FPS``, what counts for the frame at its deadline.
    """

    frame: Any
    output: Mapping[str, Any]
    record: dict[str, float] = field(default_factory=dict)
    adapt_seconds: float = 0.0
    predict_seconds: float = 0.0
    ready_seconds: float = 0.0
    steps: list[Any] = field(default_factory=list)
    on_time: OnTime | None = None

    @property
    def loss(self) -> float | None:
        """The reconstruction loss l_s of this frame's step; None where there was none."""
        return self.record.get("loss_recon")

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Each pixel's class, (H, W) int16; -1 where a panoptic map has no segment."""
        return class_map(self.output)

    @cached_property
    def scores(self) -> np.ndarray | None:
        """The confidence of each pixel's class, (H, W) float32.

        It is the share of the winning class in the sum of all classes' scores, from 0 to 1, and 0
        where a score is not finite.
        """
        if "sem_seg" not in self.output:
            return None
        share: np.ndarray = confidence(self.output).cpu().numpy()
        return share

    @cached_property
    def segments(self) -> list[Segment] | None:
        """The segments of the panoptic map, else the instances that score at least 0.5.

        Instances come with the highest score first; ``output["instances"]`` has the others, too.
        """
        if "panoptic_seg" in self.output:
            ids, segments = self.output["panoptic_seg"]
            pixels = ids.cpu().numpy()
            return [Segment(s["category_id"], pixels == s["id"]) for s in segments]
        if "instances" not in self.output:
            return None
        found = self.output["instances"]
        found = found[found.scores >= CONFIDENT]
        found = found[found.scores.argsort(descending=True, stable=True)]
        masks = found.pred_masks.bool().cpu().numpy()
        labels, scores = found.pred_classes.tolist(), found.scores.tolist()
        return [Segment(*each) for each in zip(labels, masks, scores, strict=True)]

    @cached_property
    def colors(self) -> np.ndarray | None:
        """The coloured frame, (H, W, 3) uint8 RGB."""
        return color_picture(self.output) if "color" in self.output else None
