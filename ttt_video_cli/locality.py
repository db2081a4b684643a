"""Measures on labelled videos what the theory of locality is about (docs/theory.md).

%(prog)s --dataset kitti_step_video_sem_seg_val --output output/locality

It writes locality.json, locality.md and two pictures for each video.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import ToolParser, add_config_arguments, add_labelled_arguments

WINDOWS = (1, 2, 4, 8, 16, 32)
LAGS = (1, 2, 4, 8, 16, 32)
SKETCH = 65521


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    add_labelled_arguments(parser)
    parser.add_argument("--max-frames", type=int, metavar="N", help="of each video")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="one of N frames; lags and windows count these",
    )
    parser.add_argument("--max-videos", type=int, metavar="N", help="default: all")
    parser.add_argument(
        "--masks",
        type=int,
        metavar="N",
        help="masked copies of a frame in each of two draws; default: TTT.BATCH_SIZE",
    )
    parser.add_argument(
        "--windows",
        type=int,
        nargs="+",
        default=WINDOWS,
        metavar="K",
        help=f"default: {' '.join(map(str, WINDOWS))}",
    )
    parser.add_argument(
        "--lags",
        type=int,
        nargs="+",
        default=LAGS,
        metavar="D",
        help=f"frames; default: {' '.join(map(str, LAGS))}",
    )
    parser.add_argument(
        "--sketch",
        type=int,
        default=SKETCH,
        metavar="N",
        help=f"numbers that a gradient is compressed to, best a prime; default: {SKETCH}",
    )
    add_config_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures and writes."""
    import json
    import math
    from functools import partial
    from itertools import islice

    from tqdm import tqdm

    from ttt_video.adaptation import build_adapter
    from ttt_video.adaptation.online_ttt_mae import ReconstructionAdapter
    from ttt_video.cli import config_of
    from ttt_video.config import DEFAULT_STREAM_CONFIG
    from ttt_video.data.grey import open_videos
    from ttt_video.data.ordering import FirstFrames
    from ttt_video.data.sources import open_dataset
    from ttt_video.errors import UserError
    from ttt_video.files import make_empty_folder, write_atomically
    from ttt_video.locality import estimate_locality, labelled_samples, measure_gradients
    from ttt_video.report.locality_figures import locality_table, plot_locality
    from ttt_video.stream import load_source_model

    for flag, values in {
        "--max-frames": [args.max_frames],
        "--every": [args.every],
        "--max-videos": [args.max_videos],
        "--masks": [args.masks],
        "--windows": args.windows,
        "--lags": args.lags,
        "--sketch": [args.sketch],
    }.items():
        low = [value for value in values if value is not None and value < 1]
        if low:
            raise UserError(f"{flag} is {low[0]}; give at least 1")
    if len(set(args.lags)) < 2:
        raise UserError("--lags needs at least two lags, to fit how gradients drift")
    if args.config_file is None:
        args.config_file = DEFAULT_STREAM_CONFIG
        print(f"config: {DEFAULT_STREAM_CONFIG} (no --config given)")
    cfg = config_of(args)
    cfg.freeze()
    sources = open_videos(cfg, lambda transform: open_dataset(args.dataset, transform))
    adapter = build_adapter(cfg, load_source_model(cfg))
    if not isinstance(adapter, ReconstructionAdapter):
        raise UserError(
            f"TTT.METHOD is {cfg.TTT.METHOD}, whose loss is not masked reconstruction: locality is "
            "measured with that of online_ttt_mae"
        )
    folder = Path(args.output)
    make_empty_folder(folder)
    found = []
    for source in islice(sources, args.max_videos):
        frames = FirstFrames(source, args.max_frames)
        count = frames.num_frames and math.ceil(frames.num_frames / args.every)
        with tqdm(total=count, desc=source.video_id, unit="frame") as bar:
            gradients = measure_gradients(
                adapter,
                source.video_id,
                labelled_samples(cfg, islice(frames, 0, None, args.every)),
                masks=args.masks or cfg.TTT.BATCH_SIZE,
                size=args.sketch,
                seed=max(cfg.SEED, 0),
                each=bar.update,
            )
        found.append(
            estimate_locality(gradients, windows=sorted({*args.windows}), lags=sorted({*args.lags}))
        )
        plot_locality(found[-1], folder)
        numbers = [video.to_json() for video in found]  # what was measured outlives a stop
        for name, text in {
            "locality.json": json.dumps(numbers, indent=1) + "\n",
            "locality.md": locality_table(found),
        }.items():
            write_atomically(folder / name, partial(_write, text))
    print(locality_table(found))
    print(f"written to {folder}")


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
