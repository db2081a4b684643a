"""The report of a sweep: its tables, figures and clips, from what its cells left on disk."""

from __future__ import annotations

from pathlib import Path

from ..files import make_folder, write_atomically
from ..sweeps.cells import Sweep
from ..sweeps.workers import finished
from .formats import to_markdown
from .html import HtmlFile, HtmlSection, write_html
from .metrics import headlines
from .sweep_figures import draw_figures
from .sweep_gains import gains_table, shift_table
from .sweep_returns import returns_table
from .sweep_tables import add_gains, cell_record, results_table, to_csv


def write_report(sweep: Sweep, output: Path, protocol: str) -> str:
    """Writes tables and figures of the cells that are on disk.

    Args:
        sweep: as :func:`~ttt_video.sweeps.cells.read_sweep` reads it.
        output: folder of ``results.csv``, ``results.md``, ``report.html`` and figures.
        protocol: what table and figures show; one of ``tasks.metrics.PROTOCOLS``.

    Returns:
        What is in ``results.md``, and a line that names the files.
    """
    metrics = headlines(protocol)
    records = [
        cell_record(cell, cell.summary() if finished(cell) else None)
        for cell in sweep.cells
        if not cell.clip
    ]
    add_gains(records, sweep.baseline, metrics)
    complete = [record for record in records if record["state"] == "complete"]
    tables = [results_table(records, metrics)]
    if sweep.baseline is not None:
        by_video = gains_table(complete, sweep.baseline)
        by_shift = shift_table(sweep.cells, complete, sweep.baseline)
        tables += [table for table in (by_video, by_shift) if table is not None]
    returns = returns_table(sweep.cells, complete)
    tables += [] if returns is None else [returns]
    text = "\n".join(f"## {table.title}\n\n{to_markdown(table)}" for table in tables)
    csv = to_csv(records, metrics)
    make_folder(output)
    write_atomically(output / "results.csv", lambda part: part.write_text(csv, "utf-8"))
    write_atomically(output / "results.md", lambda part: part.write_text(text, "utf-8"))
    figures = draw_figures(complete, sweep.figures, sweep.baseline, output, metrics)
    sections = [HtmlSection(table.title, [table]) for table in tables]
    if figures:
        sections.append(HtmlSection("Figures", [HtmlFile(path, path.stem) for path in figures]))
    clips = [
        HtmlFile(path, f"{cell.row} beside the frozen model, {cell.source}")
        for cell in sweep.cells
        if cell.clip and finished(cell)
        for path in sorted(cell.folder.rglob("*.mp4"))
    ]
    if clips:
        sections.append(HtmlSection("Clips", clips))
    write_html(output / "report.html", output.resolve().name, sections)
    names = ", ".join(["results.csv", "results.md", "report.html", *(f.name for f in figures)])
    return f"{text}\n{names} are in {output}"
