"""What an adapted model's file says of itself, so that it needs no config beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ._weight_files import checkpoint_format, local_file

OWN_KEY = "ttt_video"
"""Of the header's metadata; its value is a JSON text."""


def read_header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns what ``--save-weights`` noted in a file; None where it is another one's.

    Returns:
        ``config`` (resolved, YAML), ``dataset`` and ``metadata`` (names and colours of the classes,
        as detectron2 calls them), ``source_sha256``, ``video_id``, ``frame_index`` and ``loss``.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = local_file(path)
    if checkpoint_format(file) != "safetensors":
        return None
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(OWN_KEY)
        content = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if content is None:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("config"), str):
        raise UserError(f"{path} has a header that is no adapted model's: give its --config")
    return content


def name_classes(header: Mapping[str, Any]) -> None:
    """Tells detectron2 the classes of a header's data set, unless that is registered here."""
    name, known = header.get("dataset"), header.get("metadata")
    if not name or not isinstance(known, dict) or name in DatasetCatalog:
        return
    metadata = MetadataCatalog.get(name)
    for key, value in known.items():
        if metadata.get(key) is None:
            metadata.set(**{key: dict(value) if key.endswith("contiguous_id") else value})
