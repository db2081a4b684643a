"""Writes a model's prediction as ONNX (.onnx) or as a torch.export program (.pt2).

%(prog)s --weights output/adapted/weights/street/last.safetensors --output street.onnx
%(prog)s --config quick/stream_world.yaml --size 128 256 --output a.onnx --output a.pt2

The prediction alone is written, with the weights as they are: the step that adapts them is not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import ToolParser, add_config_arguments


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    parser.add_argument("--output", action="append", required=True, metavar="FILE")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="overrides MODEL.WEIGHTS; adapted ones need no --config",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--dynamic", action="store_true", help="for frames of any size: the default")
    sizes.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="for one size alone")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_config_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Traces, compares and writes."""
    import torch

    from ttt_video.cli import config_of
    from ttt_video.errors import UserError
    from ttt_video.export.checking import differences, runner
    from ttt_video.export.facts import example_images, facts_of
    from ttt_video.export.files import INSTALL, SUFFIXES, check_outputs, content
    from ttt_video.export.program import LONGEST, SHORTEST, Prediction, check_torch, trace
    from ttt_video.files import write_atomically
    from ttt_video.modeling.interface import drop_part, parts_of
    from ttt_video.modeling.weight_header import read_header
    from ttt_video.stream import load_source_model
    from ttt_video.stream.source_model import config_of_weights

    paths = [Path(output) for output in args.output]
    size = None if args.size is None else (args.size[0], args.size[1])
    if size is not None and min(size) < 1:
        raise UserError(f"--size is {size[0]} {size[1]}; give a height and a width in px")
    check_torch()
    check_outputs(paths, overwrite=args.overwrite)
    if args.config_file is None:
        args.config_file = config_of_weights(args.weights)
        if args.config_file is None:
            raise UserError("give --config, or --weights of a file that --save-weights wrote")
    args.opts = [*args.opts, "MODEL.DEVICE", "cpu"]  # files are the same wherever they are made
    cfg = config_of(args)
    model = load_source_model(cfg)
    prediction, images = Prediction(model), example_images(cfg, size)
    header = None if Path(cfg.MODEL.WEIGHTS).is_dir() else read_header(cfg.MODEL.WEIGHTS)
    with torch.no_grad():
        facts = facts_of(cfg, model, header, prediction(images[0]), size)
    if "g" in parts_of(model):
        drop_part(model, "g")  # no prediction needs it
    program = trace(prediction, images[0], dynamic=size is None)
    for path in paths:
        written = content(program, path.suffix, facts)
        lines = [f"not compared with the model, which takes onnxruntime: {INSTALL}"]
        launch = runner(written, path.suffix)
        if launch is not None:
            lines = [str(d) for d in differences(prediction, launch, images, str(path))]
        write_atomically(path, lambda part, written=written: part.write_bytes(written))  # type: ignore[misc]
        print(f"wrote {path} ({SUFFIXES[path.suffix]}, {len(written) / 1e6:.1f} MB)")
        print("\n".join(f"  {line}" for line in lines))
    sides = f"{SHORTEST} to {LONGEST} px" if size is None else f"{size[0]}x{size[1]}"
    print(f"input: {facts['input']}; {sides}")
    print(f"outputs: {', '.join(facts['outputs'])}; the step that adapts the weights is not inside")
