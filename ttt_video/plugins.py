"""Runs Python files of the user's own, which register what a run is to know (``--register``)."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError


def run_files(files: Sequence[str]) -> None:
    """Runs Python files, such as those that register data sets; once in every process.

    As for a script, the modules beside a file can be imported.

    Raises:
        UserError: a file cannot be read, or its code raises something: what, and in which line.
    """
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--register {file}: no such file")
        folder = str(Path(file).resolve().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            runpy.run_path(file)
        except Exception as error:
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = f"{name}{' '.join(str(error).split())}".removesuffix(": ")
            raise UserError(f"--register {_place(error, file, folder)}: {reason}") from error


def _place(error: Exception, file: str, folder: str) -> str:
    """The last line of the user's own that ran before the error, in the file or one beside it."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if str(Path(f.filename).resolve().parent) == folder]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else file
