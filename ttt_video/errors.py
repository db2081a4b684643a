"""The one exception that stands for a mistake the user can mend."""

from __future__ import annotations

import importlib.util


class UserError(Exception):
    """Bad input: one clear line with the offending value and the fix.

    Tools print it as ``error: <message>`` and exit with code 2, without a traceback
    (:func:`ttt_video.cli.run_tool`). Anything else that escapes is a defect of ours.
    """


def error_of_process(text: str) -> UserError | None:
    """The :class:`UserError` that ended another process, from the traceback it sent as text.

    None if it was any other error: that traceback is worth reading.
    """
    last = text.strip().rpartition("\n")[2]
    name, _, message = last.partition(": ")
    return UserError(message) if name == f"{UserError.__module__}.{UserError.__name__}" else None


def require(module: str, package: str, purpose: str) -> None:
    """Raises UserError, with the command that installs it, where an optional library is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs {module}, which is missing: pip install {package}")
