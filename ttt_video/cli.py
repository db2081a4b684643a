"""What every command shares: the config that its flags ask for, and failing in one line."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from detectron2.config import CfgNode

from .config import check_device, load_config
from .errors import UserError
from .plugins import run_files
from .processes import (
    drop_broken_streams,
    end_with_parent,
    keep_freed_memory,
    kill_helpers,
    open_closed_streams,
    signals_interrupt,
)

SMALLER = (
    "try smaller frames (INPUT.MIN_SIZE_TEST), TTT.CHECKPOINT True, TTT.PRECISION bf16, fewer "
    "--workers on a GPU, or MODEL.DEVICE cpu"
)
"""What a user may do where a GPU's memory is full. A step that is too large says more itself."""


def config_of(args: argparse.Namespace, method: str | None = None) -> CfgNode:
    """Runs the files of ``--register`` and loads the config that a tool's flags ask for."""
    run_files(args.register)
    cfg = load_config(
        args.config_file,
        args.preset,
        args.opts,
        method=method,
        allow_unsafe_yaml=args.allow_unsafe_yaml,
    )
    weights: str | None = getattr(args, "weights", None)
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    check_device(cfg.MODEL.DEVICE)
    return cfg


def run_tool(main: Callable[[], None], *, keeps_memory: bool = True) -> None:
    """Runs a tool's ``main`` and ends the process as a command does.

    A :class:`UserError`, or a GPU that is full, becomes one line on stderr and exit code 2. Ctrl-C,
    SIGTERM and SIGHUP stop ``main`` as an exception does, so that it keeps what there is; the exit
    code is 128 and the signal's number. So it is, with SIGPIPE's, where nobody reads what is
    printed any more.

    ``keeps_memory`` False leaves the allocator as other programs have it.
    """
    open_closed_streams()
    end_with_parent()
    if keeps_memory:
        keep_freed_memory()
    logging.raiseExceptions = False  # a log that nobody reads any more stops nothing
    code, line = 0, ""
    try:
        with signals_interrupt():
            main()
    except UserError as error:
        code, line = 2, f"error: {error}"
    except KeyboardInterrupt as error:
        kill_helpers()
        code = getattr(error, "exit_code", 128 + signal.SIGINT)
        line = "interrupted" + (f" by {error}" if code != 128 + signal.SIGINT else "")
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        code, line = 2, f"error: {reason}; {SMALLER}"
    except SystemExit:
        drop_broken_streams()
        raise
    if line:
        with suppress(BrokenPipeError):
            print(line, file=sys.stderr)
    if drop_broken_streams():
        code = code or 128 + signal.SIGPIPE
    if code:
        sys.exit(code)
