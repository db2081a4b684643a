"""Shows a stream on a web page while the model learns from it, and takes what you click.

%(prog)s --camera 0
%(prog)s --video street.mp4 --port 8080
%(prog)s --source rtsp://host/stream --latest
%(prog)s --world
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import ToolParser, add_config_arguments, method_names
from .stream import choose_config

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from ttt_video.formats.images import FrameTransform
    from ttt_video.structures import FrameSource

LOCAL = "127.0.0.1"
SHORTEST_TOKEN = 8


class LiveParser(ToolParser):
    """Asks for a video, and for a token where other machines may look."""

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses the arguments and checks them together."""
        args = super().parse(argv)
        names = ("video_dir", "video", "camera", "source")
        if not args.world and all(getattr(args, name) is None for name in names):
            self.error(
                "no video: give --camera N, --source URL, --video FILE, --video-dir DIR or --world"
            )
        if args.latest and args.camera is None and args.source is None:
            self.error("--latest is for --camera and --source")
        if not 0 <= args.port <= 65535:
            self.error(f"--port is {args.port}; give 1 to 65535, or 0 for a free one")
        if args.host is not None and args.token is None:
            self.error(
                f"--host {args.host} lets other machines steer the stream: give --token, too"
            )
        if args.token is not None and not (
            len(args.token) >= SHORTEST_TOKEN and args.token.isascii() and args.token.isalnum()
        ):
            self.error(f"--token takes at least {SHORTEST_TOKEN} letters and digits, nothing else")
        return args


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = LiveParser(prog, __doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--camera", metavar="N", help="a camera of this machine, such as 0")
    source.add_argument("--source", metavar="URL", help="a network stream")
    source.add_argument("--video", metavar="FILE", help="a video file")
    source.add_argument("--video-dir", metavar="DIR", help="a folder of frames, or of such folders")
    source.add_argument("--world", action="store_true", help="the built-in street, as a camera")
    parser.add_argument(
        "--latest", action="store_true", help="drop what a live source sends while the model works"
    )
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="of the page (8080)")
    parser.add_argument(
        "--host",
        metavar="NAME",
        help=f"where others reach it; default: {LOCAL}, this machine alone",
    )
    parser.add_argument("--token", metavar="WORD", help="what a browser has to know")
    parser.add_argument("--weights", metavar="FILE", help="source weights; overrides MODEL.WEIGHTS")
    parser.add_argument(
        "--method", metavar="NAME", help="adaptation method: " + ", ".join(method_names())
    )
    parser.add_argument(
        "--output", metavar="DIR", help="of what is saved; default: output/live/<date-time>"
    )
    add_config_arguments(parser)
    return parser


def open_sources(args: argparse.Namespace, transform: FrameTransform) -> list[FrameSource]:
    """The videos that the flags name.

    Raises:
        UserError: there is no such video, or they are several live sources.
    """
    from ttt_video.data.sources import open_folder, open_live, open_video
    from ttt_video.errors import UserError
    from ttt_video.live import WorldCamera

    if args.world:
        return [WorldCamera(transform)]
    if args.video_dir is not None:
        return open_folder(args.video_dir, transform)
    if args.video is not None:
        return open_video(args.video, transform)
    sources = open_live(
        args.source if args.camera is None else args.camera, transform, latest=args.latest
    )
    if len(sources) > 1:
        raise UserError(
            f"{args.source} names {len(sources)} sources; a page shows one: give its URL to "
            "--source, and start a ttt-video live with another --port for each of the others"
        )
    return sources


def config_of_method(args: argparse.Namespace, cfg: CfgNode, method: str | None) -> CfgNode:
    """Returns the config that the flags ask for, with another method if one is named."""
    from ttt_video.config import load_config
    from ttt_video.config.loading import key_values

    if method is None:
        return cfg
    opts = [w for pair in key_values(args.opts).items() if pair[0] != "TTT.METHOD" for w in pair]
    other = load_config(
        args.config_file,
        args.preset,
        opts,
        method=method,
        allow_unsafe_yaml=args.allow_unsafe_yaml,
    )
    other.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS
    other.freeze()
    return other


def run(args: argparse.Namespace) -> None:
    """Checks, builds, serves."""
    from ttt_video.adaptation import find_method
    from ttt_video.cli import config_of
    from ttt_video.data.grey import open_videos
    from ttt_video.live import Player
    from ttt_video.live.server import serve
    from ttt_video.stream import load_source_model

    choose_config(args)
    args.method = args.method or _default_method(args)
    cfg = config_of(args, args.method)
    find_method(cfg.TTT.METHOD)
    cfg.freeze()
    sources = open_videos(cfg, partial(open_sources, args))
    folder = args.output or Path("output/live") / datetime.now().strftime("%Y%m%d-%H%M%S")
    model = load_source_model(cfg)
    player = Player(partial(config_of_method, args, cfg), model, sources, Path(folder))
    host, token = args.host or LOCAL, args.token or ""
    try:
        asyncio.run(serve(player, host, args.port, token, _tell))
    finally:
        player.stop()


def _default_method(args: argparse.Namespace) -> str | None:
    """Returns learn_on_change where the config has its file for the weights and names no other.

    A preset, ``--weights`` and overrides of the method or of the weights are somebody's choice.
    """
    from ttt_video.cli import config_of
    from ttt_video.config.loading import key_values

    chosen = {"TTT.METHOD", "MODEL.WEIGHTS"} & key_values(args.opts).keys()
    if chosen or args.preset or args.weights:
        return None
    own = config_of(args, None).TTT
    ready = own.METHOD == "online_ttt_mae" and own.LEARN_ON_CHANGE.SOURCE_HEAD
    return "learn_on_change" if ready else None


def _tell(address: str) -> None:
    print(f"the page: {address} (Ctrl-C ends the stream)", flush=True)
