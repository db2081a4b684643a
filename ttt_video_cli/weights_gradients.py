"""Measures how large a method's gradient is on training images, tensor by tensor.

%(prog)s --config quick/stream_world.yaml --output gradients.safetensors

The file is for TTT.OPTIMIZER.SOURCE_GRADIENTS, with the same weights, method and TTT.BATCH_SIZE.
"""

from __future__ import annotations

import argparse

from .arguments import (
    ToolParser,
    add_config_arguments,
    add_measured_arguments,
    add_weights_argument,
    measured_on,
)


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    add_measured_arguments(parser)
    add_weights_argument(parser)
    parser.add_argument("--method", metavar="NAME", help="overrides TTT.METHOD")
    parser.add_argument("--batches", type=int, default=100, metavar="N", help="default: 100")
    add_config_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures and writes."""
    import torch

    from ttt_video.adaptation import build_adapter
    from ttt_video.adaptation.gradient import GradientAdapter
    from ttt_video.adaptation.source_gradients import measure_gradients
    from ttt_video.cli import config_of
    from ttt_video.data.catalog import training_images
    from ttt_video.errors import UserError
    from ttt_video.formats.images import FrameTransform
    from ttt_video.modeling.measured import save_measured
    from ttt_video.stream import load_source_model

    if args.batches < 1:
        raise UserError(f"--batches is {args.batches}; give at least 1")
    cfg = config_of(args, args.method)
    cfg.TTT.OPTIMIZER.SOURCE_GRADIENTS = ""  # it is what is measured here,
    cfg.TTT.PRESET = ""  # and no preset misses it
    adapter = build_adapter(cfg, load_source_model(cfg))
    if not isinstance(adapter, GradientAdapter):
        raise UserError(f"--method {cfg.TTT.METHOD} takes no gradient step of its own")
    (names, sets), size = measured_on(args, cfg), cfg.TTT.BATCH_SIZE
    images = training_images(names, FrameTransform.from_config(cfg), args.batches * size)
    samples = [{"image": image} for image in images]
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    generator = torch.Generator().manual_seed(max(cfg.SEED, 0))
    gradients = measure_gradients(adapter, batches, generator)
    metadata = {"weights": cfg.MODEL.WEIGHTS, "dataset": sets, "method": cfg.TTT.METHOD}
    metadata["batches"] = str(len(batches))
    save_measured(gradients, args.output, adapter.model, metadata)
    print(f"{len(gradients)} tensors, written to {args.output}")
