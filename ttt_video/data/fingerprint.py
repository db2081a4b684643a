"""Fingerprints of a video's files, so that a run does not go on with another video.

They hold names, sizes and a hash of samples. This is cheap for thousands of frames, and does not
change when files are copied or touched. Those of training sets hold less, as these are larger.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Fingerprint = list[list[Any]]
"""One row per file, as JSON: ``frame_index`` (None for a video file), name without folders, size in
bytes (None if it is missing), hash of samples of its contents (None if not sampled) and hash of its
labels (None without labels)."""

SAMPLED_FILES = 16
"""Number of a video's files whose contents are sampled; the sizes of all are compared."""

_BLOCK = 2**14
_LABEL_KEYS = ("annotations", "segments_info", "class_id", "corruption", "severity")


def fingerprint_records(records: Sequence[Mapping[str, Any]]) -> Fingerprint:
    """Returns the fingerprint of a video of frame files, from its records in time order."""
    last = max(len(records) - 1, 1)
    sampled = {round(k * last / (SAMPLED_FILES - 1)) for k in range(SAMPLED_FILES)}
    return [
        [
            record["frame_index"],
            os.path.basename(record["file_name"]),
            _size(record["file_name"]),
            _sample(record["file_name"], 3) if place in sampled else None,
            _labels(record),
        ]
        for place, record in enumerate(records)
    ]


def fingerprint_file(path: str | os.PathLike[str]) -> Fingerprint | None:
    """Returns the fingerprint of a video file; None for a live stream, which is no file."""
    if not os.path.isfile(path):
        return None
    return [[None, os.path.basename(path), _size(path), _sample(path, 16), None]]


def fingerprint_images(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the number of a training's images, and a hash of what is listed of them.

    That is the names of images and label files without folders, the number of objects and the
    class, in any order. No file is opened: it takes a second for 200,000 images.
    """
    listed = sorted(map(_listed, records))
    digest = hashlib.sha256("\n".join(listed).encode())
    return {"images": len(listed), "listed": digest.hexdigest()[:16]}


def _listed(record: Mapping[str, Any]) -> str:
    files = sorted(
        os.path.basename(value)
        for key, value in record.items()
        if key.endswith("file_name") and isinstance(value, (str, os.PathLike))
    )
    objects = [len(record[key]) for key in ("annotations", "segments_info") if key in record]
    return f"{files} {objects} {record.get('class_id')}"


def difference(old: Fingerprint, new: Fingerprint, last: int) -> str | None:
    """Says in a few words how a video has changed; None if it has not.

    Args:
        old, new: fingerprints.
        last: index of the last frame that was run. Later frames may have other contents since.
    """
    (before, now) = ({row[1] for row in rows} for rows in (old, new))
    for names, word in ((before - now, "gone"), (now - before, "new")):
        if names:
            first = next(row[1] for row in (*old, *new) if row[1] in names)
            return f"{first} is {word}; {len(old)} files, now {len(new)}"
    if [row[:2] for row in old] != [row[:2] for row in new]:
        return "its frames have another order"
    for (index, name, size, content, labels), row in zip(old, new, strict=True):
        if index is not None and index > last:
            continue
        if size != row[2]:
            return f"{name} has {row[2]} bytes, had {size}"
        if content != row[3]:
            return f"{name} has other contents"
        if labels != row[4]:
            return f"{name} has other labels"
    return None


def _size(path: str | os.PathLike[str]) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _sample(path: str | os.PathLike[str], blocks: int) -> str | None:
    """Returns a hash of blocks spread over a file; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb", buffering=0) as file:
            end = max(os.fstat(file.fileno()).st_size - _BLOCK, 0)
            for start in sorted({k * end // (blocks - 1) for k in range(blocks)}):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    except OSError:
        return None
    return digest.hexdigest()[:16]


def _labels(record: Mapping[str, Any]) -> str | None:
    found: dict[str, Any] = {key: record[key] for key in _LABEL_KEYS if key in record}
    for key, value in record.items():
        if key.endswith("_file_name") and isinstance(value, (str, os.PathLike)):
            found[key] = [os.path.basename(value), _size(value)]
    if not found:
        return None
    text = json.dumps(found, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> str:
    """Converts masks in bytes to text, and other objects to their type's name.

    Their own text may contain a memory address.
    """
    return value.decode("latin-1") if isinstance(value, bytes) else type(value).__name__
