"""The environment of Python processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python_path(first: Path = ROOT) -> str:
    """Returns a PYTHONPATH that finds the package in ``first``, and libraries where we find them.

    Libraries may be reached by this process's own PYTHONPATH alone, so a new one must keep it.
    """
    return os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))


def stand_in(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets the cells of a sweep run ``code`` for ``python -m ttt_video``; returns its file.

    Cells find the modules that this process finds, and this one finds the stand-in first.
    """
    package = folder / "stand_in" / "ttt_video"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    return package / "__main__.py"
