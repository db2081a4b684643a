"""Tables of runs beside the published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from ..errors import UserError
from ..tasks import headlines, rules, sign
from . import published
from .comparable import Part, check_comparable, row_names
from .published import Column, Method
from .statistics import Comparison, Estimate, compare, estimate

LAYOUTS: Mapping[str, Mapping[str, Method]] = {
    "table1": published.TABLE_1,
    "table4": published.TABLE_4,
    "plain": {},
}
PROTOCOLS = {"standard": "", "video": "_video_mean", "release": "_frame_release"}
"""Suffixes of the headline metrics: all frames pooled, the mean of each video's, or of frames'."""


@dataclass(frozen=True)
class Cell:
    """One method's metric on one data set; several seeds are averaged.

    ``value`` follows the metric's rule; ``over_videos`` and ``gain`` take each video by itself.
    """

    value: float | None = None
    published: float | None = None
    seeds: tuple[int, ...] = ()
    deviation: float | None = None  # standard deviation between seeds
    over_videos: Estimate | None = None
    gain: Comparison | None = None  # over the frozen model


@dataclass(frozen=True)
class Table:
    """Rows by method, columns by metric and data set, and what must be said below."""

    columns: list[Column]
    rows: dict[str, dict[str, Cell]]  # method, then title of the column
    seconds: dict[str, tuple[float | None, float | None]]  # per frame by method: ours, published
    rules: dict[str, str]  # title of the column, that of the whole: its protocol in words
    notes: list[str]


def build_table(
    parts: list[Part],
    *,
    layout: str = "table1",
    protocol: str = "standard",
    metrics: Sequence[str] = (),
    by: str = "",
) -> Table:
    """Sets runs beside each other, and beside the published numbers.

    Args:
        parts: of :func:`ttt_video.evaluation.comparable.read_runs`.
        layout: a key of ``LAYOUTS``; "plain" has no published numbers, and a row for every variant
            of a method's settings.
        protocol: a key of ``PROTOCOLS``.
        metrics: names in the summaries of further metrics than the headlines to be shown.
        by: "class" or "video" has a column for each one in place of the whole.

    Raises:
        UserError: the runs cannot be compared, or have no such metric.
    """
    check_comparable(parts)
    names = row_names(parts, variants=layout == "plain")
    whole = _columns(parts, layout, PROTOCOLS[protocol], metrics)
    columns = [part for column in whole for part in _split(column, parts, by)] if by else whole
    if by and len(whole) > 1:  # which of them a class or a video is of
        columns = [c._replace(title=f"{c.whole} {c.title}") for c in columns]
    printed = _published_rows(LAYOUTS[layout])
    timed = _timed(parts)
    rows: dict[str, dict[str, Cell]] = {}
    seconds: dict[str, tuple[float | None, float | None]] = {}
    for name in sorted({*names.values(), *printed}, key=_place):
        own = [part for part in parts if names[part] == name]
        method = printed.get(name, Method(name, {}))
        if by:
            cells = {c.title: _part_cell(own, c, by) for c in columns}
        else:
            cells = {c.title: _cell(own, parts, c, method.metrics.get(c.title)) for c in columns}
        cells = {title: cell for title, cell in cells.items() if cell != Cell()}
        in_table = name in {row.name for row in LAYOUTS[layout].values()}
        if own or (cells and in_table):
            times = [p.seconds for p in _one_if_frozen([p for p in own if p.dataset == timed])]
            rows[name] = cells
            paper = method.seconds if any(cell.published for cell in cells.values()) else None
            seconds[name] = (fmean(times) if times else None, paper)
    rules = {column.title: _rule(column, parts) for column in whole}
    if by:
        rules = {title: f"by {by}: {rule}" for title, rule in rules.items()}
    return Table(columns, rows, seconds, rules, _notes(parts, columns, protocol, timed))


def _columns(parts: list[Part], layout: str, suffix: str, metrics: Sequence[str]) -> list[Column]:
    """The paper's, where runs are on its videos; then those of other data sets, by name."""
    videos = {part.dataset: part.summary["videos"] for part in parts}
    columns = [
        column._replace(metric=column.metric + suffix)
        for column in published.COLUMNS
        if layout != "plain" and published.is_video_set(column.title, videos.get(column.dataset))
    ]
    of_paper = {column.dataset for column in columns}
    known = [metric for metric in headlines() if rules([metric + suffix])]
    for dataset in sorted(videos):
        own = [part for part in parts if part.dataset == dataset]
        there = [m for m in known if any(p.value(m) is not None for p in own)]
        for metric in [*(m for m in there if dataset not in of_paper), *metrics]:
            found = metric + suffix if metric in known else metric
            if any(p.value(found) is not None for p in own):
                columns.append(Column(f"{dataset or 'unnamed videos'} {metric}", dataset, found))
            elif metric in there:
                raise UserError(f"{own[0].path} has {metric}, but not {found}; choose --protocol")
    for metric in metrics:
        if not any(column.metric.startswith(metric) for column in columns):
            named = sorted({m for p in parts for m in p.summary["protocols"]})
            raise UserError(f"no run has the metric {metric!r}; there are {', '.join(named)}")
    return columns


def _split(column: Column, parts: list[Part], by: str) -> list[Column]:
    """A column for every class or video that a run has a number of."""
    own = [part for part in parts if part.dataset == column.dataset]
    names = {name for part in own for name in _numbers(part, column.metric, by)}
    if not names:
        raise UserError(
            f"{own[0].path} has no {column.metric} by {by}; classes have numbers by --protocol "
            "standard alone, and not of every metric"
        )
    known = [name for part in own for name in part.summary.get("classes", ()) if by == "class"]
    ordered = dict.fromkeys(name for name in [*known, *sorted(names)] if name in names)
    return [column._replace(title=name, part=name, whole=column.title) for name in ordered]


def _numbers(part: Part, metric: str, by: str) -> dict[str, float]:
    return part.by_class(metric) if by == "class" else part.by_video(metric)


def _published_rows(book: Mapping[str, Method]) -> dict[str, Method]:
    """By the paper's name: the rows of its table, and what Section 5.1 adds to them in words."""
    if not book:
        return {}
    rows = {row.name: row for row in (*book.values(), *published.ARCHITECTURES.values())}
    return rows | {row.name: row for row in published.ENSEMBLES}


def _place(name: str) -> tuple[int, str]:
    """The paper's order; an ensemble or a variant follows its method, others come last."""
    known = [row.name for row in (*published.TABLE_1.values(), *published.TABLE_4.values())]
    base = name.partition(" + ")[0].partition(" (")[0]
    return (known.index(base) if base in known else len(known), name)


def _timed(parts: list[Part]) -> str:
    """The data set whose frames are timed: the paper's, else the first."""
    datasets = sorted({part.dataset for part in parts})
    papers = [c.dataset for c in reversed(published.COLUMNS) if c.dataset in datasets]
    return [*papers, *datasets][0]


def _one_if_frozen(parts: list[Part]) -> list[Part]:
    """The frozen model gives the same in every run: one of its own, else any, stands for all."""
    if parts and parts[0].frozen:
        return sorted(parts, key=lambda part: part.who == "frozen")[:1]
    return parts


def _cell(own: list[Part], parts: list[Part], column: Column, number: float | None) -> Cell:
    metric = column.metric
    there = [p for p in own if p.dataset == column.dataset and p.value(metric) is not None]
    runs = _one_if_frozen(there)
    if not runs:
        return Cell(published=number)
    values = [value for run in runs if (value := run.value(metric)) is not None]
    by_video = _mean_by_video([run.by_video(metric) for run in runs])
    frozen = runs[0].frozen
    return Cell(
        value=fmean(values),
        published=number,
        seeds=() if frozen else tuple(sorted(run.summary["seed"] for run in runs)),
        deviation=stdev(values) if len(values) > 1 else None,
        over_videos=estimate(list(by_video.values())) if by_video else None,
        gain=None if frozen else _gain(runs, by_video, parts, metric),
    )


def _part_cell(own: list[Part], column: Column, by: str) -> Cell:
    """Of one class or video."""
    runs = _one_if_frozen([p for p in own if p.dataset == column.dataset])
    numbers = [(p, _numbers(p, column.metric, by).get(column.part)) for p in runs]
    found = [(p, value) for p, value in numbers if value is not None]
    if not found:
        return Cell()
    values = [value for _, value in found]
    return Cell(
        value=fmean(values),
        seeds=() if runs[0].frozen else tuple(sorted(p.summary["seed"] for p, _ in found)),
        deviation=stdev(values) if len(values) > 1 else None,
    )


def _mean_by_video(runs: list[dict[str, float]]) -> dict[str, float]:
    common = set.intersection(*map(set, runs))
    return {video: fmean(run[video] for run in runs) for video in sorted(common)}


def _gain(
    runs: list[Part], by_video: dict[str, float], parts: list[Part], metric: str
) -> Comparison | None:
    """Over the frozen model with the same weights: of the run itself, else of another."""
    key = (runs[0].dataset, runs[0].summary["weights_sha256"])
    frozen = [p for p in parts if p.frozen and (p.dataset, p.summary["weights_sha256"]) == key]
    frozen.sort(key=lambda p: p.path != runs[0].path)
    reference = frozen[0].by_video(metric) if frozen else {}
    both = by_video.keys() & reference.keys()
    if not both:
        return None
    return compare({v: by_video[v] for v in both}, {v: reference[v] for v in both})


def _rule(column: Column, parts: list[Part]) -> str:
    rules = [p.summary["protocols"].get(column.metric) for p in parts]
    rule = next((rule for rule in rules if rule), "no rule is recorded")
    return rule if sign(column.metric) > 0 else f"{rule}; lower is better"


def _notes(parts: list[Part], columns: list[Column], protocol: str, timed: str) -> list[str]:
    preset = parts[0].summary["preset"]
    notes = [
        f"Preset: {preset or 'none'}. Protocol: {protocol}.",
        "Seeds: "
        + (", ".join(str(s) for s in sorted({p.summary["seed"] for p in parts if not p.frozen})))
        + "; the mean is shown, ± the standard deviation between seeds.",
    ]
    for dataset in sorted({part.dataset for part in parts}):
        videos = next(p.summary["videos"] for p in parts if p.dataset == dataset)
        hashes = sorted({p.summary["weights_sha256"][:12] for p in parts if p.dataset == dataset})
        notes.append(
            f"{dataset or 'Unnamed videos'}: {len(videos)} videos, {sum(videos.values())} frames; "
            f"weights {', '.join(hashes)}."
        )
    devices = sorted({p.summary["device"] for p in parts if p.dataset == timed})
    notes.append(f"Seconds per frame: mean on {timed or 'unnamed videos'}; {'; '.join(devices)}.")
    if any(part.offline for part in parts):
        notes.append("Seconds of offline methods are without their training, as in the paper.")
    if len(devices) > 1:
        notes.append("The times are of different devices and do not compare.")
    incomplete = [str(p.path) for p in parts if not p.summary["complete"] and p.who == "adapted"]
    if incomplete:
        notes.append(f"INCOMPLETE runs, cut off on the way: {', '.join(incomplete)}.")
    titles = {column.title for column in columns}
    if titles & {column.title for column in published.COLUMNS}:
        notes.append(f"In brackets, the published number and ours less it: {published.SOURCE}")
        notes += dict.fromkeys(published.CAVEATS[t] for t in published.CAVEATS if t in titles)
    return notes
