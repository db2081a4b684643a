#!/usr/bin/env python
"""Puts runs into one table, in the layout of the paper's Table 1, 3 or 4 or plainly.

Reads only the summary.json files of the runs. Runs that cannot be compared are refused.
"""

from __future__ import annotations

import argparse
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if __name__ == "tabulate":
    # fvcore imports a library of this name, and Python looks into the folder of the running script
    # first, which is this one for every tool: make way for the library.
    others = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    spec = PathFinder.find_spec(__name__, others)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])

from _arguments import (
    PROTOCOLS,
    TABLE_FORMATS,
    TABLE_LAYOUTS,
    ToolParser,
    add_register_argument,
    answer_first,
)


def argument_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of stream_eval.py's runs")
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


# For the same reason, where this file stands for the library, the project is imported below only.
answer_first(__name__, argument_parser().parse_args)


def main(argv: list[str] | None = None) -> None:
    """Reads, compares, writes."""
    from ttt_video.errors import UserError
    from ttt_video.plugins import run_files
    from ttt_video.report.runs import read_runs
    from ttt_video.report.tables import FORMATS, build_table

    args = argument_parser().parse_args(argv)
    run_files(args.register)
    parts = read_runs(args.runs, allow_incomplete=args.allow_incomplete)
    table = build_table(
        parts,
        layout=args.layout,
        protocol=args.protocol,
        metrics=tuple(args.metric),
        by=args.by or "",
    )
    text = FORMATS[args.format](table)
    if args.output is None:
        print(text, end="")
        return
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(f"written to {args.output}")


if __name__ == "__main__":
    from ttt_video.cli import run_tool

    run_tool(main)
