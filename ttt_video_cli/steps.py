"""Shows what gradient steps on one labelled frame do: the paper's Figure 3.

%(prog)s --dataset kitti_step_video_sem_seg_val --frame 10 --output output/steps

It writes steps.png, with the frame, its masked input and the reconstructions after so many steps
on this frame alone, and steps.json, with l_s and l_m after them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import ToolParser, add_config_arguments, add_labelled_arguments

STEPS = (0, 1, 2, 4, 8, 16)


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    add_labelled_arguments(parser)
    parser.add_argument("--video", metavar="ID", help="default: the first of the data set")
    parser.add_argument("--frame", type=int, default=0, metavar="INDEX", help="default: 0")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=STEPS,
        metavar="N",
        help=f"look after so many; default: {' '.join(map(str, STEPS))}",
    )
    add_config_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Takes the steps, draws and prints."""
    from ttt_video.adaptation import build_adapter
    from ttt_video.adaptation.online_ttt_mae import ReconstructionAdapter
    from ttt_video.cli import config_of
    from ttt_video.config import DEFAULT_STREAM_CONFIG
    from ttt_video.data.grey import open_videos
    from ttt_video.data.sources import open_dataset
    from ttt_video.errors import UserError, suggestion
    from ttt_video.files import make_empty_folder
    from ttt_video.locality import follow_steps, labelled_samples
    from ttt_video.report.step_figures import write_steps
    from ttt_video.stream import load_source_model

    low = [value for value in (args.frame, *args.steps) if value < 0]
    if low:
        raise UserError(f"--frame and --steps count from 0, and {low[0]} is below it")
    args.config_file = args.config_file or DEFAULT_STREAM_CONFIG
    cfg = config_of(args)
    cfg.freeze()
    sources = {s.video_id: s for s in open_videos(cfg, lambda t: open_dataset(args.dataset, t))}
    name = args.video if args.video is not None else next(iter(sources))
    if name not in sources:
        raise UserError(f"--video {name!r} is not in {args.dataset}; {suggestion(name, sources)}")
    frame = next((f for f in sources[name] if f["frame_index"] == args.frame), None)
    if frame is None:
        raise UserError(f"--frame {args.frame}: video {name} has no frame of that number")
    (sample,) = labelled_samples(cfg, [frame])
    adapter = build_adapter(cfg, load_source_model(cfg))
    if not isinstance(adapter, ReconstructionAdapter) or not hasattr(adapter.model, "main_losses"):
        raise UserError(
            f"TTT.METHOD {cfg.TTT.METHOD} with a {cfg.MODEL.META_ARCHITECTURE} has no "
            "reconstruction or no labelled loss to show: take online_ttt_mae with MaskFormerTTT"
        )
    folder = Path(args.output)
    make_empty_folder(folder)
    print(write_steps(follow_steps(cfg, adapter, sample, frame, args.steps), folder))
    print(f"written to {folder}")
