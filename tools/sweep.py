#!/usr/bin/env python
"""Runs a grid of methods, settings, videos and seeds, and shows it as a table and figures.

python tools/sweep.py configs/sweeps/window_size.yaml --output output/window_size

Cells that are finished are not run again, those that were cut off go on. docs/sweep.md describes
the sweep file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ttt_video.cli import add_register_argument, config_dir, run_files, run_tool
from ttt_video.engine.sweep import Cell, Sweep, read_sweep
from ttt_video.engine.sweep_gains import gains_table, shift_table
from ttt_video.engine.sweep_results import (
    add_gains,
    cell_record,
    results_table,
    to_csv,
    to_markdown,
)
from ttt_video.engine.sweep_workers import (
    default_workers,
    finished,
    render_worlds,
    run_local,
    run_on_cluster,
    threads_per_worker,
)
from ttt_video.errors import UserError
from ttt_video.evaluation.tables import PROTOCOLS
from ttt_video.files import write_atomically
from ttt_video.tasks import headlines

TOOLS = Path(__file__).resolve().parent


def argument_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", help="a sweep file, or the name of one under configs/sweeps/")
    parser.add_argument("--output", type=Path, help="default: output/sweeps/<name of the file>")
    source = parser.add_mutually_exclusive_group()
    for flag in ("dataset", "video", "video-dir"):
        source.add_argument(f"--{flag}", help="instead of the file's sources")
    parser.add_argument("--config", help="instead of the file's")
    parser.add_argument("--weights", help="instead of the file's")
    parser.add_argument("--frames", type=int, help="of each video, instead of the file's")
    add_register_argument(parser)
    parser.add_argument("--workers", type=int, help="cells at a time; default: GPUs, else cores")
    parser.add_argument("--threads", type=int, help="of each; default: cores shared out evenly")
    parser.add_argument(
        "--slurm",
        action="append",
        metavar="KEY=VALUE",
        help="run as Slurm jobs; a parameter of submitit, such as timeout_min=240, "
        "slurm_partition=gpu, gpus_per_node=1, cpus_per_task=8; may be given several times",
    )
    parser.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="what table and figures show: all frames pooled (the default unless the file says "
        "otherwise), the mean over videos, or over frames as in the authors' release",
    )
    parser.add_argument("--quick", action="store_true", help="the file's shorter form")
    parser.add_argument("--report", action="store_true", help="run nothing; table and figures only")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and run nothing")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="of all cells")
    return parser


def open_sweep(args: argparse.Namespace) -> Sweep:
    """The sweep that the flags name; ``args.output`` is filled in."""
    path = Path(args.sweep)
    if not path.is_file():
        shipped = config_dir() / "sweeps" / f"{args.sweep.removesuffix('.yaml')}.yaml"
        if not shipped.is_file():
            known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.yaml")))
            raise UserError(f"no sweep {args.sweep!r}; give a file or one of: {known}")
        path = shipped
    name = f"{path.stem}_quick" if args.quick else path.stem
    args.output = args.output or Path("output/sweeps") / name
    replace = {k: getattr(args, k) for k in ("config", "weights", "frames") if getattr(args, k)}
    for kind in ("dataset", "video", "video-dir"):
        value = getattr(args, kind.replace("-", "_"))
        if value is not None:
            replace["sources"] = {Path(value).stem: {kind: value}}
    flags = [part for file in args.register for part in ("--register", file)]
    return read_sweep(
        path, args.output, flags=flags, overrides=args.opts, replace=replace, quick=args.quick
    )


def slurm_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as numbers and strings."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--slurm {pair}: give KEY=VALUE")
    return {key: yaml.safe_load(value) for key, value in (p.split("=", 1) for p in pairs)}


def has_frame_budget(cell: Cell) -> bool:
    """Whether the file or the command line gives the cell less than all the time it needs."""
    return float(cell.overrides.get("TTT.FRAME_BUDGET_MS", 0)) > 0


def run_missing(args: argparse.Namespace, sweep: Sweep) -> dict[Cell, str]:
    """Runs what is not finished; the cells that failed, and why."""
    missing = [cell for cell in sweep.cells if not finished(cell)]
    for name in ("workers", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; give at least 1")
    workers = min(args.workers or default_workers(), max(len(missing), 1))
    if workers > 1 and args.slurm is None and any(map(has_frame_budget, missing)):
        raise UserError(
            "with TTT.FRAME_BUDGET_MS cells that run at once would take each other's time: add "
            "--workers 1"
        )
    if missing:
        render_worlds(sweep.worlds, TOOLS, workers)
    ended: Iterator[tuple[Cell, str | None]]
    if args.slurm is not None and missing:
        parameters = slurm_parameters(args.slurm)
        workers = args.workers or len(missing)
        ended = run_on_cluster(
            missing, TOOLS, args.output / "slurm", workers=workers, parameters=parameters
        )
    else:
        threads = args.threads or threads_per_worker(workers)
        ended = run_local(missing, TOOLS, workers=workers, threads=threads)
    failures = {}
    done = len(sweep.cells) - len(missing)
    with tqdm(total=len(sweep.cells), initial=done, unit="cell") as bar:
        for cell, reason in ended:
            if reason is not None:
                failures[cell] = reason
                bar.write(f"failed: {cell}: {reason}")
            bar.update()
    return failures


def report(sweep: Sweep, failed: Sequence[Cell], output: Path, protocol: str) -> str:
    """Writes tables and figures of what is on disk; returns the tables."""
    from ttt_video.visualization.html_report import HtmlFile, HtmlSection, HtmlTable, write_html
    from ttt_video.visualization.sweep_figures import draw_figures

    metrics = [metric + PROTOCOLS[protocol] for metric in headlines()]
    records = []
    for cell in (cell for cell in sweep.cells if not cell.clip):
        record = cell_record(cell, cell.summary() if finished(cell) else None)
        if cell in failed:
            record["state"] = "failed"
        records.append(record)
    add_gains(records, sweep.baseline, metrics)
    complete = [record for record in records if record["state"] == "complete"]
    tables = {"Results": results_table(records, metrics)}
    if sweep.baseline is not None:
        gains = gains_table(complete, sweep.baseline)
        by_shift = shift_table(sweep.cells, complete, sweep.baseline)
        found = {"Gains by video": gains, "Gains by shift": by_shift}
        tables.update({name: table for name, table in found.items() if table is not None})
    text = "\n".join(f"## {name}\n\n{to_markdown(table)}" for name, table in tables.items())
    csv = to_csv(records, metrics)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "results.csv", lambda part: part.write_text(csv, "utf-8"))
    write_atomically(output / "results.md", lambda part: part.write_text(text, "utf-8"))
    figures = draw_figures(complete, sweep.figures, sweep.baseline, output, metrics)
    sections = [
        HtmlSection(name, [HtmlTable(table.head, table.rows), *table.notes])
        for name, table in tables.items()
    ]
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
    write_html(output / "report.html", output.name, sections)
    names = ", ".join(["results.csv", "results.md", "report.html", *(f.name for f in figures)])
    return f"{text}\n{names} are in {output}"


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, reports all."""
    args = argument_parser().parse_intermixed_args(argv)
    run_files(args.register)
    sweep = open_sweep(args)
    if args.dry_run:
        for cell in sweep.cells:
            print(f"{'done' if finished(cell) else 'missing'}: {cell}: {' '.join(cell.arguments)}")
        return
    failures = {} if args.report else run_missing(args, sweep)
    print(report(sweep, list(failures), args.output, args.protocol or sweep.protocol))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(sweep.cells)} cells failed (above); the same command runs "
            "them again and nothing else"
        )


if __name__ == "__main__":
    run_tool(main)
