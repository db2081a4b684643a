"""Converts weights between .safetensors, .pth and .pkl, 3 and 4 input channels, and to fp16.

%(prog)s model_final.pkl model_final.safetensors
%(prog)s swin_small.pkl swin_small_4.pth --channels 4
%(prog)s model_final.pth model_final.safetensors --half
%(prog)s --inspect model_final.pkl
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import ToolParser

if TYPE_CHECKING:
    from torch import Tensor


class ConvertParser(ToolParser):
    """A parser that takes either IN and OUT or ``--inspect FILE``."""

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses, and refuses what does not go together."""
        args = super().parse(argv)
        if args.inspect is None and args.output is None:
            self.error("give IN and OUT, or --inspect FILE")
        given = args.input is not None or args.channels is not None or args.half
        if args.inspect is not None and given:
            self.error("--inspect takes one file and nothing else")
        return args


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    lines = ConvertParser(prog, __doc__)
    lines.add_argument("input", nargs="?", metavar="IN", help="file or URL")
    lines.add_argument("output", nargs="?", metavar="OUT", help=".safetensors, .pth or .pkl")
    lines.add_argument("--channels", type=int, choices=(3, 4), help="input channels of OUT")
    lines.add_argument("--half", action="store_true", help="round the values of OUT to fp16")
    lines.add_argument("--inspect", metavar="FILE", help="describe a file and write nothing")
    lines.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return lines


LABELS = {"f": "encoder f", "h": "head h", "g": "decoder g"}
OTHER = "other"


def roles() -> dict[str, str]:
    """Returns the role of what weights' names begin with, of all models of this package."""
    from ttt_video.modeling import deeplab, segformer, vit_mae, zhang
    from ttt_video.modeling.interface import MASKFORMER_PARTS

    models: list[Mapping[str, str | tuple[str, ...]]] = [
        MASKFORMER_PARTS, vit_mae.PARTS, *({"h": names} for names in vit_mae.HEADS.values()),
        segformer.SegFormer.parts, deeplab.DeepLabV3Plus.parts, zhang.ZhangColorizer.parts,
    ]  # fmt: skip
    found = {}
    for parts in models:
        for role, names in parts.items():
            found.update(dict.fromkeys([names] if isinstance(names, str) else names, role))
    return found


def number_of_classes(weights: Mapping[str, Tensor]) -> str:
    """Returns the classes that the last layer of h tells apart; "none" if it is not known."""
    from ttt_video.modeling.weights import CLASS_WEIGHTS

    return next(
        (str(weights[name].shape[0] - extra) for name, extra in CLASS_WEIGHTS.items()
         if name in weights), "none",
    )  # fmt: skip


def describe(weights: dict[str, Tensor]) -> str:
    """What the weights are, one property a line."""
    import torch

    from ttt_video.errors import counted
    from ttt_video.modeling.weights import input_convolution, weights_hash

    known = roles()
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, value in weights.items():
        role = known.get(name.partition(".")[0])
        part = OTHER if role is None else LABELS[role]
        counts[part] += 1
        sizes[part] += value.numel()
    rows = {
        "tensors": f"{len(weights)} ({', '.join(sorted({_dtype(v) for v in weights.values()}))})",
        "values": f"{sum(sizes.values()) / 1e6:.2f} M",
    }
    for part in (*LABELS.values(), OTHER):
        if counts[part]:
            rows[f"  {part}"] = f"{sizes[part] / 1e6:.2f} M in {counted(counts[part], 'tensor')}"
    convolution = input_convolution(weights)
    rows["channels"] = str(weights[convolution].shape[1]) if convolution else "unknown"
    rows["classes"] = number_of_classes(weights)
    infinite = [n for n, v in weights.items() if not torch.isfinite(v.float()).all()]
    if infinite:
        rows["not finite"] = f"{counted(len(infinite), 'tensor')}, such as {infinite[0]}"
    rows["sha256"] = weights_hash(weights)
    return "\n".join(f"{key:<13}{value}" for key, value in rows.items())


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def run(args: argparse.Namespace) -> None:
    """Converts or describes a file."""
    from ttt_video.errors import UserError
    from ttt_video.modeling.weights import (
        half_precision,
        read_checkpoint,
        set_input_channels,
        write_checkpoint,
    )

    if args.inspect is not None:
        print(describe(read_checkpoint(args.inspect)))
        return
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; give another name or --overwrite")
    weights = read_checkpoint(args.input)
    if args.channels is not None:
        weights = set_input_channels(weights, args.channels)
    if args.half:
        weights = half_precision(weights)
    write_checkpoint(weights, output, {"converted_from": Path(args.input).name})
    print(f"wrote {output} (weights only)\n{describe(weights)}")
