"""What the tools' command lines share. Nothing is imported here that takes long to load.

The package registers names when it is imported, and needs torch and detectron2 for it: seconds. So
every tool builds its parser of what stands here, calls :func:`answer_first`, and only then imports
the package.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# Closed lists of the package, which is not imported yet. A test holds them equal to its own.
PRESETS = ("paper", "release", "realtime")
PRECISIONS = ("fp32", "bf16", "fp16")
PROTOCOLS = ("standard", "video", "release")
TABLE_LAYOUTS = ("table1", "table3", "table4", "plain")
TABLE_FORMATS = ("markdown", "csv", "latex")
SCENES = ("street", "park", "tunnel")
SCHEDULES = ("constant", "ramp", "switch")
SPLITS = ("validation", "test")
VIDEO_LAYOUTS = ("kitti_step", "coco_videos")

# How warnings of other libraries begin that a user can do nothing about, with their kinds.
OTHER_LIBRARIES: dict[str, type[Warning]] = {
    "`torch.jit.script` is deprecated": FutureWarning,
    "torch.meshgrid": UserWarning,
    "pkg_resources is deprecated as an API": UserWarning,
}


class ToolParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, as that of any other mistake is."""

    def error(self, message: str) -> NoReturn:
        """Ends the tool with exit code 2."""
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")


def answer_first(name: str, parse: Callable[[], argparse.Namespace]) -> None:
    """Answers ``--help`` and wrong arguments before the tool imports what takes seconds.

    Also silences ``OTHER_LIBRARIES``, in this process and in those that it starts.

    Args:
        name: ``__name__`` of the tool; nothing happens unless it is what Python runs.
        parse: parses ``sys.argv``, as the tool's ``main`` does again.
    """
    if name != "__main__":
        return
    parse()
    options = os.environ.get("PYTHONWARNINGS", "").split(",")
    for start, kind in OTHER_LIBRARIES.items():
        warnings.filterwarnings("ignore", re.escape(start), kind)
        option = f"ignore:{start}:{kind.__name__}"
        # Of several that match Python takes the last: the user's own.
        options = [option, *(other for other in options if other not in ("", option))]
    os.environ["PYTHONWARNINGS"] = ",".join(options)


def method_names() -> list[str]:
    """Returns the names of the adaptation methods that ship."""
    text = (CONFIGS / "methods.yaml").read_text(encoding="utf-8")
    return sorted(re.findall(r"^(\w+):", text, re.MULTILINE))


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config``, ``--preset`` and detectron2's trailing ``KEY VALUE`` overrides."""
    parser.add_argument(
        "--config",
        "--config-file",
        dest="config_file",
        metavar="FILE",
        help="config file, or the name of one under configs/",
    )
    add_merge_arguments(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, last"
    )


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--preset``, ``--allow-unsafe-yaml`` and ``--register``."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="settings to merge on top: the published ones, or much less work per frame",
    )
    add_register_argument(parser)
    parser.add_argument(
        "--allow-unsafe-yaml",
        action="store_true",
        help="let !!python/ tags in the config file run code, as in some of Mask2Former's configs",
    )


def add_register_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--register``, whose files ``ttt_video.cli.run_files`` runs."""
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file to run first, such as one that registers your own data sets",
    )
