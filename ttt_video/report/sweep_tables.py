"""Tables of a sweep: a record of each cell, read from its run on disk, and rows of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..sweeps.cells import Cell
from ..tasks import rules
from . import formats
from .formats import Table, spread
from .metrics import UNLABELLED
from .statistics import over_seeds

Record = dict[str, Any]


def cell_record(cell: Cell, summary: Mapping[str, Any] | None) -> Record:
    """Returns one line of the long table.

    Args:
        cell: of the sweep.
        summary: the run's ``summary.json``; None if the run is not complete.

    Returns:
        The cell's names and settings, ``state``, ``reason`` if it failed, ``frames``, every number
        of the method's metrics by name, those under ``streaming`` as ``streaming_<name>``,
        ``frozen_<metric>`` if the frozen model ran beside it,
        ``adapt_seconds``, ``predict_seconds`` and ``total_seconds`` (means per frame), ``preset``,
        ``weights_sha256`` and ``folder``.
    """
    names = ("row", "name", "method", "source", "seed")
    record: Record = {name: getattr(cell, name) for name in names} | dict(cell.settings)
    record["state"] = "missing" if summary is None else "complete"
    reason = cell.failure() if summary is None else None
    if reason is not None:
        record.update(state="failed", reason=reason)
    if summary is not None:
        record["frames"] = summary["frames"]
        for who, prefix in (("adapted", ""), ("frozen", "frozen_")):
            for metric, value in summary["metrics"].get(who, {}).items():
                if isinstance(value, int | float):
                    record[prefix + metric] = value
            for name, value in summary.get("streaming", {}).get(who, {}).items():
                record[f"{prefix}streaming_{name}"] = value
        seconds = summary["seconds"]
        for name, key in (("adapt", "adapt"), ("predict", "predict"), ("total", "frame")):
            record[f"{name}_seconds"] = seconds[key]["mean"]
        record.update({key: summary[key] for key in ("preset", "weights_sha256")})
    record["folder"] = str(cell.folder)
    return record


def add_gains(records: Sequence[Record], baseline: str | None, metrics: Sequence[str]) -> None:
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
        for metric in metrics:
            reference = record.get(f"frozen_{metric}", base.get(metric))
            if metric in record and reference is not None:
                record[f"gain_{metric}"] = record[metric] - reference


def to_csv(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """Returns the long table: a line per cell, with the rules of its metrics."""
    ruled = []
    for record in records:
        own = rules(metric for metric in metrics if metric in record)
        spelled_out = ". ".join(f"{metric}: {rule}" for metric, rule in own.items())
        ruled.append({**record, "rules": spelled_out})
    return formats.to_csv(ruled, last="folder")


def group(records: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Returns the records that share the values of some keys, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return groups


def comparable(records: Sequence[Record], key: str) -> list[Record]:
    """Returns the records with ``key`` on the sources on which every row has it.

    The means of two rows over them differ by the rows, not by their sources.
    """
    having = [record for record in records if _has(record, key)]
    rows = group(having, "row").values()
    shared = [{record["source"] for record in members} for members in rows]
    common = set.intersection(*shared) if shared else set()
    return [record for record in having if record["source"] in common]


def metric_columns(records: Sequence[Record], metrics: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (source, metric) for every metric that a source has, source by source."""
    return [
        (source, metric)
        for (source,), own in group(records, "source").items()
        for metric in metrics
        if any(_has(record, metric) for record in own)
    ]


def results_table(records: Sequence[Record], metrics: Sequence[str]) -> Table:
    """Returns a line per row, a column per source and metric, gains, and seconds per frame.

    A number is the mean over the seeds, with their standard deviation. Gains and seconds are means
    over the sources on which all rows have them. Without labels the columns are
    :data:`.metrics.UNLABELLED`. Failed and missing cells are a dash. The notes give the rule of
    each metric, presets and weights, and why cells failed.

    There is a record per cell, with gains; metrics are the headlines by one protocol.
    """

    columns = metric_columns(records, metrics) or metric_columns(records, UNLABELLED)
    sources = {source for source, _ in columns}
    heads = [f"{source} {metric}" if len(sources) > 1 else metric for source, metric in columns]
    gained = [metric for metric in metrics if any(metric == m for _, m in columns)]
    times = ["adapt s/frame", "predict s/frame", "s/frame"]
    head = ["method", *heads, *(f"gain {metric}" for metric in gained), *times]
    lines = []
    formats = {f"gain_{metric}": "+.2f" for metric in gained}
    formats |= dict.fromkeys(("adapt_seconds", "predict_seconds", "total_seconds"), ".3f")
    compared = {key: group(comparable(records, key), "row") for key in formats}
    for (row,), members in group(records, "row").items():
        cells = [
            _over_seeds([r[metric] for r in members if r["source"] == source and _has(r, metric)])
            for source, metric in columns
        ]
        for key, shown in formats.items():
            values = [record[key] for record in compared[key].get((row,), [])]
            cells.append(format(fmean(values), shown) if values else "-")
        lines.append([row, *cells])
    notes = [f"{line}." for line in (*_rules(columns), *_origins(records))]
    for record in records:
        if _has(record, "reason"):
            cell = f"{record['row']} / {record['source']} / seed {record['seed']}"
            notes.append(f"Failed: {cell}: {record['reason']}")
    return Table(head, lines, notes, "Results")


def _rules(columns: Sequence[tuple[str, str]]) -> list[str]:
    """Returns each metric's rule; that of a minimum or a last value is its mean's."""
    names = {metric for _, metric in columns}
    names |= {f"{name.removesuffix(end)}_mean" for name in names for end in ("_min", "_last")}
    return [f"{name}: {rule}" for name, rule in rules(names).items()]


def _origins(records: Sequence[Record]) -> list[str]:
    """Returns presets and weights with their sources, and with their rows if these differ."""

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


def _over_seeds(values: Sequence[float]) -> str:
    return spread(*over_seeds(values)) if values else "-"
