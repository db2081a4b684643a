"""Flags that several commands share, and the closed lists that their choices come from.

Nothing is imported here that takes long to load.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# Closed lists of ttt_video, which is not imported yet. A test holds them equal to its own.
PRESETS = ("paper", "release", "realtime")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PROTOCOLS = ("standard", "video", "release")
TABLE_LAYOUTS = ("table1", "table3", "table4", "plain", "images", "table2")
TABLE_FORMATS = ("markdown", "csv", "latex")
SCENES = ("street", "park", "tunnel")
SCHEDULES = ("constant", "ramp", "switch", "return")
SPLITS = ("validation", "more_validation", "test")
VIDEO_LAYOUTS = ("kitti_step", "coco_videos")

# How warnings of other libraries begin that a user can do nothing about, with their kinds.
OTHER_LIBRARIES: dict[str, type[Warning]] = {
    "`torch.jit.script` is deprecated": FutureWarning,
    "torch.meshgrid": UserWarning,
    "pkg_resources is deprecated as an API": UserWarning,
}


class ToolParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, as that of any other mistake is."""

    def __init__(self, prog: str | None = None, description: str | None = None) -> None:
        """Creates a parser.

        Args:
            prog: what the command is called in its help; None: the name of the running script.
            description: keeps its line breaks; ``%(prog)s`` stands for the command.
        """
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=raw)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses a command's arguments, ``sys.argv[1:]`` for None, and checks them together.

        A command with rules of its own overrides this.
        """
        return self.parse_args(argv)

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit code 2."""
        self.exit(2, f"error: {message}; {self.prog} --help lists what there is\n")


def silence_other_libraries() -> None:
    """Silences ``OTHER_LIBRARIES``, in this process and in those that it starts."""
    options = os.environ.get("PYTHONWARNINGS", "").split(",")
    for start, kind in OTHER_LIBRARIES.items():
        warnings.filterwarnings("ignore", re.escape(start), kind)
        option = f"ignore:{start}:{kind.__name__}"
        # Of several that match Python takes the last: the user's own.
        options = [option, *(other for other in options if other not in ("", option))]
    os.environ["PYTHONWARNINGS"] = ",".join(options)


def answer_first(name: str, parse: Callable[[], argparse.Namespace]) -> None:
    """Answers ``--help`` and wrong arguments before a script imports what takes seconds.

    It is for the scripts that are no command; :func:`ttt_video_cli.start` does it for commands.

    Args:
        name: ``__name__`` of the script; nothing happens unless it is what Python runs.
        parse: parses ``sys.argv``, as the script's ``main`` does again.
    """
    if name == "__main__":
        parse()
        silence_other_libraries()


def method_names() -> list[str]:
    """Returns the names of the adaptation methods that ship."""
    root = Path(__file__).resolve().parents[1]
    packed = root / "ttt_video" / "configs"  # of an installed package; in a checkout beside it
    folder = packed if packed.is_dir() else root / "configs"
    text = (folder / "methods.yaml").read_text(encoding="utf-8")
    return sorted(re.findall(r"^(\w+):", text, re.MULTILINE))


class _WithoutOutputDir(argparse.Action):
    """Keeps KEY VALUE overrides; refuses the key that a command with ``--output`` never reads."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        """Is called with all words."""
        given = dict(itertools.zip_longest(values[::2], values[1::2], fillvalue="PATH"))
        if "OUTPUT_DIR" in given:
            parser.error(f"OUTPUT_DIR is for training; say --output {given['OUTPUT_DIR']}")
        setattr(namespace, self.dest, values)


def add_override_arguments(
    parser: argparse.ArgumentParser, help: str, *, last: bool = True, trains: bool = False
) -> None:
    """Adds detectron2's ``KEY VALUE`` overrides.

    Args:
        parser: the command's.
        help: what they are there.
        last: whether all words from the first on belong to them.
        trains: whether the command writes to ``OUTPUT_DIR``, and so takes this key, too.
    """
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER if last else "*",
        default=[],  # without one "*" is asked for where another argument is missing
        metavar="KEY VALUE",
        help=help,
        action="store" if trains else _WithoutOutputDir,
    )


def add_config_arguments(parser: argparse.ArgumentParser, *, trains: bool = False) -> None:
    """Adds ``--config``, ``--preset`` and detectron2's trailing ``KEY VALUE`` overrides.

    ``trains`` is that of :func:`add_override_arguments`.
    """
    parser.add_argument(
        "--config",
        "--config-file",
        dest="config_file",
        metavar="FILE",
        help="config file, or the name of one under configs/",
    )
    add_merge_arguments(parser)
    add_override_arguments(parser, "config overrides, last", trains=trains)


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--weights``, which ``ttt_video.cli.config_of`` puts into the config."""
    parser.add_argument("--weights", metavar="FILE", help="overrides MODEL.WEIGHTS")


def add_measured_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that measure something on training images: for `measured_on`."""
    parser.add_argument("--output", required=True, metavar="FILE.safetensors")
    parser.add_argument("--dataset", metavar="NAME", help="default: those of DATASETS.TRAIN")


def measured_on(args: argparse.Namespace, cfg: CfgNode) -> tuple[list[str], str]:
    """Returns the data sets whose images are measured, and their names in one text."""
    names = [args.dataset] if args.dataset else [*cfg.DATASETS.TRAIN]
    return names, " + ".join(names)


def add_labelled_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that look at labelled videos and write a folder of their own."""
    parser.add_argument("--dataset", required=True, metavar="NAME", help="labelled videos")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    add_weights_argument(parser)


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
    """Adds ``--register``, whose files ``ttt_video.plugins.run_files`` runs."""
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file to run first, such as one that registers your own data sets",
    )
