#!/usr/bin/env python
"""Draws runs: every frame's metric, the best and worst frames, reconstructions.

RUN is the folder of a run of stream_eval.py, or of a training of train_net.py. Nothing is run
again: the pictures of frames are taken from the run's overlay videos.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ttt_video.cli import add_register_argument, run_files, run_tool
from ttt_video.errors import UserError
from ttt_video.visualization.run_figures import (
    draw_curves,
    draw_extremes,
    draw_training,
    extreme_frames,
    is_training,
    read_curves,
)


def argument_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg", help="of curves")
    parser.add_argument(
        "--rolling", type=int, metavar="N", help="frames of the rolling mean; default: 1/25 of all"
    )
    parser.add_argument(
        "--extremes", type=int, default=3, metavar="N", help="best and worst frames of each kind"
    )
    add_register_argument(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Reads, draws, says what was written and what is missing."""
    args = argument_parser().parse_args(argv)
    run_files(args.register)
    if args.rolling is not None and args.rolling < 1:
        raise UserError(f"--rolling is {args.rolling}; give at least 1, which draws no mean")
    trainings = [path for path in args.runs if is_training(path)]
    runs = read_curves([path for path in args.runs if path not in trainings])
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be made: {error.strerror}") from error
    for file in draw_curves(runs, args.output, rolling=args.rolling, suffix=args.format):
        print(f"written: {file}")
    for run in runs:
        extremes = extreme_frames(run, args.extremes)
        for extreme in extremes:
            print(f"{run.label}: {extreme}")
        file = args.output / f"extremes-{run.path.name}.png"
        if not extremes:
            print(f"{run.label}: no best and worst frames without labels and --compare")
        elif draw_extremes(run, extremes, file):
            print(f"written: {file}")
        else:
            print(f"{run.label}: no pictures of frames; stream without --no-video")
    for path in trainings:
        file = args.output / f"reconstruction-{path.name}.png"
        if draw_training(path, file):
            print(f"written: {file}")
        else:
            print(f"{path}: its TensorBoard files hold no reconstruction (TTT.JOINT, EVAL_PERIOD)")


if __name__ == "__main__":
    run_tool(main)
