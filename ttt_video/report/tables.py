"""Builds the table that sets runs of methods beside each other and beside the published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ..errors import UserError, counted
from ..tasks import STREAMING, arrow, digits, rules, sign
from ..tasks import metrics as known_metrics
from ..tasks.metrics import PROTOCOLS
from . import formats, published
from .formats import Table, between, spread
from .metrics import headlines
from .published import Column, Method
from .runs import Part, check_comparable, row_names, video_means
from .statistics import Comparison, Estimate, compare, estimate, over_seeds

LAYOUTS: Mapping[str, Mapping[str, Method]] = {
    "table1": published.TABLE_1,
    "table3": published.TABLE_3,
    "table4": published.TABLE_4,
    "plain": {},
}
_NOTHING = "–"
_OVER_VIDEOS = "Over videos, each counting once"
_STATISTICS = (
    f"{_OVER_VIDEOS}: mean; gain over the frozen model with the same weights; 95 % percentile "
    "bootstrap intervals (10,000 resamples, seed 0; of two videos their span, of one none); "
    "two-sided paired tests of the gain, exact up to 16 videos: n cannot give a p below 2/2^n."
)


@dataclass(frozen=True)
class Cell:
    """One method's metric on one data set, averaged over seeds.

    ``value`` follows the metric's rule; ``over_videos`` and ``gain`` take each video by itself.
    """

    value: float | None = None
    published: float | None = None
    seeds: tuple[int, ...] = ()
    deviation: float | None = None  # standard deviation between seeds
    over_videos: Estimate | None = None
    gain: Comparison | None = None  # over the frozen model

    @property
    def difference(self) -> float | None:
        """Our number less the published one."""
        if self.value is None or self.published is None:
            return None
        return self.value - self.published


@dataclass(frozen=True)
class Results:
    """Rows by method, columns by metric and data set, and the notes below."""

    columns: list[Column]
    rows: dict[str, dict[str, Cell]]  # method, then title of the column
    seconds: dict[str, tuple[float | None, float | None]]  # per frame by method: ours, published
    rules: dict[str, str]  # by title of the (whole) column: its protocol in words
    notes: list[str]


def build_table(
    parts: list[Part],
    *,
    layout: str = "table1",
    protocol: str = "standard",
    metrics: Sequence[str] = (),
    by: str = "",
) -> Results:
    """Sets runs beside each other, and beside the published numbers.

    Args:
        parts: from :func:`.runs.read_runs`.
        layout: a key of ``LAYOUTS``; "plain" has no published numbers, and a row for every variant
            of a method's settings.
        protocol: a key of ``PROTOCOLS``.
        metrics: names of metrics to show besides the headlines.
        by: "class" or "video" gives each of them a column, in place of the whole.

    Raises:
        UserError: the runs cannot be compared, or have no such metric.
    """
    check_comparable(parts)
    names = row_names(parts, variants=layout == "plain")
    whole = _columns(parts, layout, PROTOCOLS[protocol], metrics)
    if by:
        whole = [c for c in whole if any(part.dataset == c.dataset for part in parts)]
    if by == "class":
        whole = [c for c in whole if not c.metric.startswith(STREAMING)]  # these have none
    columns = [part for column in whole for part in _split(column, parts, by)] if by else whole
    if by and len(whole) > 1:  # else nobody knows which column a class or a video belongs to
        columns = [c._replace(title=f"{c.whole} {c.title}") for c in columns]
    printed = _published_rows(LAYOUTS[layout])
    timed = _timed(parts)
    rows: dict[str, dict[str, Cell]] = {}
    seconds: dict[str, tuple[float | None, float | None]] = {}
    for name in sorted({*names.values(), *printed}, key=_place):
        own = [part for part in parts if names[part] == name]
        method = printed.get(name, Method(name, {}))
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
    return Results(columns, rows, seconds, rules, _notes(parts, columns, protocol, timed))


def _columns(parts: list[Part], layout: str, suffix: str, metrics: Sequence[str]) -> list[Column]:
    """Returns the paper's columns if runs are on its videos, then other data sets by name."""
    papers = [column.metric for column in published.COLUMNS]
    wanted = published.COLOR_METRICS if layout == "table3" else headlines()
    ruled = [metric for metric in wanted if rules([metric + suffix])]
    known = sorted(ruled, key=lambda m: papers.index(m) if m in papers else len(papers))
    videos = {part.dataset: part.summary["videos"] for part in parts}
    columns = [
        column._replace(metric=column.metric + suffix)
        for column in published.COLUMNS
        if layout not in ("table3", "plain")
        and published.is_video_set(column.title, videos.get(column.dataset))
    ]
    if layout == "table3":
        columns = list(published.COLOR_COLUMNS)
    of_paper = {column.dataset for column in columns}
    for dataset in sorted(videos):
        own = [part for part in parts if part.dataset == dataset]
        shown = [m for m in known if any(p.value(m) is not None for p in own)]
        for metric in dict.fromkeys([*(shown if dataset not in of_paper else []), *metrics]):
            found = metric + suffix if metric in known else metric
            if any(p.value(found) is not None for p in own):
                columns.append(Column(f"{dataset or 'unnamed videos'} {metric}", dataset, found))
            elif metric in shown:
                raise UserError(f"{own[0].path} has {metric}, but not {found}; choose --protocol")
    for metric in metrics:
        if not any(column.metric.startswith(metric) for column in columns):
            ruled = sorted({m for p in parts for m in p.summary["protocols"]})
            raise UserError(f"no run has the metric {metric!r}; there are {', '.join(ruled)}")
    return columns


def _split(column: Column, parts: list[Part], by: str) -> list[Column]:
    """Returns a column for every class or video that any run has a number of."""
    own = [part for part in parts if part.dataset == column.dataset]
    names = {name for part in own for name in part.by(by, column.metric)}
    if not names:
        raise UserError(
            f"{own[0].path} has no {column.metric} by {by}; classes have numbers by --protocol "
            "standard alone, and not of every metric"
        )
    known = [name for part in own for name in part.summary.get("classes", ()) if by == "class"]
    ordered = dict.fromkeys(name for name in [*known, *sorted(names)] if name in names)
    return [column._replace(title=name, part=name, whole=column.title, by=by) for name in ordered]


def _published_rows(book: Mapping[str, Method]) -> dict[str, Method]:
    """Returns the rows of the paper's table and those that Section 5.1 adds in words, by name."""
    if not book:
        return {}
    rows = {row.name: row for row in (*book.values(), *published.ARCHITECTURES.values())}
    return rows | {row.name: row for row in published.ENSEMBLES}


def _place(name: str) -> tuple[int, str]:
    """Returns a sort key: the paper's order, variants after their method, others at the end."""
    books = ({"": published.TABLE_3["zhang"]}, published.TABLE_1, published.TABLE_4)
    known = [row.name for book in books for row in book.values()]
    base = name.partition(" + ")[0].partition(" (")[0]
    return (known.index(base) if base in known else len(known), name)


def _timed(parts: list[Part]) -> str:
    """Returns the data set whose frames are timed: the paper's, else the first."""
    datasets = sorted({part.dataset for part in parts})
    papers = [c.dataset for c in reversed(published.COLUMNS) if c.dataset in datasets]
    return [*papers, *datasets][0]


def _one_if_frozen(parts: list[Part]) -> list[Part]:
    """Returns all parts, but only one of the frozen model, which gives the same in every run."""
    if parts and parts[0].frozen:
        return sorted(parts, key=lambda part: part.who == "frozen")[:1]
    return parts


def _cell(own: list[Part], parts: list[Part], column: Column, number: float | None) -> Cell:
    """Averages the seeds of one method; a single class or video has no interval."""
    there = [p for p in own if p.dataset == column.dataset and p.number(column) is not None]
    runs = _one_if_frozen(there)
    if not runs:
        return Cell(published=number)
    mean, deviation = over_seeds([v for run in runs if (v := run.number(column)) is not None])
    frozen = runs[0].frozen
    seeds = () if frozen else tuple(sorted(run.summary["seed"] for run in runs))
    cell = Cell(mean, number, seeds, deviation)
    by_video = video_means(runs, column.metric)
    if column.by or not by_video:
        return cell
    gain = None if frozen else _gain(runs[0], by_video, parts, column.metric)
    return replace(cell, over_videos=estimate([by_video[v] for v in sorted(by_video)]), gain=gain)


def _gain(
    run: Part, by_video: Mapping[str, float], parts: list[Part], metric: str
) -> Comparison | None:
    """Compares with the frozen model of the same weights: this run's, else another run's."""
    key = (run.dataset, run.summary["weights_sha256"])
    frozen = [p for p in parts if p.frozen and (p.dataset, p.summary["weights_sha256"]) == key]
    frozen.sort(key=lambda p: p.path != run.path)
    reference = frozen[0].by_video(metric) if frozen else {}
    both = by_video.keys() & reference.keys()
    if not both:
        return None
    return compare({v: by_video[v] for v in both}, {v: reference[v] for v in both})


def _rule(column: Column, parts: list[Part]) -> str:
    rules = [p.summary["protocols"].get(column.metric) for p in parts]
    rule = next((rule for rule in rules if rule), "no rule is recorded")
    if column in published.COLOR_COLUMNS:
        rule = published.COLOR_RULE
    return rule if sign(column.metric) > 0 else f"{rule}; lower is better"


def _notes(parts: list[Part], columns: list[Column], protocol: str, timed: str) -> list[str]:
    preset = parts[0].summary["preset"]
    seeds = ", ".join(map(str, sorted({p.summary["seed"] for p in parts if not p.frozen})))
    notes = [
        f"Preset: {preset or 'none'}. Protocol: {protocol}.",
    ]
    if seeds:
        notes.append(f"Seeds: {seeds}; the mean is shown, ± the standard deviation between seeds.")
    for dataset in sorted({part.dataset for part in parts}):
        videos = next(p.summary["videos"] for p in parts if p.dataset == dataset)
        hashes = sorted({p.summary["weights_sha256"][:12] for p in parts if p.dataset == dataset})
        notes.append(
            f"{dataset or 'Unnamed videos'}: {counted(len(videos), 'video')}, "
            f"{counted(sum(videos.values()), 'frame')}; "
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
    if titles & {column.title for column in published.COLOR_COLUMNS}:
        notes.append(f"In brackets, the published number, of other videos: {published.SOURCE}")
        notes += published.COLOR_CAVEATS
    return notes


def to_markdown(results: Results) -> str:
    """Returns the tables of :func:`text_tables` as pipe tables, with the rules below."""
    return "\n".join(
        (f"{table.title}:\n\n" if table.title else "") + formats.to_markdown(table, aligned=False)
        for table in text_tables(results)
    )


def to_latex(results: Results) -> str:
    """Returns the tables of :func:`text_tables` in LaTeX."""
    return "\n".join(map(formats.to_latex, text_tables(results)))


def to_csv(results: Results) -> str:
    """Returns one line per method and column, numbers unrounded, the rule with each."""
    lines = []
    for name, cells in results.rows.items():
        if not cells:  # a run without labels has no metric, but a time
            lines.append(_record(results, name, None, Cell()))
        for column in results.columns:
            if column.title in cells:
                lines.append(_record(results, name, column, cells[column.title]))
    return formats.to_csv(lines)


FORMATS = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex}


def text_tables(results: Results) -> list[Table]:
    """Returns the table of metrics and, if there are means over videos, the table of those."""
    head = ["Method", *_titles(results.columns), "seconds per frame"]
    lines = []
    for name, cells in results.rows.items():
        ours, paper = results.seconds[name]
        time = _NOTHING if ours is None else f"{ours:.3f}"
        time += "" if paper is None else f" ({paper:.1f})"
        metrics = [
            _shown(cells.get(column.title, Cell()), column.metric) for column in results.columns
        ]
        lines.append([name, *metrics, time])
    over_videos = [
        [name, title, *_about_videos(found, cells[column.title].gain, digits(column.metric))]
        for name, cells in results.rows.items()
        for title, column in zip(_titles(results.columns), results.columns, strict=True)
        if column.title in cells and (found := cells[column.title].over_videos) is not None
    ]
    notes = [*(f"{title}: {rule}." for title, rule in results.rules.items()), *results.notes]
    if not over_videos:
        return [Table(head, lines, notes)]
    more = ["Method", "on", "videos", "mean", "95 % interval", "gain", "95 % interval"]
    more += ["p permutation", "p Wilcoxon"]
    return [Table(head, lines), Table(more, over_videos, [*notes, _STATISTICS], _OVER_VIDEOS)]


def _titles(columns: Sequence[Column]) -> list[str]:
    """Returns the heads of columns, with arrows where not all get better in one direction."""
    arrows = [arrow(column.metric) for column in columns]
    if len(set(arrows)) == 1:
        arrows = [""] * len(columns)
    return [f"{c.title} {way}".rstrip() for c, way in zip(columns, arrows, strict=True)]


def _about_videos(found: Estimate, gain: Comparison | None, places: int) -> list[str]:
    line = [str(found.videos), f"{found.mean:.{places}f}", _interval(found, places)]
    if gain is None:
        return [*line, *[_NOTHING] * 4]
    tests = [f"{p:.3g}" for p in (gain.p_permutation, gain.p_wilcoxon)]
    difference = f"{gain.difference.mean:+.{places}f}"
    return [*line, difference, _interval(gain.difference, places), *tests]


def _record(results: Results, name: str, column: Column | None, cell: Cell) -> dict[str, Any]:
    """Returns a line of the CSV file."""
    title, dataset, metric, part = column[:4] if column else ("",) * 4
    gain = cell.gain
    return {
        "method": name,
        "column": title,
        "dataset": dataset,
        "metric": metric,
        "part": part,
        "ours": cell.value,
        "published": cell.published,
        "difference": cell.difference,
        "seeds": " ".join(map(str, cell.seeds)),
        "seed_deviation": cell.deviation,
        "videos": cell.over_videos.videos if cell.over_videos else None,
        **_bounds("video_mean", cell.over_videos),
        **_bounds("gain", gain.difference if gain else None),
        "p_permutation": gain.p_permutation if gain else None,
        "p_wilcoxon": gain.p_wilcoxon if gain else None,
        "seconds_per_frame": results.seconds[name][0],
        "rule": results.rules[column.whole or column.title] if column else "",
    }


def _bounds(name: str, found: Estimate | None) -> dict[str, float | None]:
    low, high = (found and found.interval) or (None, None)
    return {name: found.mean if found else None, f"{name}_low": low, f"{name}_high": high}


def _shown(cell: Cell, metric: str) -> str:
    places = digits(metric)
    text = _NOTHING if cell.value is None else spread(cell.value, cell.deviation, places)
    if cell.published is None:
        return text
    less = "" if cell.difference is None else f", {cell.difference:+.{places}f}"
    known = known_metrics().get(metric.removesuffix("_video_mean"))
    printed = places if known is not None and known.unit != "%" else 1  # as the paper does
    return f"{text} ({cell.published:.{printed}f}{less})"


def _interval(found: Estimate, places: int) -> str:
    return _NOTHING if found.interval is None else between(found.interval, digits=places)
