"""Writes tables of text as Markdown or LaTeX, and records as CSV; pages are in :mod:`.html`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .statistics import Interval


class Table(NamedTuple):
    """A table as text: its head, rows of the same length, notes below it, and a title."""

    head: list[str]
    rows: list[list[str]]
    notes: Sequence[str] = ()
    title: str = ""


def to_markdown(table: Table, *, aligned: bool = True) -> str:
    """Returns a pipe table with its notes below; ``aligned`` pads columns to one width."""
    lines = [table.head, *table.rows]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*lines, strict=True)]
    rule = ["-" * (widths[0] or 3), *("-" * ((width or 4) - 1) + ":" for width in widths[1:])]
    text = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    shown = [f"| {' | '.join(line)} |" for line in [text[0], rule, *text[1:]]]
    below = [f"- {note}" for note in table.notes]
    return "\n".join([*shown, *(["", *below] if below else [])]) + "\n"


def to_latex(table: Table) -> str:
    r"""Returns a ``tabular`` with booktabs' rules (``\usepackage{booktabs}``), its notes below."""
    head, *body = [" & ".join(map(_escaped, line)) + r" \\" for line in [table.head, *table.rows]]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}"
    rows = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    below = "\n\\\\ ".join(map(_escaped, table.notes))
    return "\n".join(rows) + "\n" + (f"\n\\footnotesize\n{below}\n" if below else "")


def to_csv(records: Sequence[Mapping[str, Any]], *, last: str = "") -> str:
    """Returns a line per record and a column for every key of any record, ``last`` at the end."""
    columns = dict.fromkeys(key for record in records for key in record if key != last)
    file = io.StringIO()
    writer = csv.DictWriter(file, [*columns, *([last] if last else [])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def spread(mean: float, deviation: float | None, digits: int = 2) -> str:
    """Returns a mean over seeds, with the standard deviation if there are several seeds."""
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def between(interval: Interval, sign: str = "", digits: int = 2) -> str:
    """Returns an interval in brackets; ``sign`` "+" marks its ends as differences."""
    return f"[{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"


def _escaped(text: str) -> str:
    for character in "\\&%$#_{}":
        replacement = r"\textbackslash " if character == "\\" else rf"\{character}"
        text = text.replace(character, replacement)
    for sign, name in (("±", "pm"), ("↑", "uparrow"), ("↓", "downarrow")):
        text = text.replace(sign, rf"$\{name}$")
    return text.replace("–", "--").replace("^", r"\^{}")
