"""Measures what a model's normalisation layers give on its training images, for ln_adapt.

With --head it also measures what learn_on_change compares frames with.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .arguments import (
    ToolParser,
    add_config_arguments,
    add_measured_arguments,
    add_weights_argument,
    measured_on,
)

if TYPE_CHECKING:
    from torch import Tensor


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    add_measured_arguments(parser)
    parser.add_argument(
        "--head",
        metavar="FILE.safetensors",
        help="for TTT.LEARN_ON_CHANGE.SOURCE_HEAD, of the layers under TTT.LEARN_ON_CHANGE.READ",
    )
    add_weights_argument(parser)
    parser.add_argument("--max-images", type=int, default=500, metavar="N", help="default: 500")
    add_config_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures and writes."""
    from ttt_video.adaptation.head_signal import measure_head
    from ttt_video.adaptation.norm_statistics import measure_statistics
    from ttt_video.cli import config_of
    from ttt_video.data.catalog import training_images
    from ttt_video.errors import UserError
    from ttt_video.formats.images import FrameTransform
    from ttt_video.modeling.measured import save_measured
    from ttt_video.stream import load_source_model

    if args.max_images < 1:
        raise UserError(f"--max-images is {args.max_images}; give at least 1")
    cfg = config_of(args, "none")
    names, sets = measured_on(args, cfg)
    transform, model = FrameTransform.from_config(cfg), load_source_model(cfg)

    def images() -> Iterator[Tensor]:
        return training_images(names, transform, args.max_images)

    statistics = measure_statistics(model, images())
    metadata = {"weights": cfg.MODEL.WEIGHTS, "dataset": sets, "images": str(args.max_images)}
    save_measured(statistics, args.output, model, metadata)
    print(f"{len(statistics) // 2} layers, written to {args.output}")
    if args.head is not None:
        head = measure_head(model, images(), cfg.TTT.LEARN_ON_CHANGE.READ)
        save_measured(head, args.head, model, metadata)
        print(f"{len(head['mean'])} channels of the head, written to {args.head}")
