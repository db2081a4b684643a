"""The exception for mistakes that the user can mend, and how errors pass on."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class UserError(Exception):
    """Bad input; the message is one line with the offending value and the fix.

    Tools print it as ``error: <message>`` and exit with code 2, without a traceback
    (:func:`ttt_video.cli.run_tool`). Any other exception that escapes is our bug.
    """


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Returns the names that a misspelt or shortened one may mean, the likeliest first."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.9)  # a letter or two
    close = close or difflib.get_close_matches(name, known, n=3)
    if not close and name:
        close = [full for full in known if name.lower() in full.lower()][:5]
    return close


def suggestion(name: str, known: Iterable[str], otherwise: str = "choose one of: ") -> str:
    """Returns the end of an error line about an unknown name: "did you mean tent?".

    Args:
        name: what the user wrote.
        known: what there is.
        otherwise: stands before the whole list, which is returned if no name is like this one.
    """
    known = list(known)
    close = nearest(name, known)
    return f"did you mean {' or '.join(close)}?" if close else otherwise + ", ".join(known)


def counted(number: int, noun: str) -> str:
    """Returns "1 frame", "2 frames", "1,000 frames"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def error_of_process(text: str) -> UserError | None:
    """Returns the :class:`UserError` that a traceback of another process ends with.

    Returns None for any other error, because that traceback is worth reading.
    """
    last = text.strip().rpartition("\n")[2]
    name, _, message = last.partition(": ")
    return UserError(message) if name == f"{UserError.__module__}.{UserError.__name__}" else None


@contextmanager
def ending_with(*endings: Callable[[], object]) -> Iterator[None]:
    """Calls all ``endings`` after the block, even if the block or one of them fails.

    The first error is raised, because later ones often follow from it: a full disk takes no summary
    either. A later :class:`UserError` is added to its line, any other one is logged. Ctrl-C while
    they are called stops the one that it meets and no other, and is raised before any error.
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
            elif error is first:  # a thread tells it whenever it is asked
                continue
            elif isinstance(first, UserError) and isinstance(error, UserError):
                if str(error) not in str(first):
                    first.args = (f"{first}; then: {error}",)
            else:
                _tell(error)
        except BaseException as interrupt:  # noqa: BLE001 - raised below
            if isinstance(first, Exception):
                _tell(first)
            if first is None or isinstance(first, Exception):
                first = interrupt
    if first is not None:
        raise first


def _tell(error: BaseException) -> None:
    logger.warning("%s: %s", type(error).__name__, " ".join(str(error).split()))


def require(module: str, package: str, purpose: str) -> Any:
    """Imports and returns an optional library.

    Raises:
        UserError: it cannot be imported; names ``purpose`` and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs {module}, which is missing: pip install {package} ({error})"
        ) from error
