"""The one exception that stands for a mistake the user can mend."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


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


@contextmanager
def ending_with(*endings: Callable[[], object]) -> Iterator[None]:
    """Calls every one of ``endings`` after the block, also when the block or one of them fails.

    The first error is the one that is raised, as later ones often follow from it: a full disk takes
    no summary either. What they say is added to its line if it is a :class:`UserError`.
    """
    first: BaseException | None = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - raised below; also Ctrl-C
        first = error
    for ending in endings:
        try:
            ending()
        except Exception as error:  # noqa: BLE001 - raised below, or told
            if first is None:
                first = error
            elif isinstance(first, UserError) and isinstance(error, UserError):
                if str(error) not in str(first):
                    first.args = (f"{first}; then: {error}",)
            else:
                logger.warning("%s: %s", type(error).__name__, " ".join(str(error).split()))
    if first is not None:
        raise first


def require(module: str, package: str, purpose: str) -> None:
    """Raises UserError, with the command that installs it, where an optional library is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs {module}, which is missing: pip install {package}")
