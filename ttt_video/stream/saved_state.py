"""Reads the saved state of a video, unless it is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..modeling.weights import read_file

STATE_KEYS = {"frames", "frame_index", "skipped", "stream", "sinks"}


class UnusableState(Exception):
    """Says why a video cannot go on from a saved state."""


def read_state(file: Path) -> dict[str, Any]:
    """Returns the state that :func:`ttt_video.files.save_torch` wrote.

    Raises:
        UnusableState: it is damaged.
    """
    try:
        state = read_file(str(file))
    except OSError as error:
        raise UnusableState(f"{file} cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UnusableState(f"{file} is damaged") from error
    if isinstance(state, dict) and state.keys() >= STATE_KEYS:
        return state
    raise UnusableState(f"{file} is not the state of such a run")
