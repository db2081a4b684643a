"""What coloured frames are like by themselves, with an original or without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

import numpy as np
import torch

from .base import Task, once
from .color_numbers import channel_histograms, colorfulness, inception_scores, jensen_shannon
from .colorization import COLORFUL, color_picture
from .columns import Columns, ColumnTally, FrameNumber, flat, pack
from .metrics import Metric, Record, known_mean, mean
from .picture_networks import describers
from .registry import TASK_REGISTRY

DISTANCES = (1, 2, 4)
"""Frames from one to the other of a pair, for CDC."""

SPLITS = 10
"""Of the frames, for IS."""


@TASK_REGISTRY.register()
class ColorStatistics(Task):
    """Measures coloured frames by themselves: how colourful, steady and diverse they are.

    It needs no labels, and so is all that films without an original have.
    """

    name = "color_statistics"
    output_keys = ("color",)
    tally = ColumnTally

    def reset(self) -> None:
        super().reset()
        self._video_id = ""
        self._recent: dict[int, np.ndarray] = {}  # histograms by frame

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        picture = once(color_picture, output)
        record: Record = {"colorfulness": colorfulness(picture)}
        record.update(self._changes(frame, channel_histograms(picture)))
        if self.cfg is not None:
            for name, describer in describers(self.cfg, output["color"].device).items():
                logits = once(describer.output, output).logits
                record[f"{name}_logits"] = pack(logits - logits.max())
        return record

    def _changes(self, frame: Mapping[str, Any], histograms: np.ndarray) -> dict[str, float | None]:
        """Returns the divergences from earlier frames; None where those were not seen."""
        video_id, index = str(frame.get("video_id", "")), int(frame.get("frame_index", 0))
        if video_id != self._video_id:
            self._video_id, self._recent = video_id, {}
        changes = {
            f"change_{d}": jensen_shannon(self._recent[index - d], histograms)
            if index - d in self._recent
            else None
            for d in DISTANCES
        }
        self._recent[index] = histograms
        reach = max(DISTANCES)
        self._recent = {i: h for i, h in self._recent.items() if abs(index - i) < reach}
        return changes

    def state_dict(self) -> dict[str, Any]:
        return {
            "video_id": self._video_id,
            "recent": {i: torch.from_numpy(h) for i, h in self._recent.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._video_id = state["video_id"]
        self._recent = {i: h.numpy() for i, h in state["recent"].items()}


@ColorStatistics.add_metric
class Colorfulness(FrameNumber):
    """Colourfulness of the coloured frames."""

    name = "colorfulness"
    rule = COLORFUL.format("the coloured frames")
    unit = "levels"
    higher_is_better = None
    needs = "colorfulness"
    example = ([{"colorfulness": 30.0}, {"colorfulness": 10.0}], 20.0)


@ColorStatistics.add_metric
class ColorConsistency(Metric):
    """CDC of NTIRE 2023: how much the distribution of colours changes over time."""

    name = "CDC"
    rule = (
        "Jensen-Shannon divergence (nats) of the 256 levels' histograms of two coloured frames, "
        "mean over channels; mean over all pairs that are 1, 2 and 4 frames apart, each distance "
        "weighs 1/3; mean over videos, without those of fewer than 5 frames; colourless films are "
        "steady, too: see colorfulness"
    )
    unit = "nats"
    digits = 5
    higher_is_better = False
    needs = "change_1"
    example = (
        [
            {"change_1": None, "change_2": None, "change_4": None},
            {"change_1": 0.1, "change_2": None, "change_4": None},
            {"change_1": 0.1, "change_2": 0.3, "change_4": None},
            {"change_1": 0.1, "change_2": 0.3, "change_4": None},
            {"change_1": 0.1, "change_2": 0.3, "change_4": 0.8},
        ],
        0.4,
    )

    @staticmethod
    def value(total: Columns) -> float | None:
        videos = []
        for changes in zip(*(total[f"change_{d}"] for d in DISTANCES), strict=True):
            seen = [known_mean(flat([change])) for change in changes]
            known = [x for x in seen if x is not None]
            if len(known) == len(DISTANCES):
                videos.append(math.fsum(known) / len(DISTANCES))
        return mean(videos)


class _Diversity(Metric):
    """Inception Score of a network's classes."""

    unit = "classes"

    def _scores(self, total: Columns) -> Sequence[float]:
        if self.needs not in total:
            return ()
        return inception_scores(np.concatenate(total[self.needs]), SPLITS)

    def value(self, total: Columns) -> float | None:
        return mean(self._scores(total))

    def details(self, total: Columns) -> dict[str, float | None]:
        scores = self._scores(total)
        return {f"{self.name}_deviation": stdev(scores)} if scores else {}


_INCEPTION_SCORE = (
    f"exp of the mean divergence of the class probabilities of {{}} from their mean; mean over "
    f"{SPLITS} splits of the coloured frames (frame i is in split i modulo {SPLITS}; _deviation: "
    "the standard deviation between them); undefined for fewer frames"
)


def _logits(network: str) -> list[Record]:
    """Returns 10 frames of one class and 10 of another, so that every split has one of each."""
    return [
        {f"{network}_logits": pack(torch.tensor([-60.0 * i, -60.0 * (1 - i)]))}
        for i in (0, 1)
        for _ in range(SPLITS)
    ]


@ColorStatistics.add_metric
class InceptionScore(_Diversity):
    """IS."""

    name = "IS"
    rule = _INCEPTION_SCORE.format("TensorFlow's InceptionV3 of 2015 (no bias; torchmetrics)")
    needs = "inception_logits"
    example = (_logits("inception"), 2.0)


@ColorStatistics.add_metric
class Lite0Score(_Diversity):
    """What IS is, with a small network that can be had offline; the numbers are not IS's."""

    name = "IS_lite0"
    rule = _INCEPTION_SCORE.format("EfficientNet-Lite0 (not IS, which has InceptionV3's)")
    needs = "lite0_logits"
    example = (_logits("lite0"), 2.0)
