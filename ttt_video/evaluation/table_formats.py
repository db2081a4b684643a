"""A table as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from .statistics import Estimate, Interval
from .tables import Cell, Table

_NOTHING = "–"
_OVER_VIDEOS = "Over videos, each counting once"
_STATISTICS = (
    f"{_OVER_VIDEOS}: mean; gain over the frozen model with the same weights; 95 % percentile "
    "bootstrap intervals (10,000 resamples, seed 0; of two videos their span, of one none); "
    "two-sided paired tests of the gain, exact up to 16 videos: n cannot give a p below 2/2^n."
)


def to_markdown(table: Table) -> str:
    """Two pipe tables, the metrics and what videos say about them, and the rules below."""
    head, *body = _main_grid(table)
    text = _pipes(head, body) + "\n"
    head, *body = _videos_grid(table)
    if body:
        text += f"\n{_OVER_VIDEOS}:\n\n{_pipes(head, body)}\n"
    return text + "\n" + "\n".join(f"- {line}" for line in _below(table)) + "\n"


def to_latex(table: Table) -> str:
    r"""The same with ``tabular`` and booktabs' rules (``\usepackage{booktabs}``)."""
    head, *body = _main_grid(table)
    text = _tabular(head, body)
    head, *body = _videos_grid(table)
    if body:
        text += "\n\n" + _tabular(head, body)
    lines = "".join(rf"\\ {_escaped(line)}" + "\n" for line in _below(table))
    return text + "\n\n\\footnotesize\n" + lines.removeprefix(r"\\ ")


def to_csv(table: Table) -> str:
    """One line per method and column, numbers unrounded, the rule with each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["method", "column", "dataset", "metric", "part", "ours", "published", "difference",
         "seeds", "seed_deviation", "videos", "video_mean", "video_mean_low", "video_mean_high",
         "gain", "gain_low", "gain_high", "p_permutation", "p_wilcoxon", "seconds_per_frame",
         "rule"]
    )  # fmt: skip
    for name, cells in table.rows.items():
        # A run without labels has no metric, but a time.
        for column in table.columns if cells else [None]:
            cell = cells.get(column.title, Cell()) if column else Cell()
            if column and cell == Cell():
                continue
            gain = cell.gain
            writer.writerow(
                [
                    name,
                    *(column[:4] if column else ("",) * 4),
                    cell.value,
                    cell.published,
                    _difference(cell),
                    " ".join(map(str, cell.seeds)),
                    cell.deviation,
                    cell.over_videos.videos if cell.over_videos else None,
                    *_numbers(cell.over_videos),
                    *_numbers(gain.difference if gain else None),
                    gain.p_permutation if gain else None,
                    gain.p_wilcoxon if gain else None,
                    table.seconds[name][0],
                    table.rules[column.whole or column.title] if column else "",
                ]
            )
    return file.getvalue()


def _main_grid(table: Table) -> list[list[str]]:
    grid = [["Method", *(column.title for column in table.columns), "seconds per frame"]]
    for name, cells in table.rows.items():
        ours, paper = table.seconds[name]
        time = _NOTHING if ours is None else f"{ours:.3f}"
        time += "" if paper is None else f" ({paper:.1f})"
        metrics = [_shown(cells.get(column.title, Cell())) for column in table.columns]
        grid.append([name, *metrics, time])
    return grid


def _videos_grid(table: Table) -> list[list[str]]:
    grid = [
        ["Method", "on", "videos", "mean", "95 % interval", "gain", "95 % interval",
         "p permutation", "p Wilcoxon"]
    ]  # fmt: skip
    for name, cells in table.rows.items():
        for column in table.columns:
            cell = cells.get(column.title, Cell())
            if cell.over_videos is None:
                continue
            line = [name, column.title, str(cell.over_videos.videos)]
            line += [f"{cell.over_videos.mean:.2f}", _between(cell.over_videos.interval)]
            if cell.gain is None:
                line += [_NOTHING] * 4
            else:
                gain = cell.gain.difference
                line += [f"{gain.mean:+.2f}", _between(gain.interval)]
                line += [f"{cell.gain.p_permutation:.3g}", f"{cell.gain.p_wilcoxon:.3g}"]
            grid.append(line)
    return grid


def _below(table: Table) -> list[str]:
    rules = [f"{title}: {rule}." for title, rule in table.rules.items()]
    with_videos = any(c.over_videos for cells in table.rows.values() for c in cells.values())
    return [*rules, *table.notes, *([_STATISTICS] if with_videos else [])]


def _shown(cell: Cell) -> str:
    text = _NOTHING if cell.value is None else f"{cell.value:.2f}"
    if cell.deviation is not None:
        text += f" ± {cell.deviation:.2f}"
    if cell.published is not None:
        difference = _difference(cell)
        text += f" ({cell.published:.1f}"
        text += ")" if difference is None else f", {difference:+.2f})"
    return text


def _difference(cell: Cell) -> float | None:
    if cell.value is None or cell.published is None:
        return None
    return cell.value - cell.published


def _between(interval: Interval | None) -> str:
    return _NOTHING if interval is None else f"[{interval.low:.2f}, {interval.high:.2f}]"


def _numbers(found: Estimate | None) -> tuple[float | None, float | None, float | None]:
    if found is None:
        return None, None, None
    low, high = found.interval or (None, None)
    return found.mean, low, high


def _pipes(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, marks, *body])


def _tabular(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_escaped, cells)) + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            line(head),
            r"\midrule",
            *map(line, body),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _escaped(text: str) -> str:
    for character in "\\&%$#_{}":
        replacement = r"\textbackslash " if character == "\\" else rf"\{character}"
        text = text.replace(character, replacement)
    return text.replace("±", r"$\pm$").replace("–", "--").replace("^", r"\^{}")


FORMATS = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex}
