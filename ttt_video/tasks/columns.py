"""Records of many frames as columns: numbers and packed arrays by key, in time order."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .labels import LabelInfo
from .metrics import Metric, Record, Tally, known_mean

Columns = Mapping[str, Sequence[np.ndarray]]
"""By key of a record: for each video what its frames have in time order, (T,) or (T, D); NaN stands
for None. Keys that some frame lacks are left out."""


def pack(values: Tensor) -> str:
    """Returns (D,) numbers as a record has them: float16, in text."""
    return base64.b64encode(values.half().cpu().numpy().astype("<f2").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """Returns (D,) float16 from :func:`pack`."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float16)


class ColumnTally(Tally):
    """Keeps all that records have: of D packed values 2 D bytes a frame.

    Frames are put in order before anything is summed, so that totals are the same to the last bit
    in whatever order, and by however many processes, the rows were written.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.columns: dict[str, dict[int, Any]] = {}

    def add(self, frame_index: int, record: Record) -> None:
        self.frames += 1
        for key, value in record.items():
            kept = unpack(value) if isinstance(value, str) else value
            self.columns.setdefault(key, {})[frame_index] = math.nan if kept is None else kept

    @classmethod
    def joined(cls, videos: Sequence[ColumnTally], info: LabelInfo) -> Columns:
        keys = [
            key
            for key in videos[0].columns
            if all(len(video.columns.get(key, ())) == video.frames for video in videos)
        ]
        return {
            key: [np.array([v.columns[key][i] for i in sorted(v.columns[key])]) for v in videos]
            for key in keys
        }


def flat(videos: Sequence[np.ndarray]) -> list[float]:
    """Returns the numbers of a column, of one video after the other."""
    return [float(value) for video in videos for value in video]


class FrameNumber(Metric):
    """The number of each frame under ``needs``; mean over the frames that have one."""

    def frame(self, record: Record) -> float | None:
        number: float | None = record[self.needs]
        return number

    def value(self, total: Columns) -> float | None:
        return known_mean(flat(total[self.needs]))
