"""Computes from rows how good and how late predictions were that have to come in time."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any

from ..tasks import STREAMING, Row, streaming_headlines
from ..tasks.metrics import mean


def add_streaming(metrics: Row, timely: Mapping[str, Any]) -> None:
    """Adds the headlines of :func:`~ttt_video.tasks.score` of predictions that came in time."""
    for name in streaming_headlines():
        for end in ("", "_video_mean"):
            plain = name.removeprefix(STREAMING) + end
            if plain in timely:
                metrics[name + end] = timely[plain]
        for video_id, own in timely.get("videos", {}).items():
            if name.removeprefix(STREAMING) in own:
                metrics["videos"][video_id][name] = own[name.removeprefix(STREAMING)]


class Punctuality:
    """Collects how late a model was, from rows in any order."""

    def __init__(self) -> None:
        self.frames = self.misses = self.dropped = 0
        self._delays, self._latencies = array("d"), array("d")

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds ``streaming`` of a frame's row."""
        self.frames += 1
        self.dropped += row["dropped"]
        self.misses += row["delay_frames"] is None
        self._delays.append(math.nan if row["delay_frames"] is None else row["delay_frames"])
        if row["latency_seconds"] is not None:
            self._latencies.append(row["latency_seconds"])

    def numbers(self) -> dict[str, float | int | None]:
        """Returns counts and means.

        ``frames``; ``misses``: when they came no prediction was finished; ``dropped_frames``: the
        model never looked at them; ``delay_frames``: mean age of the prediction that counts;
        ``latency_seconds``: mean from the coming of a frame that was taken to its own prediction.
        """
        return {
            "frames": self.frames,
            "misses": self.misses,
            "dropped_frames": self.dropped,
            "delay_frames": mean([delay for delay in self._delays if not math.isnan(delay)]),
            "latency_seconds": mean(self._latencies),
        }
