"""Draws runs: metrics and states by frame, best and worst frames, adjacent ones, reconstructions.

RUN is the folder of a stream's run or of a training. Nothing is run again: the pictures of frames
are taken from the run's overlay videos, and those of an image set from its files. Runs on image
sets also have the figures of the report of TTT-MAE online.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import ToolParser, add_register_argument


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg", help="of curves")
    parser.add_argument(
        "--rolling", type=int, metavar="N", help="frames of the rolling mean; default: 1/25 of all"
    )
    parser.add_argument(
        "--extremes", type=int, default=3, metavar="N", help="best and worst frames of each kind"
    )
    parser.add_argument(
        "--adjacent",
        type=int,
        default=1,
        metavar="N",
        help="pairs of adjacent frames that the adapted model predicts most consistently",
    )
    add_register_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Reads, draws, says what was written and what is missing."""
    from ttt_video.errors import UserError
    from ttt_video.files import file_stem, make_folder, names_apart
    from ttt_video.plugins import run_files
    from ttt_video.report.image_figures import draw_image_runs
    from ttt_video.report.image_runs import has_image_classes, read_image_runs
    from ttt_video.report.run_figures import (
        adjacent_frames,
        draw_adjacent,
        draw_curves,
        draw_extremes,
        draw_training,
        extreme_frames,
        is_training,
        read_curves,
    )
    from ttt_video.report.state_figures import draw_states

    run_files(args.register)
    if args.rolling is not None and args.rolling < 1:
        raise UserError(f"--rolling is {args.rolling}; give at least 1, which draws no mean")
    if args.extremes < 0:
        raise UserError(f"--extremes is {args.extremes}; give at least 1, or 0 for none")
    if args.adjacent < 0:
        raise UserError(f"--adjacent is {args.adjacent}; give at least 1, or 0 for none")
    folders = list({path.resolve(): path for path in args.runs}.values())
    trainings = [path for path in folders if is_training(path)]
    runs = read_curves([path for path in folders if path not in trainings])
    make_folder(args.output)
    for file in draw_curves(runs, args.output, rolling=args.rolling, suffix=args.format):
        print(f"written: {file}")
    names = names_apart([run.path for run in runs])
    for run, name in zip(runs, names, strict=True):
        for file in draw_states(run.path, run.label, args.output, name=name, suffix=args.format):
            print(f"written: {file}")
    for run, name in zip(runs, names, strict=True) if args.extremes else ():
        extremes = extreme_frames(run, args.extremes)
        for extreme in extremes:
            print(f"{run.label}: {extreme}")
        file = args.output / f"extremes-{file_stem(name)}.png"
        if not extremes:
            print(f"{run.label}: no best and worst frames without labels and --compare")
        elif draw_extremes(run, extremes, file):
            print(f"written: {file}")
        else:
            print(f"{run.label}: no pictures of frames; stream without --no-video")
    for run, name in zip(runs, names, strict=True) if args.adjacent else ():
        pairs = adjacent_frames(run, args.adjacent)
        file = args.output / f"adjacent-{file_stem(name)}.png"
        if draw_adjacent(run, pairs, file):
            print(*(f"{run.label}: {pair}" for pair in pairs), f"written: {file}", sep="\n")
    for path, name in zip(trainings, names_apart(trainings), strict=True):
        file = args.output / f"reconstruction-{file_stem(name)}.png"
        if draw_training(path, file):
            print(f"written: {file}")
        else:
            print(f"{path}: its TensorBoard files hold no reconstruction (TTT.JOINT, EVAL_PERIOD)")
    images = read_image_runs(
        [run.path for run in runs if has_image_classes(run.path)], allow_incomplete=True
    )
    for file in draw_image_runs(images, args.output, width=args.rolling, suffix=args.format):
        print(f"written: {file}")
