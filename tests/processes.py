"""The environment of Python processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_path(first: Path = ROOT) -> str:
    """Returns a PYTHONPATH that finds the package in ``first``, and libraries where we find them.

    Libraries may be reached by this process's own PYTHONPATH alone, so a new one must keep it.
    """
    return os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))
