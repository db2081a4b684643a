"""Measures what this project costs: seconds, memory and floating-point operations.

python tools/measure_costs.py predict --config joint_cityscapes.yaml --output cost.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401 - finds the package of this checkout

from ttt_video_cli.arguments import PRECISIONS, ToolParser, add_config_arguments, answer_first

COMMANDS = {
    "predict": "the frozen model's prediction, beside Hugging Face's Mask2Former",
    "step": "one test-time step, beside the same step through Hugging Face's Mask2Former",
    "loop": "frames with decoding, scoring and writing, beside a loop that rebuilds everything",
    "constant": "frames of small and large windows, early and late in a video, in turn",
    "attention": "deformable attention by itself, beside a plain reference",
    "stages": "decoding, prediction, steps and the rest of a frame, as a profile to simulate",
    "method": "a method's frames, beside the frozen model's, on a video",
    "saving": "frozen frames whose predictions are saved, in each format",
    "train": "steps of joint training on synthetic images",
    "gpu": "every part of a frame on a GPU, against targets and PyTorch's own operators",
    "all": "predict, step, loop and attention, one after the other",
}
SIZE = (512, 1024)


def argument_parser() -> argparse.ArgumentParser:
    """One subcommand per thing that is measured."""
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if name != "method":
            command.add_argument(
                "--size", type=int, nargs=2, action="append", metavar=("H", "W"), help="repeatable"
            )
        command.add_argument("--steps", type=int, default=3, metavar="N", help="measured")
        command.add_argument("--warmup", type=int, default=1, metavar="N", help="not measured")
        if name not in ("loop", "constant", "stages", "method", "saving", "gpu"):
            command.add_argument(
                "--batch",
                type=int,
                nargs="+",
                metavar="N",
                help="default: 1; of step: TTT.BATCH_SIZE",
            )
            command.add_argument("--no-flops", action="store_true", help="count no operations")
        if name in ("predict", "step", "all"):
            command.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: fp32")
        if name not in ("constant", "stages", "method", "saving", "train"):
            command.add_argument("--no-peers", action="store_true", help="measure ours alone")
        if name in ("loop", "all"):
            command.add_argument("--overlay", action="store_true", help="also write overlay.mp4")
        if name == "constant":
            command.add_argument("--windows", type=int, nargs="+", default=(16, 256), metavar="K")
            command.add_argument("--positions", type=int, nargs="+", default=(20, 2000))
        if name in ("stages", "method"):
            command.add_argument("--method", metavar="NAME", help="default: the config's")
        if name == "method":
            command.add_argument(
                "--video",
                required=True,
                type=Path,
                metavar="PATH",
                help="file, or folder of frames",
            )
        if name == "stages":
            command.add_argument("--profile", metavar="FILE", help="write it, or add to it")
            command.add_argument("--machine", default="", metavar="TEXT", help="the profile's")
            command.add_argument(
                "--cpu-seconds",
                action="store_true",
                help="count the cores' seconds, on a machine that others use; one thread",
            )
        if name == "gpu":
            command.add_argument("--only", nargs="+", metavar="PART", help="measure these parts")
            command.add_argument(
                "--memory", type=float, metavar="GIB", help="use no more, as on a smaller card"
            )
        command.add_argument("--output", metavar="FILE", help="also write the results as JSON")
        add_config_arguments(command)
    return parser


answer_first(__name__, argument_parser().parse_args)

import torch
from costs import models
from costs.attention import attention
from costs.comparison import Options
from costs.constant import constancy
from costs.environment import environment, limit_memory
from costs.gpu import PARTS, Configs, gpu
from costs.loop import loops
from costs.method import methods
from costs.report import report
from costs.saving import savings
from costs.stages import add_to_profile, stages
from detectron2.config import CfgNode

from ttt_video.cli import config_of, run_tool
from ttt_video.errors import UserError
from ttt_video.files import make_folder, write_atomically

_ALONE = (
    ("all", "train"),
    ("all", "saving"),
    ("all", "gpu"),
    ("all", "stages"),
)  # what "all" leaves out
Measure = Callable[[CfgNode, Options], dict[str, Any]]


def options_of(args: argparse.Namespace) -> Options:
    """The flags, with their defaults."""
    options = Options(
        sizes=tuple((h, w) for h, w in getattr(args, "size", None) or [SIZE]),
        batches=tuple(getattr(args, "batch", None) or ()),
        precisions=tuple(getattr(args, "precision", None) or ("fp32",)),
        steps=args.steps,
        warmup=args.warmup,
        flops=not getattr(args, "no_flops", True),
        peers=not getattr(args, "no_peers", True),
    )
    smallest = {
        "steps": args.steps,
        "batch": min(options.batches, default=1),
        "size": min(length for size in options.sizes for length in size),
    }
    for name, value in smallest.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; give at least 1")
    if args.warmup < 0:
        raise UserError(f"--warmup is {args.warmup}; give at least 0")
    return options


def measures_of(args: argparse.Namespace) -> dict[str, Measure]:
    """What the command measures, by name."""
    measures: dict[str, Measure] = {
        "predict": models.predictions,
        "step": models.steps,
        "train": models.training,
        "attention": attention,
        "saving": savings,
    }
    if args.command in ("loop", "all"):
        measures["loop"] = partial(loops, overlay=args.overlay)
    if args.command == "constant":
        measures["constant"] = partial(constancy, windows=args.windows, positions=args.positions)
    if args.command == "method":
        measures["method"] = partial(methods, video=args.video)
    if args.command == "stages":
        measures["stages"] = partial(stages, cpu_seconds=args.cpu_seconds)
    if args.command == "gpu":
        unknown = sorted({*(args.only or ())} - {*PARTS})
        if unknown:
            raise UserError(f"--only names {unknown}; choose among {list(PARTS)}")
        if args.memory is not None:
            limit_memory(args.memory)
        configs = Configs(args.config_file, opts=tuple(args.opts))
        measures["gpu"] = partial(gpu, configs=configs, only=args.only or PARTS)
    names = [args.command] if args.command != "all" else [n for n in COMMANDS if n in measures]
    return {name: measures[name] for name in names if (args.command, name) not in _ALONE}


def write_json(result: dict[str, Any], file: Path) -> None:
    """All that was measured, with hardware and versions."""
    file.write_text(json.dumps(result, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parses, measures, writes."""
    args = argument_parser().parse_args(argv)
    if args.config_file is None:
        raise UserError("no config; give --config FILE, such as --config joint_cityscapes.yaml")
    options = options_of(args)
    # Steps from random weights are large, and would be looked at again as few of a stream are.
    args.opts = ["TTT.OPTIMIZER.MAX_LOSS_GROWTH", "0.0", *args.opts]
    cfg = config_of(args, getattr(args, "method", None))
    if args.output is not None:
        make_folder(Path(args.output).parent)
        if Path(args.output).is_dir():
            raise UserError(f"--output {args.output} is a folder; give a file")
    result: dict[str, Any] = {
        "command": args.command,
        "config": args.config_file,
        "preset": args.preset,
        "overrides": args.opts,
        "environment": environment(torch.device(cfg.MODEL.DEVICE)),
        "results": {},
    }
    for name, measure in measures_of(args).items():
        result["results"][name] = measure(cfg, options)
        if args.output is not None:  # what is measured is kept, whatever comes after it
            write_atomically(Path(args.output), partial(write_json, result))
    print(report(result))
    if getattr(args, "profile", None):
        make_folder(Path(args.profile).parent, "--profile")
        add_to_profile(Path(args.profile), args.machine, result)
        print(f"wrote {args.profile}")
    if args.output is not None:
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run_tool(main, keeps_memory=False)  # as where the peers run
