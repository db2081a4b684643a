"""Copies the folders of runs, and compares them."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path


def timeless(value):
    """JSON without what a clock or the memory of the process decides."""
    if isinstance(value, dict):
        measured = ("seconds", "peak_memory_mib")
        return {
            k: timeless(v) for k, v in value.items()
            if k not in measured and not k.endswith("_seconds")
        }  # fmt: skip
    return value


def content(folder: Path) -> dict[str, object]:
    """Every file of a finished run, times aside."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if file.name == "frames.jsonl":
            found[file.name] = [timeless(json.loads(line)) for line in file.open()]
        elif file.suffix == ".json":
            found[file.name] = timeless(json.loads(file.read_text()))
        else:
            found[str(file.relative_to(folder))] = file.read_bytes() if file.is_file() else None
    return found


def copy_running(folder: Path, copy: Path) -> None:
    """Copies what a run has written so far, as a kill would leave it.

    A file that a thread of the run renames meanwhile is left out, as if it had not been begun.
    """

    def copied(source: object, target: object) -> None:
        with suppress(FileNotFoundError):
            shutil.copyfile(source, target)

    shutil.copytree(folder, copy, copy_function=copied)
