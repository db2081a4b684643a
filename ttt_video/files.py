"""Files that are whole or not there, whatever is killed; and their names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file of its own beside ``path``, then move it there.

    A process that is killed leaves the old file or the new one, never a part of it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def file_stem(video_id: str) -> str:
    """A name for a video's files: its id, or where that is no file name, a part and a hash of it.

    Different ids have different names.
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in video_id)[:60]
    if plain == video_id and plain.strip("."):
        return plain
    return f"{plain}-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"
