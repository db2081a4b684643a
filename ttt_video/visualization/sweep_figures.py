"""Pictures of a sweep, drawn from its records alone (:mod:`ttt_video.engine.sweep_results`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ..data.images import natural_key
from ..engine.run_directory import read_rows
from ..engine.sweep_results import Record, comparable, group
from ..tasks import headlines
from .curves import PALETTE, plot_curves

MARKERS, HATCHES = "os^", ("", "//", "..")
"""Told apart where there are more rows than colours."""

FROZEN_COLOR = "0.35"


def draw_figures(
    records: Sequence[Record],
    figures: dict[str, Any],
    baseline: str | None,
    folder: Path,
    metrics: Sequence[str] | None = None,
) -> list[Path]:
    """Draws each figure once per metric that the records have.

    Args:
        records: complete cells, with gains.
        figures: ``curve`` (to the key on the x axis), ``bars``, ``gain_against_time``,
            ``over_time`` (to the names of the rows that it shows).
        baseline: name of the frozen row, a line or the zero of the figures.
        folder: where the files go.
        metrics: to be drawn; None for the headlines.

    Returns:
        The files that were written.
    """
    written = []
    for metric in metrics or headlines():
        scored = [r for r in records if r.get(metric) is not None]
        for kind, value in figures.items():
            path = folder / f"{kind}_{metric}.png"
            if kind == "over_time":
                written += plot_over_time(scored, metric, value, folder)
                continue
            if kind == "curve":
                drawn = plot_setting_curve(scored, metric, value, baseline, path)
            elif kind == "bars":
                drawn = plot_row_bars(scored, metric, baseline, path)
            else:
                drawn = plot_gain_against_time(scored, metric, path)
            written += [path] if drawn else []
    return written


@contextmanager
def _axes(path: Path, width: float = 7.0, height: float = 4.4) -> Iterator[Axes]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    canvas.print_figure(str(path))


def plot_setting_curve(
    records: Sequence[Record], metric: str, key: str, baseline: str | None, path: Path
) -> bool:
    """A metric against a numeric setting on a log axis, as figure 4; the frozen model is a line.

    A line per method; several sources are thin lines under their mean. Where some sources have
    all values, the others are left out. 0, "no limit" for a window, is drawn right of the largest
    value. Bars show the standard deviation over seeds.

    Returns:
        Whether there was anything to draw.
    """
    varied = [r for r in records if isinstance(r.get(key), int | float) and r["name"] != baseline]
    if not varied:
        return False
    values = sorted({r[key] for r in varied}, key=lambda v: (v == 0, v))
    whole = [
        source
        for (source,), own in group(varied, "source").items()
        if {r[key] for r in own} == {*values}
    ]
    if whole:
        records = [r for r in records if r["source"] in whole]
        varied = [r for r in varied if r["source"] in whole]
    place = {v: v or 2 * max(values) or 1 for v in values}
    with _axes(path) as axes:
        for color, ((name,), members) in zip(
            _colors(), group(varied, "method").items(), strict=False
        ):
            sources = group(members, "source")
            for (source,), own in sources.items() if len(sources) > 1 else ():
                points = [(place[v], _mean(own, metric, key, v)) for v in values]
                axes.plot(*_xy(points), color=color, lw=0.8, alpha=0.45)
                axes.annotate(source, points[-1], fontsize=7, color=color, alpha=0.7)
            points = [(place[v], _mean_of_sources(sources, metric, key, v)) for v in values]
            errors = [_seed_deviation(sources, metric, key, v) for v in values]
            axes.errorbar(
                *_xy(points), yerr=errors if any(errors) else None, color=color, marker="o",
                lw=2, capsize=3, label=name,
            )  # fmt: skip
        frozen = [r for r in records if r["name"] == baseline]
        if frozen:
            for own in group(frozen, "source").values():
                axes.axhline(fmean(r[metric] for r in own), color=FROZEN_COLOR, ls="--", lw=0.5)
            level = fmean(fmean(r[metric] for r in own) for own in group(frozen, "source").values())
            axes.axhline(level, color=FROZEN_COLOR, ls="--", label=f"{baseline} ({level:.1f})")
        axes.set_xscale("log", base=2)
        axes.set_xticks([place[v] for v in values], ["all" if v == 0 else f"{v:g}" for v in values])
        axes.minorticks_off()
        axes.set_xlabel(key)
        axes.set_ylabel(f"{metric} (%)")
        axes.legend(frameon=False)
    return True


def plot_row_bars(records: Sequence[Record], metric: str, baseline: str | None, path: Path) -> bool:
    """Bars of the rows side by side for every source, with the frozen model as a line.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for (row,) in group([r for r in records if r["name"] != baseline], "row")]
    if not rows:
        return False
    sources = [source for (source,) in group(records, "source")]
    mean = _source_means(records, metric)
    places = [*sources, "mean"] if len(sources) > 1 else sources
    width = 0.8 / len(rows)
    with _axes(path, max(8.0, 4.5 + 0.45 * len(places) * (len(rows) + 1))) as axes:
        for i, (color, row) in enumerate(zip(_colors(), rows, strict=False)):
            heights = [mean.get((row, place), float("nan")) for place in places]
            left = [x - 0.4 + width * (i + 0.5) for x in range(len(places))]
            hatch = HATCHES[i // len(PALETTE) % len(HATCHES)]
            bars = axes.bar(left, heights, width * 0.92, color=color, hatch=hatch, label=row)
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        names = {r["row"] for r in records if r["name"] == baseline}
        for x, place in enumerate(places):
            level = [mean[row, place] for row in names if (row, place) in mean]
            if level:
                label = str(baseline) if x == 0 else "_"
                axes.hlines(
                    fmean(level), x - 0.45, x + 0.45, color=FROZEN_COLOR, ls="--", label=label
                )
        axes.set_xticks(range(len(places)), places)
        axes.set_ylabel(f"{metric} (%)")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def plot_gain_against_time(records: Sequence[Record], metric: str, path: Path) -> bool:
    """Gain over the frozen model in points against seconds per frame, a point per row.

    Both are means over seeds and the sources that all rows ran on.

    Returns:
        Whether there was anything to draw.
    """
    gained = comparable(records, f"gain_{metric}")
    if not gained:
        return False
    with _axes(path, 8.5) as axes:
        axes.axhline(0, color=FROZEN_COLOR, lw=0.8)
        for i, ((row,), members) in enumerate(group(gained, "row").items()):
            seconds = fmean(r["total_seconds"] for r in members)
            gain = fmean(r[f"gain_{metric}"] for r in members)
            color, marker = PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)]
            axes.scatter(seconds, gain, color=color, marker=marker, s=42, zorder=3, label=row)
        axes.set_xscale("log")
        axes.set_xlabel("seconds per frame (adapt + predict)")
        axes.set_ylabel(f"gain in {metric} (points)")
        for axis_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis_formatter(_PlainLogFormatter(minor_thresholds=(2, 0.5)))
        axes.margins(0.12)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


class _PlainLogFormatter(LogFormatter):
    """0.05 rather than 5e-02, at the ticks that the base class labels."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plot_over_time(
    records: Sequence[Record], metric: str, rows: Sequence[str], folder: Path
) -> list[Path]:
    """Each frame's metric with its mean over 15 frames, a figure per source and a line per row.

    Frames are numbered through the videos of a source, in natural order of their names; several
    seeds are averaged. What is drawn is the frame's own number, whatever pools them in the table.
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
            path = folder / f"over_time_{metric}_{source}.png"
            label = f"{metric} of a frame"
            plot_curves(lines, path, source, label, rolling=15, starts=starts)
            written.append(path)
    return written


def _per_frame(folder: Path, metric: str) -> list[list[float]]:
    """The numbers of each video's frames in order; NaN where a frame has none.

    Several workers write the rows of their videos between each other.
    """
    videos: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for row in read_rows(folder / "frames.jsonl"):
        value = row.get("metrics", {}).get(metric)
        videos[row["video_id"]][row["frame_index"]] = math.nan if value is None else value
    in_order = sorted(videos, key=natural_key)
    return [[videos[name][index] for index in sorted(videos[name])] for name in in_order]


def _colors() -> Iterator[str]:
    while True:
        yield from PALETTE


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _mean(records: Sequence[Record], metric: str, key: str, value: Any) -> float:
    """Over seeds; NaN, a gap in the line, where there is none."""
    values = [r[metric] for r in records if r.get(key) == value]
    return fmean(values) if values else float("nan")


def _mean_of_sources(
    sources: dict[tuple[Any, ...], list[Record]], metric: str, key: str, value: Any
) -> float:
    return fmean(_mean(own, metric, key, value) for own in sources.values())


def _seed_deviation(
    sources: dict[tuple[Any, ...], list[Record]], metric: str, key: str, value: Any
) -> float:
    """Standard deviation over seeds of the mean over sources; 0 with one seed."""
    members = [r for own in sources.values() for r in own if r.get(key) == value]
    means = [fmean(r[metric] for r in own) for own in group(members, "seed").values()]
    return stdev(means) if len(means) > 1 else 0.0


def _source_means(records: Sequence[Record], metric: str) -> dict[tuple[str, str], float]:
    """Mean over seeds by (row, source), and over the sources by (row, "mean")."""
    means: dict[tuple[str, str], float] = {}
    for (row,), members in group(records, "row").items():
        by_source = {
            s: fmean(r[metric] for r in own) for (s,), own in group(members, "source").items()
        }
        means.update({(row, source): value for source, value in by_source.items()})
        means[row, "mean"] = fmean(by_source.values())
    return means
