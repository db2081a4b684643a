#!/usr/bin/env python3
"""Make the labels of the authors' copy of KITTI-STEP from the official ones.

python datasets/prepare_kitti_step.py

writes, beside every RGB panoptic map ``panoptic_maps/<split>/<seq>/%06d.png``, its train ids as
``%06d_sem.png`` (8 bit, 255 = ignore) and its size as ``%06d.json``. This is optional, because the
official files can be read, too; keep them, because only they have instances. Existing files are
kept, so that the next run continues an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import _checkout  # noqa: F401 - finds the package of this checkout

from ttt_video_cli.arguments import ToolParser, answer_first


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser of the tool's flags."""
    parser = ToolParser(description="KITTI-STEP's labels in the authors' layout.")
    parser.add_argument(
        "--root", type=Path, help="KITTI-STEP's folder (default $DETECTRON2_DATASETS/kitti_step)"
    )
    return parser


answer_first(__name__, argument_parser().parse_args)

import numpy as np

from ttt_video.cli import run_tool
from ttt_video.data.catalog import datasets_root
from ttt_video.data.cityscapes import CITYSCAPES_CLASSES, IGNORE_LABEL
from ttt_video.data.preparation import convert_files
from ttt_video.errors import UserError
from ttt_video.files import write_atomically
from ttt_video.formats.images import write_png
from ttt_video.formats.labels import read_segment_colors


def outputs(panoptic_file: Path) -> tuple[Path, Path]:
    """Returns the files for the size and the train ids of an RGB map."""
    stem = panoptic_file.stem
    return panoptic_file.with_name(f"{stem}.json"), panoptic_file.with_name(f"{stem}_sem.png")


def convert(panoptic_file: Path) -> None:
    """Writes size and train ids of one RGB map."""
    pixels = read_segment_colors(panoptic_file)
    sem_seg = np.ascontiguousarray(pixels[..., 0])
    wrong = np.unique(sem_seg[(sem_seg >= len(CITYSCAPES_CLASSES)) & (sem_seg != IGNORE_LABEL)])
    if wrong.size:
        raise UserError(f"{panoptic_file}: red value {wrong[0]} is not a class of 0-18, nor 255")
    size_file, sem_seg_file = outputs(panoptic_file)
    size = json.dumps({"imgHeight": pixels.shape[0], "imgWidth": pixels.shape[1]})
    write_atomically(size_file, lambda part: part.write_text(size))
    write_png(sem_seg_file, sem_seg)


def main(argv: list[str] | None = None) -> None:
    """Runs the tool; ``argv`` defaults to the command line."""
    root = argument_parser().parse_args(argv).root or datasets_root() / "kitti_step"
    maps = (root / "panoptic_maps").glob("[!.]*/[!.]*/[0-9]*.png")
    found = sorted(file for file in maps if not file.stem.endswith("_sem"))
    if not found:
        raise UserError(
            f"{root}/panoptic_maps holds no RGB map <split>/<seq>/%06d.png: unpack "
            "kitti-step.tar.gz there, or name the folder with --root"
        )
    todo = [file for file in found if not all(output.exists() for output in outputs(file))]
    convert_files(todo, convert, "train ids")
    print(f"{len(found)} maps have train ids and sizes, {len(todo)} of them new")


if __name__ == "__main__":
    run_tool(main)
