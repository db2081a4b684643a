"""Builds tables of runs on image sets as the report of TTT-MAE online has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from . import formats, published
from .formats import Table, between
from .image_runs import (
    BASELINE,
    CASES,
    ImageRun,
    Share,
    after_each_step,
    by_part,
    by_picture,
    change_counts,
    corruption,
    datasets,
    four_cases,
    gain,
    rows,
    runs_of,
    share,
)
from .statistics import over_seeds

_NOTHING = "–"
_UNIT = (
    "Percent of the pictures; 95 % intervals are 1.96 standard errors over pictures, whose seeds "
    "are averaged first; ± is the standard deviation between seeds."
)
_PUBLISHED = f"In brackets, the published number, of other pictures: {published.IMAGE_SOURCE}."


def image_tables(runs: Sequence[ImageRun]) -> list[Table]:
    """Returns the tables that the runs have numbers for.

    They are top-1 and top-5 with intervals, the report's Table 3, its Table 2 (accuracy by
    corruption, or by severity), its Table 1 (who is right), and of runs with ``TTT.RECORD_STEPS``
    the accuracy after each step and the number of changes of the prediction.
    """
    made = (accuracy, table_3, table_2, table_1, steps, changed)
    return [table for make in made if (table := make(runs)).rows]


def accuracy(runs: Sequence[ImageRun]) -> Table:
    """Returns top-1 and top-5 of each method on each data set, and the gain over the baseline."""
    head = ["method", "on", "pictures", "seeds", "top-1", "95 % interval", "gain"]
    lines = []
    for dataset, row, own in _cells(runs):
        right = by_picture(own)
        frozen = runs_of(runs, BASELINE, dataset)
        gained = gain(right, by_picture(frozen)) if frozen and row != BASELINE else None
        top1, top5 = (
            over_seeds([share(by_picture([run], top).values()).percent for run in own])
            for top in (1, 5)
        )
        seeds = _NOTHING if row == BASELINE else " ".join(str(run.seed) for run in own)
        lines.append(
            [
                row, dataset, str(len(right)), seeds, formats.spread(*top1, 1),
                _interval(share(right.values())), _NOTHING if gained is None
                else f"{gained.percent:+.1f}", _interval(gained, "+"), formats.spread(*top5, 1),
            ]
        )  # fmt: skip
    return Table([*head, "95 % interval", "top-5"], lines, [_UNIT], "Accuracy")


def table_3(runs: Sequence[ImageRun]) -> Table:
    """Returns the report's Table 3: a line per method, a column per data set."""
    columns = [name for name in datasets(runs) if not _has_parts(runs, name)]
    lines, known = [], False
    for row in rows(runs) if columns else ():
        line = [row]
        for dataset in columns:
            own = runs_of(runs, row, dataset)
            numbers = published.IMAGES.get(corruption(dataset))
            text = f"{share(by_picture(own).values()).percent:.1f}" if own else _NOTHING
            if numbers is not None and row in numbers.top1:
                text, known = f"{text} ({numbers.top1[row]:.1f})", True
            line.append(text)
        lines.append(line)
    return Table(["top-1", *columns], lines, [_PUBLISHED] if known else [], "Table 3 of the report")


def table_2(runs: Sequence[ImageRun]) -> Table:
    """Returns the report's Table 2: top-1 by corruption or severity, where a set has several."""
    lines, known = [], False
    for dataset, row, own in _cells(runs):
        groups: defaultdict[str, list[float]] = defaultdict(list)
        names, right = by_part(own[0]), by_picture(own)
        for index, name in names.items():
            groups[name].append(right[index])
        numbers = published.IMAGE_PAIRS.get(row, {})
        numbers = numbers if set(numbers) == {*groups, ""} else {}
        known = known or bool(numbers)
        for name in [*sorted(groups), *([""] if groups else [])]:
            found = share(groups[name] if name else right.values())
            brackets = f" ({numbers[name]:.1f})" if name in numbers else ""
            count = len(groups[name]) if name else len(right)
            lines.append(
                [row, dataset, name or "all", str(count), f"{found.percent:.1f}{brackets}",
                 _interval(found)]
            )  # fmt: skip
    head = ["method", "on", "part", "pictures", "top-1", "95 % interval"]
    return Table(
        head, lines, [_PUBLISHED] if known else [], "Table 2 of the report, and severities"
    )


def table_1(runs: Sequence[ImageRun]) -> Table:
    """Returns the report's Table 1: which of method and baseline is right."""
    lines, known = [], False
    for dataset, row, own in _cells(runs):
        frozen = runs_of(runs, BASELINE, dataset)
        if row == BASELINE or not frozen:
            continue
        found = four_cases(own, frozen[0])
        numbers = published.IMAGES.get(corruption(dataset)) if row == "TTT-MAE" else None
        if _has_parts(runs, dataset):
            numbers = None
        printed = (numbers.only_ttt, numbers.only_baseline) if numbers else ()
        known = known or numbers is not None
        texts = [f"{found[case]:.1f}" for case in CASES.values()]
        for place, number in enumerate(printed, 1):
            texts[place] += f" ({number:.2f})"
        lines.append([row, dataset, *texts])
    head = ["method", "on", *CASES.values()]
    return Table(head, lines, [_PUBLISHED] if known else [], "Table 1 of the report: who is right")


def steps(runs: Sequence[ImageRun]) -> Table:
    """Returns the accuracy after each recorded step, with the baseline at 0 steps."""
    found = {(row, dataset): after_each_step(own) for dataset, row, own in _recorded(runs)}
    names = [*found]
    length = max(map(len, found.values()), default=0)
    start = {
        d: share(by_picture(own).values()).percent for d, r, own in _cells(runs) if r == BASELINE
    }
    lines = []
    for step in range(length + 1) if found else ():
        line = [str(step)]
        for row, dataset in names:
            series = [start.get(dataset), *found[row, dataset]]
            value = series[step] if step < len(series) else None
            line.append(_NOTHING if value is None else f"{value:.1f}")
        lines.append(line)
    head = ["steps", *(f"{row}, {dataset}" for row, dataset in names)]
    return Table(head, lines, [], "Accuracy (top-1) after each step")


def changed(runs: Sequence[ImageRun]) -> Table:
    """Returns the share of pictures by number of changes of the predicted class over the steps."""
    lines, most, known = [], 0, False
    found = [(row, dataset, change_counts(own)) for dataset, row, own in _recorded(runs)]
    most = max((max(counts) for *_, counts in found), default=0)
    shown = min(most, 5)
    for row, dataset, counts in found:
        numbers = published.IMAGES.get(corruption(dataset)) if row == "TTT-MAE" else None
        never = f"{counts[0]:.1f}" + (f" ({numbers.unchanged:.1f})" if numbers else "")
        known = known or numbers is not None
        later = [f"{counts.get(n, 0.0):.1f}" for n in range(1, shown + 1)]
        more = [f"{sum(s for n, s in counts.items() if n > shown):.1f}"] if most > shown else []
        mean = sum(n * s for n, s in counts.items()) / 100
        lines.append([row, dataset, never, *later, *more, f"{mean:.2f}"])
    head = ["method", "on", "never", *map(str, range(1, shown + 1))]
    head += [*([f"more than {shown}"] if most > shown else []), "mean number"]
    notes = ["From one step to the next, the prediction after the first step being the first."]
    return Table(head, lines, notes + [_PUBLISHED] * known, "Changes of the predicted class")


def _cells(runs: Sequence[ImageRun]) -> Iterator[tuple[str, str, list[ImageRun]]]:
    """Yields data set, method and runs, of those that there are."""
    for dataset in datasets(runs):
        for row in rows(runs):
            if own := runs_of(runs, row, dataset):
                yield dataset, row, own


def _recorded(runs: Sequence[ImageRun]) -> Iterator[tuple[str, str, list[ImageRun]]]:
    for dataset, row, own in _cells(runs):
        recorded = [run for run in own if run.steps]
        if recorded:
            yield dataset, row, recorded


def _has_parts(runs: Sequence[ImageRun], dataset: str) -> bool:
    return any(by_part(run) for run in runs if run.dataset == dataset)


def _interval(found: Share | None, sign: str = "") -> str:
    if found is None or found.interval is None:
        return _NOTHING
    return between(found.interval, sign, 1)


def to_csv(tables: Sequence[Table]) -> str:
    """Returns one line per line of all tables, with the table's title."""
    lines = [
        {"table": table.title, **_by_column(table.head, line)}
        for table in tables
        for line in table.rows
    ]
    return formats.to_csv(lines)


def _by_column(head: Sequence[str], line: Sequence[str]) -> dict[str, str]:
    """Returns texts by heading; a heading that repeats is that of the number before it."""
    named: dict[str, str] = {}
    for before, title, text in zip(["", *head], head, line, strict=False):
        named[f"{before}, {title}" if head.count(title) > 1 else title] = text
    return named


def to_markdown(tables: Sequence[Table]) -> str:
    """Returns pipe tables, each under its title."""
    return "\n".join(f"{t.title}:\n\n{formats.to_markdown(t, aligned=False)}" for t in tables)


def to_latex(tables: Sequence[Table]) -> str:
    """Returns the tables in LaTeX."""
    return "\n".join(map(formats.to_latex, tables))


FORMATS = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex}
