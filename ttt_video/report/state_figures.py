"""Draws what a method that rests and learns did over time, from the rows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..adaptation.change_states import State
from ..errors import UserError
from ..files import file_stem
from ..stream.directory import read_rows
from .curves import PALETTE, figure_axes

COLORS = {State.REST: "#FFFFFF", State.LEARN: PALETTE[1], State.KEEP: PALETTE[2],
          State.RETURN: PALETTE[5]}  # fmt: skip


def spans(states: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """Returns (state, first frame, last frame) of each stretch of frames in one state, in order.

    Args:
        states: by ``frame_index``. Frames that are missing end no stretch.
    """
    found = []
    for state, frames in groupby(sorted(states.items()), key=lambda item: item[1]):
        indices = [index for index, _ in frames]
        found.append((state, indices[0], indices[-1]))
    return found


def draw_states(
    run: Path, label: str, folder: Path, *, name: str, suffix: str = "svg"
) -> list[Path]:
    """Draws the distance from the training images by frame over bands of the states.

    Args:
        run: folder of a run; without rows that have ``state``, nothing is drawn.
        label: names the run in the figure.
        folder: takes ``states-NAME-VIDEO.SUFFIX``, one for each video.
        name: names the run in the files.
        suffix: type of the files.

    Returns:
        The files.

    Raises:
        UserError: a row has a state that no method has.
    """
    videos: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in read_rows(run / "frames.jsonl"):
        if "state" in row:
            videos.setdefault(row["video_id"], {})[row["frame_index"]] = row
    known = {int(state) for state in State}
    files = []
    for video_id, rows in sorted(videos.items()):
        unknown = sorted({row["state"] for row in rows.values()} - known)
        if unknown:
            raise UserError(
                f"{run / 'frames.jsonl'} has the state {unknown[0]!r}; known: {sorted(known)}"
            )
        file = folder / f"states-{file_stem(name)}-{file_stem(video_id)}.{suffix}"
        _draw(rows, file, f"{label}, video {video_id}")
        files.append(file)
    return files


def _draw(rows: Mapping[int, Mapping[str, Any]], file: Path, title: str) -> None:
    frames = sorted(rows)
    stretches = spans({index: int(rows[index]["state"]) for index in frames})
    with figure_axes(file, 8, 3.5, dpi=120) as axes:
        for state in State:
            own = [(first, last) for number, first, last in stretches if number == state]
            share = sum(rows[index]["state"] == state for index in frames) / len(frames)
            for number, (first, last) in enumerate(own):
                name = f"{state.name.lower()} {share:.0%}" if number == 0 else None
                axes.axvspan(
                    first - 0.5, last + 0.5, facecolor=COLORS[state], alpha=0.35, label=name,
                    edgecolor="#BBBBBB", linewidth=0.5 if state is State.REST else 0,
                )  # fmt: skip
        shifts = [rows[index].get("norm_shift") for index in frames]
        axes.plot(frames, _numbers(shifts), color="black", linewidth=1.2)
        axes.set(title=title, xlabel="frame", ylabel="distance from the training images")
        axes.set_xlim(frames[0] - 0.5, frames[-1] + 0.5)
        axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
