"""Draws pictures of a sweep from its records (:mod:`.sweep_tables`)."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from ..files import file_stem
from ..formats.images import natural_key
from ..stream.directory import read_rows
from .curves import PALETTE, figure_axes, plot_curves
from .statistics import mean_by_key, over_seeds
from .sweep_tables import Record, comparable, group

MARKERS, HATCHES = "os^", ("", "//", "..")
"""They tell rows apart if there are more rows than colours."""

FROZEN_COLOR = "0.35"

LEVELS = ("--", ":", "-.")
"""Styles of the lines across a curve; the first is the frozen model's."""


def draw_figures(
    records: Sequence[Record],
    figures: dict[str, Any],
    baseline: str | None,
    folder: Path,
    metrics: Sequence[str],
) -> list[Path]:
    """Draws each figure once per metric that the records have; returns the files.

    Args:
        records: of complete cells, with gains.
        figures: ``curve`` (with the key on the x axis), ``levels`` (with the names of rows that
            are lines across the curve), ``bars``, ``gain_against_time``, ``over_time`` (with the
            names of the rows that it shows).
        baseline: name of the frozen row: a line, or the zero of gains.
        folder: where the files go.
        metrics: names of the metrics.
    """
    written = []
    for metric in metrics:
        scored = [r for r in records if r.get(metric) is not None]
        for kind, value in figures.items():
            path = folder / f"{kind}_{metric}.png"
            if kind == "over_time":
                written += plot_over_time(scored, metric, value, folder)
            elif kind == "curve":
                levels = [*([baseline] if baseline else []), *figures.get("levels", [])]
                written += plot_setting_curve(scored, metric, value, levels, path)
            elif kind == "levels":
                continue
            elif kind == "bars":
                written += plot_row_bars(scored, metric, baseline, path)
            else:
                written += plot_gain_against_time(scored, metric, path)
    return written


def plot_setting_curve(
    records: Sequence[Record], metric: str, key: str, levels: Sequence[str], path: Path
) -> list[Path]:
    """Draws a metric against a numeric setting on a log axis, like figure 4; returns the files.

    Each method is a line; several sources are thin lines under their mean. If some sources have
    all values, the others are left out. 0, "no limit" for a window, is drawn right of the largest
    value. Bars show the standard deviation over seeds, lines across the figure the rows ``levels``:
    the frozen model first, dashed.
    """
    varied = [r for r in records if isinstance(r.get(key), int | float) and r["name"] not in levels]
    if not varied:
        return []
    values = sorted({r[key] for r in varied}, key=lambda v: (v == 0, v))
    by_source = group(varied, "source").items()
    whole = [source for (source,), own in by_source if {r[key] for r in own} == {*values}]
    if whole:
        records = [r for r in records if r["source"] in whole]
        varied = [r for r in varied if r["source"] in whole]
    places = [v or 2 * max(values) or 1 for v in values]
    with figure_axes(path) as axes:
        for color, ((name,), members) in zip(
            itertools.cycle(PALETTE), group(varied, "method").items(), strict=False
        ):
            lines = {
                source: [_mean(_at(own, key, value), metric) for value in values]
                for (source,), own in group(members, "source").items()
            }
            for source, line in lines.items() if len(lines) > 1 else ():
                axes.plot(places, line, color=color, lw=0.8, alpha=0.45)
                end = (places[-1], line[-1])
                axes.annotate(source, end, fontsize=7, color=color, alpha=0.7)
            errors = [_seed_deviation(_at(members, key, value), metric) for value in values]
            axes.errorbar(
                places, [fmean(own) for own in zip(*lines.values(), strict=True)],
                yerr=errors if any(errors) else None, color=color, marker="o", lw=2, capsize=3,
                label=name,
            )  # fmt: skip
        for name, style in zip(levels, itertools.cycle(LEVELS), strict=False):
            own_sources = group([r for r in records if r["name"] == name], "source").values()
            across = [_mean(own, metric) for own in own_sources]
            for level in across:
                axes.axhline(level, color=FROZEN_COLOR, ls=style, lw=0.5)
            if across:
                level = fmean(across)
                axes.axhline(level, color=FROZEN_COLOR, ls=style, label=f"{name} ({level:.1f})")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, ["all" if v == 0 else f"{v:g}" for v in values])
        axes.minorticks_off()
        axes.set_xlabel(key)
        axes.set_ylabel(f"{metric} (%)")
        axes.legend(frameon=False)
    return [path]


def plot_row_bars(
    records: Sequence[Record], metric: str, baseline: str | None, path: Path
) -> list[Path]:
    """Draws bars of the rows by source, and the frozen model as a line; returns the files."""
    rows = [row for (row,) in group([r for r in records if r["name"] != baseline], "row")]
    if not rows:
        return []
    sources = [source for (source,) in group(records, "source")]
    mean = _source_means(records, metric)
    places = [*sources, "mean"] if len(sources) > 1 else sources
    width = 0.8 / len(rows)
    with figure_axes(path, max(8.0, 4.5 + 0.45 * len(places) * (len(rows) + 1))) as axes:
        for i, (color, row) in enumerate(zip(itertools.cycle(PALETTE), rows, strict=False)):
            heights = [mean.get((row, place), math.nan) for place in places]
            left = [x - 0.4 + width * (i + 0.5) for x in range(len(places))]
            hatch = HATCHES[i // len(PALETTE) % len(HATCHES)]
            bars = axes.bar(left, heights, width * 0.92, color=color, hatch=hatch, label=row)
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        names = {r["row"] for r in records if r["name"] == baseline}
        for x, place in enumerate(places):
            level = [mean[row, place] for row in names if (row, place) in mean]
            if level:
                ends = (fmean(level), x - 0.45, x + 0.45)
                label = str(baseline) if x == 0 else "_"
                axes.hlines(*ends, color=FROZEN_COLOR, ls="--", label=label)
        axes.set_xticks(range(len(places)), places)
        axes.set_ylabel(f"{metric} (%)")
        _legend_beside(axes)
    return [path]


def plot_gain_against_time(records: Sequence[Record], metric: str, path: Path) -> list[Path]:
    """Draws each row's gain in points against its seconds per frame; returns the files.

    Both are means over the seeds and over the sources that all rows ran on.
    """
    gained = comparable(records, f"gain_{metric}")
    if not gained:
        return []
    with figure_axes(path, 8.5) as axes:
        axes.axhline(0, color=FROZEN_COLOR, lw=0.8)
        for i, ((row,), members) in enumerate(group(gained, "row").items()):
            place = (_mean(members, "total_seconds"), _mean(members, f"gain_{metric}"))
            color, marker = PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)]
            axes.scatter(*place, color=color, marker=marker, s=42, zorder=3, label=row)
        axes.set_xscale("log")
        axes.set_xlabel("seconds per frame (adapt + predict)")
        axes.set_ylabel(f"gain in {metric} (points)")
        for axis_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis_formatter(_PlainLogFormatter(minor_thresholds=(2, 0.5)))
        axes.margins(0.12)
        _legend_beside(axes)
    return [path]


def _legend_beside(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


class _PlainLogFormatter(LogFormatter):
    """Writes 0.05 rather than 5e-02 at the ticks that the base class labels."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plot_over_time(
    records: Sequence[Record], metric: str, rows: Sequence[str], folder: Path
) -> list[Path]:
    """Draws each frame's metric and its mean over 15 frames: a figure per source, a line per row.

    Frames are numbered through the videos of a source, in natural order of their names; seeds are
    averaged. The number is the frame's own, whatever the table's protocol pools.
    """
    written = []
    for (source,), own in group(records, "source").items():
        lines: dict[str, list[float]] = {}
        starts: list[int] = []
        for name in rows:
            folders = [Path(r["folder"]) for r in own if r["name"] == name]
            if folders:
                runs = [_per_frame(f, metric.split("_")[0]) for f in folders]
                lines[name] = np.mean([np.concatenate(r) for r in runs], axis=0).tolist()
                starts = np.cumsum([len(video) for video in runs[0]]).tolist()
        if lines:
            path = folder / f"over_time_{metric}_{file_stem(source)}.png"
            label = f"{metric} of a frame"
            plot_curves(lines, path, source, label, rolling=15, starts=starts)
            written.append(path)
    return written


def _per_frame(folder: Path, metric: str) -> list[list[float]]:
    """Returns the numbers of each video's frames in order; NaN if a frame has none.

    Rows on disk are in no order of videos if several workers wrote them.
    """
    videos: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for row in read_rows(folder / "frames.jsonl"):
        value = row.get("metrics", {}).get(metric)
        videos[row["video_id"]][row["frame_index"]] = math.nan if value is None else value
    in_order = sorted(videos, key=natural_key)
    return [[videos[name][index] for index in sorted(videos[name])] for name in in_order]


def _at(records: Sequence[Record], key: str, value: Any) -> list[Record]:
    return [record for record in records if record.get(key) == value]


def _mean(records: Sequence[Record], key: str) -> float:
    """Returns the mean over seeds; NaN, a gap in the line, if there is none."""

    return over_seeds([r[key] for r in records]).mean if records else math.nan


def _seed_deviation(records: Sequence[Record], metric: str) -> float:
    """Returns the standard deviation over seeds of the mean over sources; 0 with one seed."""
    means = [_mean(own, metric) for own in group(records, "seed").values()]
    return (over_seeds(means).deviation or 0.0) if means else 0.0


def _source_means(records: Sequence[Record], metric: str) -> dict[tuple[str, str], float]:
    """Returns the mean over seeds by (row, source), and over the sources by (row, "mean")."""
    means = mean_by_key({(r["row"], r["source"]): r[metric]} for r in records)
    return means | mean_by_key({(row, "mean"): mean} for (row, _), mean in means.items())
