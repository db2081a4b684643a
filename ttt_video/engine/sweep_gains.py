"""Gains of a sweep's rows over its frozen model: by video with an interval, and by shift.

Both are paired: a row is compared with the frozen model on the same video. Seeds are averaged
within a video, because two runs on one video are no two samples (:mod:`..evaluation.statistics`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.world.shifts import video_shift
from ..evaluation.statistics import Estimate, compare
from ..tasks.semantic import Counts, add_counts, mean_iou
from .sweep import Cell
from .sweep_results import Record, ResultsTable, group, metric_columns

ByVideo = dict[str, float]
"""Metric of each video, in percent."""


def gains_table(
    records: Sequence[Record], baseline: str, metrics: Sequence[str] | None = None
) -> ResultsTable | None:
    """Mean gain over videos with its 95 % interval, a line per row, a column per source and metric.

    Args:
        records: complete cells.
        baseline: name of the frozen row.
        metrics: None for the headlines; each video's own number counts once.

    Returns:
        None where no source has two videos.
    """
    columns = metric_columns(records, metrics)
    if not any(len(_metric_by_video(r, metric)) > 1 for r in records for _, metric in columns):
        return None
    lines, videos = [], 0
    for (row,), members in group(records, "row").items():
        if members[0]["name"] == baseline:
            continue
        found = [_gain(records, members, baseline, *column) for column in columns]
        videos = max([videos, *(gain.videos for gain in found if gain)])
        lines.append([row, *map(_text, found)])
    note = (
        f"Points over {baseline} on the same video: mean over videos (at most {videos}) of the "
        "video's own metric, averaged over its seeds; in brackets its 95 % interval by bootstrap "
        "over the videos"
    )
    return ResultsTable(["method", *(f"{s} {m}" for s, m in columns)], lines, [f"{note}."])


def shift_table(
    cells: Sequence[Cell], records: Sequence[Record], baseline: str
) -> ResultsTable | None:
    """Mean IoU of the frozen model and the rows' gains over it by corruption, a line each.

    A corruption's frames of one video are pooled; then the mean over its videos. The last line is
    the mean over all pieces of videos, with its interval over the videos.

    Args:
        cells: of the sweep; those on videos of the world that switch between corruptions count.
        records: of complete cells.
        baseline: name of the frozen row.

    Returns:
        None where there are no such cells.
    """
    complete = {record["folder"] for record in records}
    pieces: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    names: dict[str, str] = {}
    for cell in cells:
        if str(cell.folder) in complete:
            for piece, score in _miou_by_piece(cell).items():
                pieces[cell.row][piece].append(score)
                names[cell.row] = cell.name
    frozen = next((row for row, name in names.items() if name == baseline), None)
    if frozen is None:
        return None
    means = {row: {p: fmean(s) for p, s in own.items()} for row, own in pieces.items()}
    reference = means.pop(frozen)
    rows = [row for row, own in means.items() if own.keys() == reference.keys()]
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
    return ResultsTable(["shift", "videos", frozen, *rows], lines, [f"{note}."])


def _gain(
    records: Sequence[Record], members: Sequence[Record], baseline: str, source: str, metric: str
) -> Estimate | None:
    """None where either ran on other videos, or not at all."""
    frozen = [r for r in records if r["name"] == baseline and r["source"] == source]
    ours = _over_seeds([r for r in members if r["source"] == source], metric)
    reference = _over_seeds(frozen, metric)
    if not ours or ours.keys() != reference.keys():
        return None
    return compare(ours, reference).difference


def _over_seeds(records: Sequence[Record], metric: str) -> ByVideo:
    scores = defaultdict(list)
    for record in records:
        for video, score in _metric_by_video(record, metric).items():
            scores[video].append(score)
    return {video: fmean(own) for video, own in scores.items()}


def _metric_by_video(record: Record, metric: str) -> ByVideo:
    summary = json.loads((Path(record["folder"]) / "summary.json").read_text("utf-8"))
    videos = summary["metrics"].get("adapted", {}).get("videos", {})
    return {v: own[metric] for v, own in videos.items() if own.get(metric) is not None}


def _miou_by_piece(cell: Cell) -> dict[tuple[str, str], float]:
    """Mean IoU by (video, corruption), each piece's frames pooled."""
    settings = _world_settings(cell)
    if settings is None:
        return {}
    frames: dict[str, list[tuple[int, Counts]]] = defaultdict(list)
    with open(cell.folder / "frames.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "sem_seg" in row.get("records", {}):
                frames[row["video_id"]].append((row["frame_index"], row["records"]["sem_seg"]))
    pooled: dict[tuple[str, str], list[Counts]] = defaultdict(list)
    for k, video in enumerate(settings["names"] or sorted(frames)):
        flags = (settings["corruption"], settings["each"])
        shift = video_shift(*flags, settings["severity"], settings["schedule"], k)
        for index, counts in frames[video]:
            corruption, _ = shift.at(index, settings["frames"])
            pooled[video, corruption].append(counts)
    scores = {piece: mean_iou(add_counts(many)) for piece, many in pooled.items()}
    return {piece: score for piece, score in scores.items() if score is not None}


def _world_settings(cell: Cell) -> dict[str, Any] | None:
    """Flags of ``tools/make_world.py``, of videos that switch between corruptions."""
    root = cell.environment.get("DETECTRON2_DATASETS")
    for note in Path(root).glob("*/world.json") if root is not None else ():
        settings: dict[str, Any] = json.loads(note.read_text("utf-8"))
        if settings["schedule"] == "switch":
            return settings
    return None


def _by_video(pieces: Mapping[tuple[str, str], float]) -> ByVideo:
    """Mean over the pieces of each video."""
    scores = defaultdict(list)
    for (video, _), score in pieces.items():
        scores[video].append(score)
    return {video: fmean(own) for video, own in scores.items()}


def _text(gain: Estimate | None) -> str:
    if gain is None:
        return "-"
    interval = gain.interval
    bounds = f" [{interval.low:+.2f}, {interval.high:+.2f}]" if interval else ""
    return f"{gain.mean:+.2f}{bounds}"
