"""Puts runs into one table, in the layout of the paper's Table 1, 3 or 4 or plainly.

Reads only the summary.json files of the runs; for --layout images, which has several tables, also
their rows. Runs that cannot be compared are refused. --layout table2 takes names of data sets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import (
    PROTOCOLS,
    TABLE_FORMATS,
    TABLE_LAYOUTS,
    ToolParser,
    add_register_argument,
)


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of streams, or data sets")
    parser.add_argument("--layout", choices=TABLE_LAYOUTS, default="table1")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="standard",
        help="the field's rules (pooled over all frames), the mean over videos of the same, or the "
        "rules of the authors' release",
    )
    parser.add_argument("--by", choices=("class", "video"), help="a column for each of these")
    parser.add_argument("--format", choices=TABLE_FORMATS, default="markdown")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a column for another metric of the summaries, such as flicker; may be repeated",
    )
    parser.add_argument("--allow-incomplete", action="store_true", help="also runs cut off")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    add_register_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Reads, compares, writes."""
    from ttt_video.errors import UserError
    from ttt_video.plugins import run_files

    run_files(args.register)
    build = {"images": _image_tables, "table2": _dataset_table}.get(args.layout, _table)
    text = build(args)
    if args.output is None:
        print(text, end="")
        return
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(f"written to {args.output}")


def _table(args: argparse.Namespace) -> str:
    """Returns the text of the one table of all other layouts."""
    from ttt_video.report.runs import read_runs
    from ttt_video.report.tables import FORMATS, build_table

    parts = read_runs(args.runs, allow_incomplete=args.allow_incomplete)
    table = build_table(
        parts,
        layout=args.layout,
        protocol=args.protocol,
        metrics=tuple(args.metric),
        by=args.by or "",
    )
    return FORMATS[args.format](table)


def _dataset_table(args: argparse.Namespace) -> str:
    """Returns the text of the table of data sets."""
    from ttt_video.errors import UserError
    from ttt_video.report.dataset_table import dataset_table
    from ttt_video.report.formats import to_csv, to_latex, to_markdown

    if args.metric or args.by or args.protocol != "standard":
        raise UserError("--layout table2 has no metrics: leave out --metric, --by, --protocol")
    table = dataset_table(args.runs)
    if args.format == "csv":
        return to_csv([dict(zip(table.head, row, strict=True)) for row in table.rows])
    return to_markdown(table) if args.format == "markdown" else to_latex(table)


def _image_tables(args: argparse.Namespace) -> str:
    """Returns the text of the tables of runs on image sets."""
    from ttt_video.errors import UserError
    from ttt_video.report.image_runs import read_image_runs
    from ttt_video.report.image_tables import FORMATS, image_tables

    if args.metric or args.by or args.protocol != "standard":
        raise UserError(
            "--layout images has tables of its own: leave out --metric, --by, --protocol"
        )
    runs = read_image_runs(map(Path, args.runs), allow_incomplete=args.allow_incomplete)
    return FORMATS[args.format](image_tables(runs))
