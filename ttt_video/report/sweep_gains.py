"""Tables of the gains of a sweep's rows over its frozen model: by video and by shift.

Both pair the videos, and average the seeds of a video first (:mod:`.statistics`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import UserError
from ..stream.directory import read_rows
from ..sweeps.cells import Cell
from ..tasks.semantic import Counts, add_counts, mean_iou
from ..world.shifts import Shift, video_shift
from .formats import Table, between
from .metrics import headlines
from .runs import read_run, video_means
from .statistics import Estimate, compare, mean_by_key
from .sweep_tables import Record, group, metric_columns

Piece = tuple[str, str]
"""A video, by its source and name, and the corruption of some of its frames."""


def gains_table(records: Sequence[Record], baseline: str) -> Table | None:
    """Returns the mean gains over videos with 95 % intervals; None if no source has two videos.

    Records are those of complete cells; ``baseline`` names the frozen row.
    """
    metrics = headlines()
    columns = metric_columns(records, metrics)
    runs = {record["folder"]: read_run(Path(record["folder"])) for record in records}
    if not any(len(run.by_video(metric)) > 1 for run in runs.values() for metric in metrics):
        return None

    def by_video(members: Sequence[Record], source: str, metric: str) -> dict[str, float]:
        return video_means((runs[r["folder"]] for r in members if r["source"] == source), metric)

    frozen = [record for record in records if record["name"] == baseline]
    lines, videos = [], 0
    for (row,), members in group(records, "row").items():
        if members[0]["name"] == baseline:
            continue
        line = [row]
        for column in columns:
            ours, reference = by_video(members, *column), by_video(frozen, *column)
            same = bool(ours) and ours.keys() == reference.keys()
            line.append(_text(compare(ours, reference).difference) if same else "-")
            videos = max(videos, len(ours) if same else 0)
        lines.append(line)
    if not lines:  # the baseline is alone
        return None
    note = (
        f"Points over {baseline} on the same video: mean over videos (at most {videos}) of the "
        "video's own metric, averaged over its seeds; in brackets its 95 % interval by bootstrap "
        "over the videos"
    )
    head = ["method", *(f"{source} {metric}" for source, metric in columns)]
    return Table(head, lines, [f"{note}."], "Gains by video")


def shift_table(cells: Sequence[Cell], records: Sequence[Record], baseline: str) -> Table | None:
    """Returns the frozen model's mean IoU and the rows' gains over it, a line per corruption.

    The frames of one corruption in one video are pooled, then averaged over the videos. The last
    line is the mean over all such pieces of videos, with its interval over the videos.

    Records are those of complete cells; ``baseline`` names the frozen row. Cells count if their
    world videos switch between corruptions; without any such cell the table is None.
    """
    complete = {record["folder"] for record in records}
    found: defaultdict[tuple[str, str], list[dict[Piece, float]]] = defaultdict(list)
    for cell in cells:
        if str(cell.folder) in complete and (scores := _miou_by_piece(cell)):
            found[cell.name, cell.row].append(
                {(f"{cell.source}/{video}", shift): s for (video, shift), s in scores.items()}
            )
    frozen = next((row for name, row in found if name == baseline), None)
    if frozen is None:
        return None
    means = {row: mean_by_key(own) for (_, row), own in found.items()}
    reference = means.pop(frozen)
    rows = [row for row, own in means.items() if own.keys() == reference.keys()]
    others = [row for row in means if row not in rows]
    lines = []
    for corruption in dict.fromkeys(c for _, c in sorted(reference, key=lambda p: p[1])):
        own = [piece for piece in reference if piece[1] == corruption]
        gains = [fmean(means[row][p] - reference[p] for p in own) for row in rows]
        level = fmean(reference[p] for p in own)
        lines.append([corruption, str(len(own)), f"{level:.2f}", *(f"{g:+.2f}" for g in gains)])
    base = _by_video(reference)
    gained = [compare(_by_video(means[row]), base).difference for row in rows]
    level = fmean(reference.values())
    lines.append(["mean", str(len(reference)), f"{level:.2f}", *map(_text, gained)])
    note = (
        "mIoU over the frames of one corruption in one video, the mean over the videos that have "
        f"it; {frozen} in percent, the others in points over it. The last line is the mean over "
        "all such pieces, with its 95 % interval by bootstrap over the videos"
    )
    notes = [f"{note}."]
    if others:
        notes.append(
            f"Left out, as they ran on other videos than the frozen model: {', '.join(others)}."
        )
    return Table(["shift", "videos", frozen, *rows], lines, notes, "Gains by shift")


def _miou_by_piece(cell: Cell) -> dict[Piece, float]:
    """Returns the mean IoU of each piece over its pooled frames.

    Raises:
        UserError: the cell has lost its rows.
    """
    settings = world_settings(cell, "switch")
    if settings is None:
        return {}
    pooled: dict[Piece, list[Counts]] = defaultdict(list)
    for video, shift, frames in shifted_frames(cell, settings):
        for index, counts in frames:
            corruption, _ = shift.at(index, settings["frames"])
            pooled[video, corruption].append(counts)
    scores = {piece: mean_iou(add_counts(many)) for piece, many in pooled.items()}
    return {piece: score for piece, score in scores.items() if score is not None}


def shifted_frames(
    cell: Cell, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Shift, list[tuple[int, Counts]]]]:
    """Yields the videos of a cell: the name, the shift, and indices and records of its frames.

    ``settings`` are of :func:`world_settings`.

    Raises:
        UserError: the cell has lost its rows.
    """
    frames: dict[str, list[tuple[int, Counts]]] = defaultdict(list)
    file = cell.folder / "frames.jsonl"
    if not file.exists():
        raise UserError(
            f"{file} of a finished cell is missing: restore it, or delete the folder of the cell "
            "and the same command runs it again"
        )
    for row in read_rows(file):
        if "sem_seg" in row.get("records", {}):
            frames[row["video_id"]].append((row["frame_index"], row["records"]["sem_seg"]))
    for k, video in enumerate(settings["names"] or sorted(frames)):
        flags = (settings["corruption"], settings["each"])
        shift = video_shift(*flags, settings["severity"], settings["schedule"], k)
        yield video, shift, frames[video]


def world_settings(cell: Cell, schedule: str) -> dict[str, Any] | None:
    """Returns the flags of ``tools/make_world.py`` if the videos have that schedule."""
    root = cell.environment.get("DETECTRON2_DATASETS")
    for note in Path(root).glob("*/world.json") if root is not None else ():
        settings: dict[str, Any] = json.loads(note.read_text("utf-8"))
        if settings["schedule"] == schedule:
            return settings
    return None


def _by_video(pieces: Mapping[Piece, float]) -> dict[str, float]:
    """Returns the mean over the pieces of each video."""
    return mean_by_key({video: score} for (video, _), score in pieces.items())


def _text(gain: Estimate) -> str:
    interval = "" if gain.interval is None else f" {between(gain.interval, '+')}"
    return f"{gain.mean:+.2f}{interval}"
