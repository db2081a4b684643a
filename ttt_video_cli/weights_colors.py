"""Counts the colours of training images, by which a model of colorization weighs rare ones more."""

from __future__ import annotations

import argparse

from .arguments import ToolParser, add_config_arguments, add_measured_arguments, measured_on


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    add_measured_arguments(parser)
    parser.add_argument("--max-images", type=int, default=2000, metavar="N", help="default: 2000")
    add_config_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Counts and writes."""
    import torch

    from ttt_video.cli import config_of
    from ttt_video.color.bins import ColorBins, is_grey
    from ttt_video.color.lab import rgb_to_lab
    from ttt_video.data.catalog import training_images
    from ttt_video.errors import UserError
    from ttt_video.formats.images import FrameTransform
    from ttt_video.modeling.colorizer import PRIOR
    from ttt_video.modeling.weights import save_safetensors

    if args.max_images < 1:
        raise UserError(f"--max-images is {args.max_images}; give at least 1")
    cfg = config_of(args)
    names, sets = measured_on(args, cfg)
    transform = FrameTransform(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)  # RGB
    bins, used, seen = ColorBins(), 0, 0
    counts = torch.zeros(len(bins), dtype=torch.float64)
    for image in training_images(names, transform, args.max_images):
        ab = rgb_to_lab(image)[None, 1:]
        seen += 1
        if not is_grey(ab):
            counts += bins.histogram(ab)
            used += 1
    if not used:
        raise UserError(f"all {seen} images of {sets} are grey, so there are no colours to count")
    save_safetensors({PRIOR: counts}, args.output, {"dataset": sets, "images": str(used)})
    print(f"{used} of {seen} images have colours, written to {args.output}")
