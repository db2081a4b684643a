"""Convert weights between .safetensors, .pth and .pkl and between 3 and 4 input channels.

Examples:
    python tools/convert_weights.py model_final.pkl model_final.safetensors
    python tools/convert_weights.py swin_small.pkl swin_small_4.pth --channels 4
    python tools/convert_weights.py --inspect model_final.pkl
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from _arguments import ToolParser, answer_first


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("input", nargs="?", metavar="IN", help="file or URL")
    lines.add_argument("output", nargs="?", metavar="OUT", help=".safetensors, .pth or .pkl")
    lines.add_argument("--channels", type=int, choices=(3, 4), help="input channels of OUT")
    lines.add_argument("--inspect", metavar="FILE", help="describe a file and write nothing")
    lines.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return lines


answer_first(__name__, parser().parse_args)

import torch
from torch import Tensor

from ttt_video.cli import run_tool
from ttt_video.errors import UserError
from ttt_video.modeling.interface import MASKFORMER_PARTS
from ttt_video.modeling.weights import (
    input_convolution,
    read_checkpoint,
    set_input_channels,
    weights_hash,
    write_checkpoint,
)

PARTS = {"backbone": "f", "main head": "h", "decoder g": "g"}


def describe(weights: dict[str, Tensor]) -> str:
    """What the weights are, one property a line."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, value in weights.items():
        own = name.partition(".")[0]
        part = next((p for p, role in PARTS.items() if own == MASKFORMER_PARTS[role]), "other")
        counts[part] += 1
        sizes[part] += value.numel()
    rows = {
        "tensors": f"{len(weights)} ({', '.join(sorted({_dtype(v) for v in weights.values()}))})",
        "values": f"{sum(sizes.values()) / 1e6:.2f} M",
    }
    for part in (*PARTS, "other"):
        if counts[part]:
            rows[f"  {part}"] = f"{sizes[part] / 1e6:.2f} M in {counts[part]} tensors"
    convolution = input_convolution(weights)
    rows["channels"] = str(weights[convolution].shape[1]) if convolution else "unknown"
    classifier = weights.get("sem_seg_head.predictor.class_embed.weight")
    rows["classes"] = "none" if classifier is None else str(classifier.shape[0] - 1)
    infinite = [n for n, v in weights.items() if not torch.isfinite(v.float()).all()]
    if infinite:
        rows["not finite"] = f"{len(infinite)} tensors, such as {infinite[0]}"
    rows["sha256"] = weights_hash(weights)
    return "\n".join(f"{key:<13}{value}" for key, value in rows.items())


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool with the given arguments, or those of the command line."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.inspect is not None:
        if args.input is not None or args.channels is not None:
            arguments.error("--inspect takes one file and nothing else")
        print(describe(read_checkpoint(args.inspect)))
        return
    if args.output is None:
        arguments.error("give IN and OUT, or --inspect FILE")
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; give another name or --overwrite")
    weights = read_checkpoint(args.input)
    if args.channels is not None:
        weights = set_input_channels(weights, args.channels)
    write_checkpoint(weights, output, {"converted_from": Path(args.input).name})
    print(f"wrote {output} (weights only)\n{describe(weights)}")


if __name__ == "__main__":
    run_tool(main)
