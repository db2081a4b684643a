"""Builds tables of runs on image sets as the report of TTT-MAE online has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, zip_longest

from . import formats, published
from .formats import Table, between
from .image_runs import (
    BASELINE,
    CASES,
    ImageRun,
    Share,
    after_step,
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

    They are top-1 and top-5, differences between methods, the report's Table 3, its Table 2
    (accuracy by corruption, or by severity), its Table 1 (who is right), and of runs with
    ``TTT.RECORD_STEPS`` the accuracy after each step and the number of changes of the prediction.
    """
    made = (accuracy, differences, table_3, table_2, table_1, steps, changed)
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


def differences(runs: Sequence[ImageRun]) -> Table:
    """Returns top-1 of one method less another's on the same pictures, for each two that adapt.

    A set of several corruptions or severities has a line for each, besides that of all pictures.
    """
    lines = []
    for dataset in datasets(runs):
        adapted = [row for row in rows(runs) if row != BASELINE and runs_of(runs, row, dataset)]
        for other, row in combinations(adapted, 2):
            own = runs_of(runs, row, dataset)
            right, reference = by_picture(own), by_picture(runs_of(runs, other, dataset))
            for name, places in _groups(own[0]).items():
                found = gain({i: right[i] for i in places}, reference)
                lines.append(
                    [f"{row}, less {other}", dataset, name, str(len(places)),
                     f"{found.percent:+.1f}", _interval(found, "+")]
                )  # fmt: skip
    head = ["methods", "on", "part", "pictures", "difference", "95 % interval"]
    return Table(head, lines, [], "Differences in top-1")


def table_3(runs: Sequence[ImageRun]) -> Table:
    """Returns the report's Table 3: a line per method, a column per data set."""
    columns = [name for name in datasets(runs) if not _has_parts(runs, name)]
    lines, known = [], False
    for row in rows(runs) if columns else ():
        line = [row]
        for dataset in columns:
            own = runs_of(runs, row, dataset)
            numbers = published.IMAGES.get(corruption(dataset))
            text = _text(share(by_picture(own).values())) if own else _NOTHING
            if numbers is not None and row in numbers.top1:
                text, known = f"{text} ({numbers.top1[row]:.1f})", True
            line.append(text)
        lines.append(line)
    return Table(["top-1", *columns], lines, [_PUBLISHED] if known else [], "Table 3 of the report")


def table_2(runs: Sequence[ImageRun]) -> Table:
    """Returns the report's Table 2: top-1 by corruption or severity, where a set has several."""
    lines, known = [], False
    for dataset, row, own in _cells(runs):
        groups, right = _groups(own[0]), by_picture(own)
        if len(groups) == 1:
            continue
        numbers = published.IMAGE_PAIRS.get(row, {})
        numbers = numbers if numbers.keys() == groups.keys() else {}
        known = known or bool(numbers)
        for name, places in groups.items():
            found = share(right[i] for i in places)
            brackets = f" ({numbers[name]:.1f})" if name in numbers else ""
            lines.append(
                [row, dataset, name, str(len(places)), f"{found.percent:.1f}{brackets}",
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
        texts = [_text(found[case]) for case in CASES.values()]
        for place, number in enumerate(printed, 1):
            texts[place] += f" ({number:.2f})"
        lines.append([row, dataset, *texts])
    head = ["method", "on", *CASES.values()]
    return Table(head, lines, [_PUBLISHED] if known else [], "Table 1 of the report: who is right")


def steps(runs: Sequence[ImageRun]) -> Table:
    """Returns the accuracy after each recorded step, and how much less it is than at the end.

    The baseline stands at 0 steps.
    """
    columns: list[list[str]] = []
    head = ["steps"]
    for dataset, row, own in _recorded(runs):
        right = [after_step(own, step) for step in range(min(run.steps for run in own))]
        found = [by_picture(runs_of(runs, BASELINE, dataset)), *right]
        columns.append([_text(share(r.values())) if r else _NOTHING for r in found])
        columns.append([_text(gain(right[-1], r), "+") if r else _NOTHING for r in found[:-1]])
        head += [f"{row}, {dataset}", "the last step less this"]
    table = enumerate(zip_longest(*columns, fillvalue=_NOTHING))
    lines = [[str(step), *texts] for step, texts in table]
    return Table(head, lines, [], "Accuracy (top-1) after each step")


def changed(runs: Sequence[ImageRun]) -> Table:
    """Returns the share of pictures by number of changes of the predicted class over the steps."""
    lines, most, known = [], 0, False
    found = [(row, dataset, change_counts(own)) for dataset, row, own in _recorded(runs)]
    most = max((max(counts) for *_, counts in found), default=0)
    shown = min(most, 5)
    for row, dataset, counts in found:
        numbers = published.IMAGES.get(corruption(dataset)) if row == "TTT-MAE" else None
        never = _text(counts[0]) + (f" ({numbers.unchanged:.1f})" if numbers else "")
        known = known or numbers is not None
        shares = {n: found.percent for n, found in counts.items()}
        later = [f"{shares.get(n, 0.0):.1f}" for n in range(1, shown + 1)]
        more = [f"{sum(s for n, s in shares.items() if n > shown):.1f}"] if most > shown else []
        mean = sum(n * s for n, s in shares.items()) / 100
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


def _groups(run: ImageRun) -> dict[str, list[int]]:
    """Returns the pictures of each part of a run's set by name, and last those of all."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in by_part(run).items():
        groups[name].append(index)
    return {**{name: groups[name] for name in sorted(groups)}, "all": [*run.records]}


def _text(found: Share, sign: str = "") -> str:
    """Returns a number with its interval, where there is one."""
    return f"{found.percent:{sign}.1f}" + (f" {_interval(found, sign)}" if found.interval else "")


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
