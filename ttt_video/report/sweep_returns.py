"""The table of videos that return: the source, a shift, the source again, another shift, and so on.

The names are SHIFT's (Sun et al., CVPR 2022): the score on the source, on the target, and after the
loop back. How fast a model is good again after a change is its recovery time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from ..sweeps.cells import Cell
from ..tasks.semantic import Counts, add_counts, mean_iou
from .formats import Table
from .sweep_gains import shifted_frames, world_settings
from .sweep_tables import Record

RUNNING = 5
"""Frames of the running mean by which a model has recovered."""

WITHIN = 1.0
"""Points below the level of a part that count as recovered."""

COLUMNS = {"source": 2, "target": 2, "drop": 2, "loop-back": 2, "recovery": 1}
"""Columns, with their digits after the point."""


def recovery_frames(scores: Sequence[float]) -> int:
    """Returns after how many frames a model has recovered from the change before the first one.

    The level is the mean of the last half of the frames. The model has recovered at the first frame
    from which the mean of :data:`RUNNING` frames is no more than :data:`WITHIN` points below it; 0
    means that it was never worse. Where there is no such frame, it is the number of frames.

    Args:
        scores: of the frames of one part, in time order and in percent; at least one.
    """
    level = fmean(scores[len(scores) // 2 :])
    for start in range(max(len(scores) - RUNNING + 1, 1)):
        if fmean(scores[start : start + RUNNING]) >= level - WITHIN:
            return start
    return len(scores)


def returns_table(cells: Sequence[Cell], records: Sequence[Record]) -> Table | None:
    """Returns a line per source and row for the cells whose world videos return; None without any.

    Records are those of complete cells. A line is the mean over videos and seeds.
    """
    complete = {record["folder"] for record in records}
    found: defaultdict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for cell in cells:
        settings = world_settings(cell, "return") if str(cell.folder) in complete else None
        if settings is None:
            continue
        for _, shift, frames in shifted_frames(cell, settings):
            parts = _by_part(frames, shift.part, settings["frames"])
            if len(parts) == len(shift.parts):
                found[cell.source, cell.row].append(_numbers(parts, shift.parts))
    if not found:
        return None
    lines = [
        [*names, *(f"{fmean(n[name] for n in own):.{digits}f}" for name, digits in COLUMNS.items())]
        for names, own in found.items()
    ]
    note = (
        "mIoU over the frames of a part: source is the first, clean one, target the mean of those "
        "with a shift, loop-back the mean of the clean ones after a shift; drop is source less "
        "target. Recovery is the mean over all changes of the frames from a change to the first "
        f"from which the mean of {RUNNING} frames' mIoU is at most {WITHIN:g} points below the "
        "mean of the last half of the part. Means over videos and seeds"
    )
    return Table(["videos", "method", *COLUMNS], lines, [f"{note}."], "Videos that return")


def _by_part(
    frames: Sequence[tuple[int, Counts]], part: Callable[[int, int], int], num_frames: int
) -> dict[int, list[Counts]]:
    """Returns the records of each part of a video in time order, without frames of no class."""
    parts: defaultdict[int, list[Counts]] = defaultdict(list)
    for index, counts in sorted(frames, key=lambda frame: frame[0]):
        if mean_iou(counts) is not None:
            parts[part(index, num_frames)].append(counts)
    return dict(parts)


def _numbers(parts: Mapping[int, Sequence[Counts]], names: Sequence[str]) -> dict[str, float]:
    """Returns the numbers of a video, whose parts all have a labelled frame."""
    level = {number: _miou(add_counts(own)) for number, own in parts.items()}
    shifted = fmean(score for number, score in level.items() if names[number] != "none")
    after = [number for number in sorted(parts) if number > 0]
    return {
        "source": level[0],
        "target": shifted,
        "drop": level[0] - shifted,
        "loop-back": fmean(level[number] for number in after if names[number] == "none"),
        "recovery": fmean(recovery_frames([*map(_miou, parts[number])]) for number in after),
    }


def _miou(counts: Counts) -> float:
    score = mean_iou(counts)
    assert score is not None, "frames without a labelled class are left out"
    return score
