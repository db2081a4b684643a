#!/usr/bin/env python3
"""Make Cityscapes' train-id label maps, which the download lacks.

python datasets/prepare_cityscapes.py

writes ``*_gtFine_labelTrainIds.png`` beside every ``*_gtFine_labelIds.png``: classes 0-18, and 255
for the rest, as cityscapesScripts' createTrainIdLabelImgs.py does. Existing files are kept, so that
the next run continues an interrupted one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import _checkout  # noqa: F401 - finds the package of this checkout

from ttt_video_cli.arguments import ToolParser, answer_first


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser of the tool's flags."""
    parser = ToolParser(description="Make Cityscapes' train-id label maps.")
    parser.add_argument(
        "--root", type=Path, help="Cityscapes' folder (default $DETECTRON2_DATASETS/cityscapes)"
    )
    return parser


answer_first(__name__, argument_parser().parse_args)

from ttt_video.cli import run_tool
from ttt_video.data.catalog import datasets_root
from ttt_video.data.cityscapes import train_ids
from ttt_video.data.preparation import convert_files
from ttt_video.errors import UserError
from ttt_video.formats.images import write_png
from ttt_video.formats.labels import read_class_map


def train_id_file(label_file: Path) -> Path:
    """Returns the file for the train ids of a ``*_labelIds.png``."""
    return label_file.with_name(label_file.name.replace("_labelIds", "_labelTrainIds"))


def convert(label_file: Path) -> None:
    """Writes the train ids of one label map."""
    try:
        converted = train_ids(read_class_map(label_file))
    except ValueError as error:
        raise UserError(f"{label_file}: {error}") from error
    write_png(train_id_file(label_file), converted)


def main(argv: list[str] | None = None) -> None:
    """Runs the tool; ``argv`` defaults to the command line."""
    root = argument_parser().parse_args(argv).root or datasets_root() / "cityscapes"
    found = sorted((root / "gtFine").glob("[!.]*/[!.]*/[!.]*_gtFine_labelIds.png"))
    if not found:
        raise UserError(
            f"{root}/gtFine holds no <split>/<city>/*_gtFine_labelIds.png: unpack "
            "gtFine_trainvaltest.zip there, or name the folder with --root"
        )
    todo = [file for file in found if not train_id_file(file).exists()]
    convert_files(todo, convert, "train ids")
    print(f"{len(found)} label maps have train ids, {len(todo)} of them new")


if __name__ == "__main__":
    run_tool(main)
