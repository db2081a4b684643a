"""Says what is there of a data set, what is missing, and whether its labels make sense.

%(prog)s kitti_step_video_sem_seg_val

Lists images, videos, labels and classes of a registered data set in seconds; label maps are decoded
for 32 frames, or for every frame with --all. A few labelled pictures of a data set without problems
go to output/check_dataset/NAME. Exit code 2 when something is missing or wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import ToolParser, add_register_argument

MAX_LISTED = 20


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    parser.add_argument(
        "name", metavar="NAME", help="registered name, for example coco_videos_instance_bar"
    )
    parser.add_argument("--all", action="store_true", help="decode all label maps, not 32")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="where labelled pictures go (default output/check_dataset/NAME), problems or not",
    )
    pictures.add_argument("--no-pictures", action="store_true", help="write no pictures")
    parser.add_argument("--count", type=int, default=4, help="how many pictures (default 4)")
    add_register_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Checks, lists, draws."""
    from ttt_video.data.checking import DatasetCheck, draw_labels
    from ttt_video.errors import UserError
    from ttt_video.plugins import run_files

    run_files(args.register)
    if args.count < 1:
        raise UserError(f"--count is {args.count}; it must be at least 1")
    check = DatasetCheck(args.name, samples=None if args.all else 32)
    print(args.name, *check.lines, sep="\n")
    for problem in check.problems[:MAX_LISTED]:
        print(f"PROBLEM {problem}")
    if len(check.problems) > MAX_LISTED:
        print(f"... and {len(check.problems) - MAX_LISTED} more")
    # What is damaged cannot always be drawn: then only where asked for.
    if args.pictures or not (args.no_pictures or check.problems):
        folder = args.pictures or Path("output/check_dataset") / args.name
        for path in draw_labels(check, args.count, folder):
            print(f"wrote {path}")
    if check.problems:
        raise UserError(
            f"{args.name}: {len(check.problems)} problem(s), listed above; "
            "what belongs where is in datasets/README.md"
        )
    print("no problems")
