"""Finds the package of this checkout, installed or not, for the scripts that import this."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_found = find_spec("ttt_video_cli")
if _found is None or not Path(str(_found.origin)).is_relative_to(ROOT):
    sys.path.insert(0, str(ROOT))

from ttt_video_cli import call, start

__all__ = ["call", "start"]
