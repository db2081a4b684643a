#!/usr/bin/env python3
"""Make labelled videos of the procedural street world, in KITTI-STEP's layout.

python tools/make_world.py --seed 2000 --videos 2 --frames 100 --corruption fog --severity 4 \
    --ramp --output datasets/world_fog

writes ``images/val/<seq>/%06d.png``, ``panoptic_maps/val/<seq>/%06d_sem.png`` (Cityscapes train
ids) and ``%06d.json``; sequence k shows world seed + k. A run that was cut off continues where it
stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ttt_video.cli import run_tool
from ttt_video.data.kitti_step import write_atomically, write_video
from ttt_video.data.world import WORLD_VERSION, WorldVideo
from ttt_video.data.world.corruptions import CORRUPTIONS, check_corruption, corrupt, severity_at
from ttt_video.errors import UserError


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line; UserError where a value makes no sense."""
    parser = argparse.ArgumentParser(
        description="Make labelled videos of the procedural street world in KITTI-STEP's layout."
    )
    parser.add_argument("--seed", type=int, default=2000, help="world of the first video")
    parser.add_argument("--videos", type=int, default=1, help="how many videos, seeds in a row")
    parser.add_argument("--frames", type=int, default=100, help="frames per video, 10 a second")
    parser.add_argument("--corruption", default="none", help=", ".join(CORRUPTIONS))
    parser.add_argument("--severity", type=float, default=3.0, help="from 0 to 5")
    parser.add_argument("--ramp", action="store_true", help="let the severity grow from 0")
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=256, help="pixels")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    for option, least in {"seed": 0, "videos": 1, "frames": 1, "height": 16, "width": 16}.items():
        if getattr(args, option) < least:
            raise UserError(f"--{option} is {getattr(args, option)}; it must be at least {least}")
    check_corruption(args.corruption, args.severity)
    return args


def claim(output: Path, settings: dict[str, object]) -> None:
    """Note the settings in the output folder, or make sure they are the ones noted there.

    Raises:
        UserError: the folder cannot be used, or holds videos of other settings.
    """
    note = output / "world.json"
    try:
        if note.exists():
            if json.loads(note.read_text()) != settings:
                raise UserError(
                    f"{output} holds videos with other settings (see {note}); "
                    "choose another --output or remove it"
                )
            return
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise UserError(f"{output} holds something else already; choose another --output")
        text = json.dumps(settings, indent=1) + "\n"
        write_atomically(note, lambda part: part.write_text(text))
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{note} is damaged; remove {output} and run again") from error


def main(argv: list[str] | None = None) -> None:
    """The tool; ``argv`` defaults to the command line."""
    args = parse_arguments(argv)
    settings = {k: v for k, v in vars(args).items() if k != "output"}
    claim(args.output, {"world_version": WORLD_VERSION, **settings})

    def render(video: WorldVideo, index: int) -> tuple[np.ndarray, np.ndarray]:
        frame = video[index]
        severity = severity_at(args.severity, index, args.frames, args.ramp)
        image = corrupt(
            frame.image, args.corruption, severity, video.seed, index, depth=frame.depth
        )
        return image, frame.sem_seg

    for k in range(args.videos):
        video = WorldVideo(args.seed + k, args.frames, args.height, args.width)
        write_video(
            args.output / "images" / "val",
            args.output / "panoptic_maps" / "val",
            f"{k:04d}",
            tqdm(
                [functools.partial(render, video, t) for t in range(args.frames)],
                desc=f"world {video.seed}",
                unit="frame",
            ),
        )


if __name__ == "__main__":
    run_tool(main)
