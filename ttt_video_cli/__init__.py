"""The commands of ``ttt-video``: their flags, and what each does with them.

``import ttt_video`` takes seconds, because it loads torch and detectron2 to register names in them.
This package loads neither: a command's module builds its parser with ``argument_parser(prog)``, and
its ``run(args)`` imports ``ttt_video`` once the arguments are known to be right.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from .arguments import ToolParser, silence_other_libraries

COMMANDS = {
    "stream": "stream videos through a model that learns from them",
    "live": "watch a stream on a web page while it learns, and steer it",
    "train": "train a model on still images, or evaluate it",
    "sweep": "run a grid of methods, settings, videos and seeds",
    "table": "put runs into one table",
    "plot": "draw runs",
    "locality": "measure how gradients drift along labelled videos",
    "steps": "show what gradient steps on one labelled frame do",
    "world": "make labelled videos or stills of the street world",
    "check": "say whether a data set is complete and right",
    "weights convert": "convert weights to another format, or describe them",
    "weights export": "write a model's prediction as ONNX or torch.export program",
    "weights norms": "measure the statistics that ln_adapt needs",
    "weights gradients": "measure how large a method's gradients are on training images",
    "weights colors": "count the colours of training images, for colorization",
}
"""Each command with what it does. ``weights norms`` is in ``weights_norms.py``."""

_GET_DETECTRON2 = (
    "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git "
    "(that takes a C++ compiler)"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``ttt-video COMMAND ...``, and ends the process as a command does.

    Args:
        argv: what follows ``ttt-video``; None: what the command line has.
    """
    words = sys.argv[1:] if argv is None else [*argv]
    name, choices = "", COMMANDS
    while name not in COMMANDS:
        name = f"{name} {_first_word(f'ttt-video {name}', choices, words)}".strip()
        words = words[1:]
        group = [full for full in COMMANDS if full.startswith(f"{name} ")]
        choices = {full.removeprefix(f"{name} "): COMMANDS[full] for full in group}
    start(name, words, f"ttt-video {name}")


def start(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs a command, and ends the process with one line and an exit code if it fails.

    Args:
        name: one of ``COMMANDS``.
        argv: its arguments; None: those of the command line.
        prog: what its help calls it; None: the name of the running script.
    """
    args = _module(name).argument_parser(prog).parse(argv)
    if find_spec("detectron2") is None:  # the one requirement that pip did not bring
        print(f"error: detectron2 is missing: {_GET_DETECTRON2}", file=sys.stderr)
        sys.exit(2)
    silence_other_libraries()
    from ttt_video.cli import run_tool

    run_tool(partial(_module(name).run, args))


def call(name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command within a program: as :func:`start`, but a mistake is raised.

    Raises:
        UserError: the command cannot do what it is asked for.
    """
    _module(name).run(_module(name).argument_parser().parse(argv))


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name.replace(' ', '_')}")


def _first_word(prog: str, choices: Mapping[str, str], words: Sequence[str]) -> str:
    """Returns the first of the words, which begins one of the choices; answers all others.

    Without a word it prints the help, and ends with exit code 2 as for any other mistake.
    """
    lines = [f"  {name:19}{text}" for name, text in choices.items()]
    parser = ToolParser(prog.strip(), "\n".join(["commands:", *lines]))
    known = list(dict.fromkeys(name.split()[0] for name in choices))
    parser.add_argument("word", metavar="COMMAND ...", help="its --help lists its flags")
    if not prog.rpartition("ttt-video")[2].strip():
        parser.add_argument("--version", action="version", version=_version(), help="print it")
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    word = str(parser.parse_args(words[:1]).word)
    if word not in known:
        close = difflib.get_close_matches(word, known, n=1)
        hint = f"did you mean {close[0]}" if close else f"choose from {', '.join(known)}"
        parser.error(f"no command {word!r}: {hint}")
    return word


def _version() -> str:
    """Returns the version without importing ``ttt_video``, which takes seconds."""
    text = (Path(__file__).parents[1] / "ttt_video" / "version.py").read_text(encoding="utf-8")
    return "ttt-video " + re.findall(r'__version__ = "(.+)"', text)[0]
