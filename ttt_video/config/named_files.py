"""Finds the files that a config names, and tells whether their content is still the same."""

from __future__ import annotations

import hashlib
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..errors import UserError, suggestion
from ..shipped import config_dir
from .keys import AUTO, KEYS

_PROFILE = "TTT.CLOCK.PROFILE"


def find_profile(name: str) -> Path:
    """Returns the file of a path, or of a shipped profile's name.

    Raises:
        UserError: there is none.
    """
    folder = config_dir() / "profiles"
    for candidate in (Path(name), folder / name, folder / f"{name}.json"):
        if candidate.is_file():
            return candidate
    known = sorted(file.stem for file in folder.glob("*.json"))
    raise UserError(f"no profile {name!r}; {suggestion(name, known, 'give a file or one of: ')}")


def file_digests(cfg: CfgNode) -> dict[str, str]:
    """Returns the SHA-256 of each file that a key of this project names, by key.

    Results depend on the content, which may change under one name. ``MODEL.WEIGHTS`` is a key of
    detectron2 and not among them; see :func:`digest_of`. A config that is older than a key's
    declaration lacks it.

    Raises:
        UserError: there is no such profile.
    """
    digests = {}
    for key in (name for name, own in KEYS.items() if own.file):
        value: Any = reduce(lambda node, part: node.get(part, {}), key.split("."), cfg)
        if value and value != AUTO:
            digests[key] = digest_of(str(find_profile(value)) if key == _PROFILE else value)
    return digests


def digest_of(name: str) -> str:
    """Returns the SHA-256 of a file's bytes; "" for a folder and for what does not exist."""
    path = Path(PathManager.get_local_path(name))
    if not path.is_file():
        return ""
    about = path.stat()
    return _digest(path, about.st_mtime_ns, about.st_size)


@lru_cache
def _digest(path: Path, changed: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
