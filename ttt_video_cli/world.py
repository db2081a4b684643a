"""Makes labelled videos or stills of the procedural street world, in real data sets' layouts.

%(prog)s --seed 2000 --videos 2 --corruption fog --schedule ramp --output datasets/world_fog
%(prog)s --layout coco_videos --frames 200 --output datasets/coco_videos
%(prog)s --layout cityscapes --train 200 --val 20 --output datasets/cityscapes

Video k shows world seed + k. Stills for training are of the worlds 0-999, for validation of the
worlds 1000-1999. What files there are is told in docs/world.md. A run that was cut off continues
where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from .arguments import SCENES, SCHEDULES, SPLITS, VIDEO_LAYOUTS, ToolParser

STILL_LAYOUTS = ("cityscapes", "coco")
VIDEO_DEFAULTS = {"seed": 2000, "videos": 1, "frames": 100}
STILL_DEFAULTS = {"train": 200, "val": 20}
LEAST = {"seed": 0, "height": 16, "width": 16}
LEAST |= dict.fromkeys(("videos", "frames", "train", "val", "zoom"), 1)


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = ToolParser(prog, __doc__)
    choices = (*VIDEO_LAYOUTS, *STILL_LAYOUTS)
    parser.add_argument("--layout", choices=choices, default=choices[0], help="of the files")
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=256, help="pixels")
    parser.add_argument(
        "--zoom", type=float, default=1.0, help="how many times as long the lens is (1)"
    )
    parser.add_argument("--output", type=Path, required=True, help="the data set's folder")
    videos = parser.add_argument_group(f"videos ({', '.join(VIDEO_LAYOUTS)})")
    videos.add_argument("--seed", type=int, help="world of the first video (2000)")
    videos.add_argument("--videos", type=int, help="how many videos, seeds in a row (1)")
    videos.add_argument("--frames", type=int, help="frames per video, 10 a second (100)")
    videos.add_argument(
        "--scenes",
        nargs="+",
        default=["street"],
        metavar="SCENE",
        help=f"what the street leads through, in turn, 8 s each: {', '.join(SCENES)}",
    )
    videos.add_argument(
        "--districts",
        action="store_true",
        help="lead the street through districts, with changing weather, in place of scenes",
    )
    videos.add_argument("--names", nargs="+", help="folders of the videos (0000 or world2000 on)")
    videos.add_argument(
        "--corruption",
        nargs="+",
        default=["none"],
        metavar="NAME",
        help="fog, darkness, motion_blur and others, which docs/world.md lists; or all families of "
        f"a split: {', '.join(SPLITS)}",
    )
    videos.add_argument(
        "--each",
        type=int,
        metavar="N",
        help="corruptions of each video: they are dealt out, the next N to the next video (all)",
    )
    videos.add_argument("--severity", type=float, default=3.0, help="from 0 to 5")
    videos.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=SCHEDULES[0],
        help="let the severity grow from 0 (ramp), or corruptions take turns (switch), with the "
        "clean video before and after each (return)",
    )
    videos.add_argument(
        "--rgb-labels", action="store_true", help="kitti_step: the official RGB label maps too"
    )
    stills = parser.add_argument_group(f"stills ({', '.join(STILL_LAYOUTS)})")
    stills.add_argument("--train", type=int, help="how many for training (200)")
    stills.add_argument("--val", type=int, help="how many for validation (20)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Fills in what was left out; UserError where a value makes no sense for the layout."""
    from ttt_video.errors import UserError
    from ttt_video.world.shifts import video_shift
    from ttt_video.world.style import Route

    is_video = args.layout in VIDEO_LAYOUTS
    ours, others = VIDEO_DEFAULTS, STILL_DEFAULTS
    if not is_video:
        ours, others = others, ours
    strange = [name for name in others if getattr(args, name) is not None]
    if not is_video and args.corruption != ["none"]:
        strange.append("corruption")
    if not is_video and args.each is not None:
        strange.append("each")
    if not is_video and args.names:
        strange.append("names")
    if not is_video and args.scenes != ["street"]:
        strange.append("scenes")
    if args.districts and not is_video:
        strange.append("districts")
    if args.rgb_labels and args.layout != "kitti_step":
        strange.append("rgb-labels")
    if strange:
        raise UserError(f"--{strange[0]} does not go with --layout {args.layout}")
    for name, value in ours.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            number = "finite" if value > least else f"at least {least}"
            raise UserError(f"--{name} is {value}; it must be {number}")
    if args.districts and args.scenes != ["street"]:
        raise UserError("--scenes does not go with --districts, which have scenes of their own")
    Route(tuple(args.scenes))  # refuses what makes no sense
    shift = (args.corruption, args.each, args.severity, args.schedule)
    args.shifts = [video_shift(*shift, k) for k in range(args.videos if is_video else 0)]
    if args.names and len(set(args.names)) != args.videos:
        raise UserError(f"--names gives {len(set(args.names))} names, --videos is {args.videos}")
    if any(Path(name).name != name or name in ("", "..") for name in args.names or ()):
        raise UserError(f"--names {' '.join(args.names)}: a name is that of a folder, not a path")


def claim(output: Path, settings: dict[str, object]) -> None:
    """Notes the settings in the output folder, or makes sure that they are the ones noted there.

    Raises:
        UserError: the folder cannot be used, or holds files of other settings.
    """
    from ttt_video.errors import UserError
    from ttt_video.files import write_atomically

    note = output / "world.json"
    try:
        if note.exists():
            if json.loads(note.read_text()) != settings:
                raise UserError(
                    f"{output} was made with other settings (see {note}); "
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


def write_videos(args: argparse.Namespace) -> None:
    """Writes the videos, one after another."""
    from ttt_video.world import WorldVideo, layouts
    from ttt_video.world.shifts import ShiftedVideo

    look = {"districts": args.districts, "zoom": args.zoom}
    for k in range(args.videos):
        seed = args.seed + k
        size = args.height, args.width
        world = WorldVideo(seed, args.frames, *size, args.scenes, **look)
        video = ShiftedVideo(world, args.shifts[k])
        if args.layout == "kitti_step":
            name = args.names[k] if args.names else f"{k:04d}"
            layouts.write_kitti_step(args.output, "val", name, video, args.rgb_labels)
        else:
            name = args.names[k] if args.names else f"world{seed}"
            layouts.write_coco_videos(args.output, name, video)


def write_stills(args: argparse.Namespace) -> None:
    """Writes the stills of both splits."""
    from ttt_video.world import WorldStills, layouts

    for split in ("train", "val"):
        size = args.height, args.width
        stills = WorldStills(split, getattr(args, split), *size, zoom=args.zoom)
        if args.layout == "coco":
            layouts.write_coco(args.output, split, stills)
        else:
            layouts.write_cityscapes(args.output, split, f"world{split}", stills)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, claims the folder, writes."""
    from ttt_video.errors import UserError
    from ttt_video.files import path_text
    from ttt_video.world import DISTRICTS_VERSION, WORLD_VERSION

    check_arguments(args)
    later = ("districts", "zoom")  # folders that were made before there were these stay valid
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "shifts", *later)}
    if args.districts:
        settings["districts_version"] = DISTRICTS_VERSION
    if args.zoom != 1.0:
        settings["zoom"] = args.zoom
    claim(args.output, {"world_version": WORLD_VERSION, **settings})
    try:
        (write_videos if args.layout in VIDEO_LAYOUTS else write_stills)(args)
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"written to {path_text(args.output)}")
