"""Computes a run's summary from its rows alone."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from ..tasks import LabelInfo, Row, ScoredFrame, Scores, rules
from ..tasks.metrics import mean
from .punctuality import Punctuality, add_streaming

BUDGET_COUNTS = ("skipped_updates", "shrunk_updates", "late_frames")
"""Counts in the rows of a run with a frame budget (:class:`.budget.BudgetedStream`)."""


def finite(record: dict[str, float]) -> Row:
    """Returns scalars for a row: JSON has no NaN, so a non-finite one becomes null."""
    return {k: v if math.isfinite(v) else None for k, v in record.items()}


def summarize(rows: Iterable[Row], info: LabelInfo | None = None) -> Row:
    """Returns metrics, counts and times of a run, from its rows in any order.

    Args:
        rows: of ``frames.jsonl``.
        info: class names of the data set, and which frames its protocols score.

    Returns:
        ``frames``, ``videos`` (frames of each), ``skipped_steps``, ``loss_recon`` (mean), with a
        frame budget :data:`BUDGET_COUNTS`, ``metrics`` of "adapted" and, if rows have it, "frozen"
        (see ``tasks.score``), ``protocols`` (the rule of each metric), ``seconds`` per frame (mean,
        percentiles; of frames that were not dropped) and, if rows have them, ``differences`` of
        both models (mean over frames) and ``streaming`` (:meth:`Punctuality.numbers` of each).
    """
    videos: dict[str, int] = {}
    scores = {who: Scores(info or LabelInfo()) for who in ("adapted", "frozen")}
    timely = {who: Scores(info or LabelInfo()) for who in scores}
    punctuality = {who: Punctuality() for who in scores}
    seconds: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    differing: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    losses = array("d")
    counts = {"skipped_steps": 0}
    for row in rows:
        video_id = row["video_id"]
        videos[video_id] = videos.get(video_id, 0) + 1
        for name in ("skipped_steps", *BUDGET_COUNTS):
            if name in row:
                counts[name] = counts.get(name, 0) + int(row[name])
        if row.get("loss_recon") is not None:
            losses.append(row["loss_recon"])
        if not _dropped(row):
            for name in ("adapt_seconds", "predict_seconds"):
                seconds[name.removesuffix("_seconds")].append(row[name])
            seconds["frame"].append(row["adapt_seconds"] + row["predict_seconds"])
        if "frozen" in row and not _dropped(row["frozen"]):
            seconds["frozen_predict"].append(row["frozen"]["predict_seconds"])
        for name, value in row.get("frozen", {}).get("differences", {}).items():
            differing[name].append(value)
        for who, part in (("adapted", row), ("frozen", row.get("frozen", {}))):
            if part:
                records = part.get("records", {})
                scores[who].add(ScoredFrame(video_id, row["frame_index"], records))
            if "streaming" in part:
                in_time = part["streaming"].get("records", {})
                timely[who].add(ScoredFrame(video_id, row["frame_index"], in_time))
                punctuality[who].add(part["streaming"])
    metrics = {who: result for who, own in scores.items() if (result := own.result())}
    for who, numbers in metrics.items():
        add_streaming(numbers, timely[who].result())
    streaming = {who: own.numbers() for who, own in punctuality.items() if own.frames}
    differences = {name: mean(values) for name, values in sorted(differing.items())}
    return {
        "frames": sum(videos.values()),
        "videos": dict(sorted(videos.items())),
        **counts,
        "loss_recon": mean(losses),
        "metrics": metrics,
        **({"differences": differences} if differences else {}),
        **({"streaming": streaming} if streaming else {}),
        "protocols": rules({name for numbers in metrics.values() for name in numbers}),
        "seconds": {name: _distribution(values) for name, values in seconds.items()},
    }


def _dropped(part: Row) -> bool:
    """Whether the model never looked at the frame."""
    dropped: bool = part.get("streaming", {}).get("dropped", False)
    return dropped


def _distribution(values: array[float]) -> Row:
    percentiles = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {"mean": mean(values), **percentiles}
