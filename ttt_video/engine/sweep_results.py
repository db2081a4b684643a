"""What a sweep found: one record per cell from its summary file, and tables of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ..tasks import headlines, rules
from .sweep import Cell

Record = dict[str, Any]

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
        metrics by name, ``frozen_<metric>`` where the frozen model ran beside it, ``adapt``,
        ``predict`` and ``total`` mean seconds per frame, ``preset`` and ``weights_sha256``.
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
        record.update({key: summary[key] for key in ("preset", "weights_sha256")})
    record["folder"] = str(cell.folder)
    return record


def add_gains(
    records: Sequence[Record], baseline: str | None, metrics: Sequence[str] | None = None
) -> None:
    """Adds ``gain_<metric>``, in points, to every record that has the metric.

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
        for metric in metrics or headlines():
            reference = record.get(f"frozen_{metric}", base.get(metric))
            if metric in record and reference is not None:
                record[f"gain_{metric}"] = record[metric] - reference


def to_csv(records: Sequence[Record], metrics: Sequence[str] | None = None) -> str:
    """The long table: a line per cell, a column per key that any record has, and metrics' rules."""
    records = [
        {**record, "rules": _spelled_out(record, metrics or headlines())} for record in records
    ]
    columns = list(dict.fromkeys(key for record in records for key in record))
    columns.append(columns.pop(columns.index("folder")))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _spelled_out(record: Record, metrics: Sequence[str]) -> str:
    own = rules(metric for metric in metrics if metric in record)
    return ". ".join(f"{metric}: {rule}" for metric, rule in own.items())


def group(records: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by the values of some of their keys, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return groups


def comparable(records: Sequence[Record], key: str) -> list[Record]:
    """Records with ``key``, on those sources alone on which every row has it.

    The means of two rows over them differ by the rows, not by their sources.
    """
    having = [record for record in records if _has(record, key)]
    rows = group(having, "row").values()
    shared = [{record["source"] for record in members} for members in rows]
    common = set.intersection(*shared) if shared else set()
    return [record for record in having if record["source"] in common]


def metric_columns(
    records: Sequence[Record], metrics: Sequence[str] | None = None
) -> list[tuple[str, str]]:
    """(source, metric) of the metrics that there are, source by source."""
    sources = list(dict.fromkeys(record["source"] for record in records))
    return [
        (source, metric)
        for source in sources
        for metric in metrics or headlines()
        if any(r["source"] == source and r.get(metric) is not None for r in records)
    ]


class ResultsTable(NamedTuple):
    """The table of the paper, as text: a head, a line per row, and what has to be said below."""

    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def results_table(records: Sequence[Record], metrics: Sequence[str] | None = None) -> ResultsTable:
    """A line per row, a column per source and metric, gains, seconds per frame.

    A cell is the mean over the seeds, with the standard deviation where there are several. Gains
    and seconds per frame are means over those sources that all rows have them of. Without labels
    the columns are the number of predicted classes, the entropy, and the share of pixels that
    change from frame to frame. Failed and missing cells are a dash. The notes are the rule of each
    metric, presets and weights.
    """
    columns = metric_columns(records, metrics) or metric_columns(records, UNLABELLED_METRICS)
    sources = {source for source, _ in columns}
    heads = [f"{source} {metric}" if len(sources) > 1 else metric for source, metric in columns]
    gained = [metric for metric in metrics or headlines() if any(metric == m for _, m in columns)]
    times = ["adapt s/frame", "predict s/frame", "s/frame"]
    head = ["method", *heads, *(f"gain {metric}" for metric in gained), *times]
    lines = []
    formats = {f"gain_{metric}": "+.2f" for metric in gained}
    formats |= dict.fromkeys(("adapt_seconds", "predict_seconds", "total_seconds"), ".3f")
    compared = {key: group(comparable(records, key), "row") for key in formats}
    for (row,), members in group(records, "row").items():
        cells = [
            _spread([r[metric] for r in members if r["source"] == source and _has(r, metric)])
            for source, metric in columns
        ]
        for key, shown in formats.items():
            values = [record[key] for record in compared[key].get((row,), [])]
            cells.append(format(fmean(values), shown) if values else "-")
        lines.append([row, *cells])
    notes = [f"{line}." for line in (*_rules(columns), *_origins(records))]
    return ResultsTable(head, lines, notes)


def to_markdown(table: ResultsTable) -> str:
    """The table with aligned columns, its notes below."""
    lines = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    shown = [f"| {' | '.join(line)} |" for line in [text[0], rule, *text[1:]]]
    below = [f"- {note}" for note in table.notes]
    return "\n".join([*shown, *(["", *below] if below else [])]) + "\n"


def _rules(columns: Sequence[tuple[str, str]]) -> list[str]:
    """Of each metric in words; the least and the last of something have that of its mean."""
    names = {metric for _, metric in columns}
    names |= {f"{name.removesuffix(end)}_mean" for name in names for end in ("_min", "_last")}
    return [f"{name}: {rule}" for name, rule in rules(names).items()]


def _origins(records: Sequence[Record]) -> list[str]:
    """Presets and weights, with the sources that they ran on, and the rows where not all did."""
    complete = [record for record in records if _has(record, "weights_sha256")]
    lines = []
    for (preset, weights), own in group(complete, "preset", "weights_sha256").items():
        sources = dict.fromkeys(record["source"] for record in own)
        line = f"Preset {preset or 'none'}, weights {weights[:12]}: {', '.join(sources)}"
        there = dict.fromkeys(r["row"] for r in complete if r["source"] in sources)
        rows = dict.fromkeys(record["row"] for record in own)
        lines.append(line if len(rows) == len(there) else f"{line} ({'; '.join(rows)})")
    return lines


def _has(record: Record, key: str) -> bool:
    return record.get(key) is not None


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{deviation}"
