"""Measures whether predictions stay the same over clips in which the labels do (VSPW's mVC)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..formats.labels import read_sem_seg
from .base import Task, once
from .columns import ColumnTally, FrameNumber
from .metrics import Record
from .outputs import class_map
from .registry import TASK_REGISTRY
from .steadiness import follows, place_of

CLIPS = (8, 16)
"""Lengths of the clips in frames (Miao et al., VSPW, CVPR 2021)."""


class Runs:
    """Counts for how many frames each pixel has had its value, up to the longest clip."""

    def __init__(self, values: np.ndarray) -> None:
        """Starts at a first frame; ``values`` is (H, W) integers."""
        self.values = values
        self.lengths = np.ones(values.shape, np.uint8)

    def add(self, values: np.ndarray) -> None:
        """Adds the next frame, of the same shape."""
        longer = np.minimum(self.lengths + 1, CLIPS[-1]).astype(np.uint8)
        self.lengths = np.where(values == self.values, longer, 1).astype(np.uint8)
        self.values = values


@TASK_REGISTRY.register()
class Consistency(Task):
    """Scores clips of 8 and 16 adjacent labelled frames (``sem_seg_file_name``).

    A record has the consistency in percent of the clips that end at the frame, None for one that
    began before the video or has no pixel with one label.
    """

    name = "consistency"
    label_keys = ("sem_seg_file_name",)
    output_keys = ("sem_seg", "panoptic_seg")
    tally = ColumnTally

    def reset(self) -> None:
        super().reset()
        self._last: tuple[str, int] = ("", -1)  # video and index of the frame before
        self._in_a_row = 0  # in a row, up to the longest clip
        self._runs: dict[str, Runs] = {}

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        maps = {"classes": once(class_map, output), "labels": once(read_sem_seg, frame)}
        adjacent = follows(frame, self._last) and all(
            self._runs[name].values.shape == own.shape for name, own in maps.items()
        )
        self._last = place_of(frame)
        if adjacent:
            self._in_a_row = min(self._in_a_row + 1, CLIPS[-1])
            for name, own in maps.items():
                self._runs[name].add(own)
        else:
            self._in_a_row, self._runs = 1, {name: Runs(own) for name, own in maps.items()}
        if self._in_a_row < CLIPS[0]:
            return None
        return {f"vc{n}": self._consistency(n) if self._in_a_row >= n else None for n in CLIPS}

    def _consistency(self, clip: int) -> float | None:
        labels = self._runs["labels"]
        steady = (labels.lengths >= clip) & (labels.values != self.info.ignore_label)
        number = np.count_nonzero(steady)
        if not number:
            return None
        constant = self._runs["classes"].lengths >= clip
        return 100 * int(np.count_nonzero(steady & constant)) / int(number)

    def state_dict(self) -> dict[str, Any]:
        runs = {
            name: [torch.from_numpy(own.values), torch.from_numpy(own.lengths)]
            for name, own in self._runs.items()
        }
        return {"last": list(self._last), "frames": self._in_a_row, "runs": runs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        video_id, index = state["last"]
        self._last, self._in_a_row = (video_id, index), state["frames"]
        self._runs = {}
        for name, (values, lengths) in state["runs"].items():
            self._runs[name] = Runs(values.numpy())
            self._runs[name].lengths = lengths.numpy()


def _rule(clip: int) -> str:
    return (
        f"of the pixels with one label in {clip} frames in a row, the share that also has one "
        "prediction in all of them, right or wrong; mean over all such clips, of which one ends at "
        f"each frame from a video's {clip}th on; void pixels do not count"
    )


_EXAMPLE = [{"vc8": 90.0, "vc16": None}, {"vc8": 80.0, "vc16": 50.0}, {"vc8": None, "vc16": 60.0}]


@Consistency.add_metric
class Consistency8(FrameNumber):
    """Video consistency over 8 frames."""

    name = "mVC8"
    rule = _rule(8)
    needs = "vc8"
    axis = ""
    example = (_EXAMPLE, 85.0)


@Consistency.add_metric
class Consistency16(FrameNumber):
    """Video consistency over 16 frames."""

    name = "mVC16"
    rule = _rule(16)
    needs = "vc16"
    axis = ""
    example = (_EXAMPLE, 55.0)
