"""What a sweep found: one record per cell from its summary file, and tables of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from .sweep import Cell

Record = dict[str, Any]

METRICS = ("mIoU", "AP", "PQ")
"""The headline metrics, percent; a cell has those of its task."""

UNLABELLED_METRICS = (
    "predicted_classes_min", "predicted_classes_last", "prediction_entropy_mean", "change"
)  # fmt: skip
"""What the table shows where no source has labels: whether a method collapsed."""

STATES = ("complete", "failed", "missing")


def cell_record(cell: Cell, summary: Mapping[str, Any] | None) -> Record:
    """One line of the long table.

    Args:
        cell: what was run.
        summary: the run's ``summary.json``; None where it is not complete.

    Returns:
        The cell's names and settings, ``state``, ``frames``, every number of the adapted model's
        metrics by name, ``frozen_<metric>`` where the frozen model ran beside it, and ``adapt``,
        ``predict`` and ``total`` mean seconds per frame.
    """
    record: Record = {
        "row": cell.row,
        "name": cell.name,
        "method": cell.method,
        "source": cell.source,
        "seed": cell.seed,
        **cell.settings,
        "state": "missing" if summary is None else "complete",
    }
    if summary is not None:
        record["frames"] = summary["frames"]
        for who, prefix in (("adapted", ""), ("frozen", "frozen_")):
            for metric, value in summary["metrics"].get(who, {}).items():
                if isinstance(value, int | float):
                    record[prefix + metric] = value
        seconds = summary["seconds"]
        for name, key in (("adapt", "adapt"), ("predict", "predict"), ("total", "frame")):
            record[f"{name}_seconds"] = seconds[key]["mean"]
    record["folder"] = str(cell.folder)
    return record


def add_gains(records: Sequence[Record], baseline: str | None) -> None:
    """Adds ``gain_<metric>`` of the headline metrics, in points, to every record that has them.

    A cell that ran the frozen model beside it gains over that; else over the row ``baseline`` on
    the same source, with the same seed or, if that has no such seed, with its first.
    """
    frozen: dict[Any, Record] = {}
    for record in records:
        if record["name"] == baseline:
            frozen[record["source"], record["seed"]] = record
            frozen.setdefault(record["source"], record)
    for record in records:
        base = frozen.get((record["source"], record["seed"])) or frozen.get(record["source"], {})
        for metric in METRICS:
            reference = record.get(f"frozen_{metric}", base.get(metric))
            if metric in record and reference is not None:
                record[f"gain_{metric}"] = record[metric] - reference


def to_csv(records: Sequence[Record]) -> str:
    """The long table: a line per cell, a column per key that any record has."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    columns.append(columns.pop(columns.index("folder")))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def group(records: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by the values of some of their keys, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return groups


def metric_columns(
    records: Sequence[Record], metrics: Sequence[str] = METRICS
) -> list[tuple[str, str]]:
    """(source, metric) of the metrics that there are, source by source."""
    sources = list(dict.fromkeys(record["source"] for record in records))
    return [
        (source, metric)
        for source in sources
        for metric in metrics
        if any(r["source"] == source and r.get(metric) is not None for r in records)
    ]


def to_markdown(records: Sequence[Record]) -> str:
    """The table of the paper: a line per row, a column per source and metric, seconds per frame.

    A cell is the mean over the seeds, with the standard deviation where there are several; the
    gain in a metric is the mean over its sources. Without labels the columns are the number of
    predicted classes, the entropy, and the share of pixels that change from frame to frame.
    Seconds per frame are the mean over those sources that all rows ran on. Failed and missing cells
    are a dash.
    """
    columns = metric_columns(records) or metric_columns(records, UNLABELLED_METRICS)
    sources = {source for source, _ in columns}
    heads = [f"{source} {metric}" if len(sources) > 1 else metric for source, metric in columns]
    gained = [metric for metric in METRICS if any(metric == m for _, m in columns)]
    times = ["adapt s/frame", "predict s/frame", "s/frame"]
    lines = [["method", *heads, *(f"gain {metric}" for metric in gained), *times]]
    rows = group(records, "row")
    common = set.intersection(*({r["source"] for r in members} for members in rows.values()))
    for (row,), members in rows.items():
        cells = [
            _spread([r[metric] for r in members if r["source"] == source and _has(r, metric)])
            for source, metric in columns
        ]
        for metric in gained:
            gains = [r[f"gain_{metric}"] for r in members if _has(r, f"gain_{metric}")]
            cells.append(f"{fmean(gains):+.2f}" if gains else "-")
        for key in ("adapt_seconds", "predict_seconds", "total_seconds"):
            seconds = [r[key] for r in members if r["source"] in common and _has(r, key)]
            cells.append(f"{fmean(seconds):.3f}" if seconds else "-")
        lines.append([row, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [text[0], rule, *text[1:]]) + "\n"


def _has(record: Record, key: str) -> bool:
    return record.get(key) is not None


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{deviation}"
