"""Measures what a model's normalisation layers give on its training images, for ln_adapt."""

from __future__ import annotations

import argparse

from .arguments import ToolParser, add_config_arguments, add_weights_argument


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    parser.add_argument("--output", required=True, metavar="FILE.safetensors")
    add_weights_argument(parser)
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TRAIN")
    parser.add_argument("--max-images", type=int, default=500, metavar="N", help="default: 500")
    add_config_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures and writes."""
    from ttt_video.adaptation.norm_statistics import measure_statistics
    from ttt_video.cli import config_of
    from ttt_video.data.catalog import training_images
    from ttt_video.errors import UserError
    from ttt_video.formats.images import FrameTransform
    from ttt_video.modeling.weights import save_safetensors
    from ttt_video.stream import load_source_model

    if args.max_images < 1:
        raise UserError(f"--max-images is {args.max_images}; give at least 1")
    cfg = config_of(args, "none")
    name = args.dataset or next(iter(cfg.DATASETS.TRAIN), "")
    images = training_images(name, FrameTransform.from_config(cfg), args.max_images)
    statistics = measure_statistics(load_source_model(cfg), images)
    metadata = {"weights": cfg.MODEL.WEIGHTS, "dataset": name, "images": str(args.max_images)}
    save_safetensors(statistics, args.output, metadata)
    print(f"{len(statistics) // 2} layers, written to {args.output}")
