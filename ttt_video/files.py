"""Files that are whole or not there, whatever is killed; their names; reading them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError


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


def path_text(path: str | os.PathLike[str]) -> str:
    """Returns a path as text that every file, page and terminal takes.

    Bytes of a name that are no UTF-8, which Python keeps as lone surrogates, become ``\\xNN``.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def ffmpeg_name(path: str | os.PathLike[str]) -> str:
    """Returns the name by which FFmpeg opens a local file, which may contain colons.

    Without the prefix FFmpeg takes what stands before a colon for a protocol.
    """
    return f"file:{os.fsdecode(path)}"


def make_folder(folder: Path, name: str = "--output") -> None:
    """Makes a folder where it is missing.

    Raises:
        UserError: it cannot be made. ``name`` is the flag or key that names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be made: {error.strerror}") from error


def file_stem(video_id: str) -> str:
    """A name for a video's files: its id, or where that is no file name, a part and a hash of it.

    Different ids have different names.
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in video_id)[:60]
    if plain == video_id and plain.strip("."):
        return plain
    return f"{plain}-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Short names of different folders: the last part of each, or as many as tell them all apart.

    They may hold slashes; :func:`file_stem` makes names of files of them.
    """
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return []


def read_json_object(
    file: str | os.PathLike[str], *, hint: str = "", expected: str = ""
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read (``hint`` says where it should come from), or holds no object
            (``expected`` says what it should hold).
    """
    try:
        content = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}{hint}") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object{expected}")
    return content
