"""The saved state of a video, read back only if not a bit of it has changed."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

STATE_KEYS = {"frames", "frame_index", "skipped", "rows", "overlay", "runner", "evaluators"}

_DAMAGE = (
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, NotImplementedError,
    RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError,
)  # fmt: skip
"""What zipfile and torch.load raise on a file of which bits have changed."""


class UnusableState(Exception):
    """A saved state that a video cannot go on from, and why."""


def read_state(file: Path) -> dict[str, Any]:
    """Returns what :func:`ttt_video.files.save_torch` wrote.

    Raises:
        UnusableState: it is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # PyTorch itself compares no checksums
            damaged = archive.testzip()
        if damaged is None:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(state, dict) and state.keys() >= STATE_KEYS:
                return state
            raise UnusableState(f"{file} is not the state of such a run")
    except OSError as error:
        raise UnusableState(f"{file} cannot be read ({error.strerror})") from error
    except _DAMAGE as error:
        raise UnusableState(f"{file} is damaged") from error
    raise UnusableState(f"{file} is damaged")
