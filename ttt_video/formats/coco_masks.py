"""Checks and compresses masks in the forms of COCO's json files: polygons and run lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as rle

from ..errors import UserError

MAX_COORDINATE = 1e6
"""Limit in pixels, because drawing an outline takes memory in proportion to its length."""
LABELLED_ONLY = "a video that is labelled in parts is registered for this with labelled_only=True"


def mask_fault(segmentation: Any, height: int | None, width: int | None) -> str:
    """Returns why a "segmentation" is no mask of an image of this size in pixels; "" if it is one.

    Masks are polygons, run lengths (a list or COCO's compressed text) and (H, W) bitmaps. A size of
    None is not checked.
    """
    if isinstance(segmentation, np.ndarray):
        own = segmentation.shape
        fits = len(own) == 2 and (height is None or own == (height, width))
        return "" if fits else f"has a bitmap of {own}, not {(height, width)}"
    if not segmentation:
        return f"has no mask (segmentation: {segmentation!r})"
    if isinstance(segmentation, dict):
        return _run_length_fault(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"has a segmentation that is neither polygons nor run lengths: {segmentation!r:.40}"
    return next(filter(None, map(_polygon_fault, segmentation)), "")


def check_annotations(records: Iterable[Mapping[str, Any]], *, everywhere: bool = False) -> None:
    """Checks the masks and areas of all objects, before a wrong one ends a run in the middle.

    Args:
        records: detectron2's dicts.
        everywhere: refuse frames without ``annotations``, too, in a video that has some, as
            training does.

    Raises:
        UserError: names the first wrong object and its image.
    """
    records = list(records)
    labelled = {r["video_id"] for r in records if "annotations" in r and "video_id" in r}
    for record in records:
        if everywhere and "annotations" not in record and record.get("video_id") in labelled:
            raise UserError(f"{record['file_name']} has no 'annotations'; {LABELLED_ONLY}")
        for number, annotation in enumerate(record.get("annotations", ())):
            mask = annotation.get("segmentation")
            fault = mask_fault(mask, record.get("height"), record.get("width"))
            if not fault and "area" in annotation and not is_finite(annotation["area"]):
                fault = f"has area {annotation['area']!r}"
            if fault:
                raise UserError(
                    f"{record['file_name']}: object {number} of its annotations {fault}: mend it "
                    "or remove it"
                )


def is_finite(value: Any) -> bool:
    """Whether a value of a json file is a finite number."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return bool(number and abs(value) < 1e300)


def _polygon_fault(polygon: Any) -> str:
    try:
        numbers = np.asarray(polygon)
    except ValueError:  # rows of different lengths
        numbers = np.zeros((0, 2))
    if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iuf"):
        return "has a polygon that is no flat list of numbers x1, y1, x2, y2, ..."
    if len(numbers) < 6 or len(numbers) % 2:
        return f"has a polygon of {len(numbers)} numbers; 3 points, which are 6, are the least"
    if not (np.abs(numbers) <= MAX_COORDINATE).all():
        return "has a polygon with a coordinate that is not finite or beyond a million pixels"
    return ""


def _run_length_fault(shape: Mapping[str, Any], height: int | None, width: int | None) -> str:
    size, counts = shape.get("size"), shape.get("counts")
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return f"has run lengths of size {size!r}, which is no (height, width)"
    if height is None or width is None:
        height, width = size
    if tuple(size) != (height, width):
        return f"has run lengths of (height, width) {size!r}, but its image is {[height, width]}"
    runs = None
    if isinstance(counts, list):
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
        runs = np.array(counts) if whole else None
    elif isinstance(counts, (str, bytes)):
        runs = _decompress(counts.encode() if isinstance(counts, str) else counts)
    if runs is None or (runs < 0).any():
        return f"has run lengths that cannot be read ({counts!r:.40})"
    if runs.sum() != height * width:
        return f"has run lengths of {runs.sum()} pixels, but its image has {height * width}"
    return ""


def _decompress(counts: bytes) -> np.ndarray | None:
    """Returns the run lengths of COCO's compressed text; None if it is no such text.

    Each run is a number in digits of 5 bits, least significant first; bit 6 says that more follow.
    From the fourth run on it is the difference to the run before the last. pycocotools does not
    refuse wrong text.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or ((codes < 0) | (codes > 63)).any() or codes[-1] & 0x20:
        return None
    last = np.flatnonzero((codes & 0x20) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    digits = last - first + 1
    if digits.max() > 7:  # beyond 2^31 pixels
        return None
    place = np.arange(len(codes)) - np.repeat(first, digits)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), first)
    values -= np.where(codes[last] & 0x10, 1 << (5 * digits), 0)
    for start in (1, 2):
        values[start::2] = np.cumsum(values[start::2])
    return values


def compress(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Returns COCO's compressed run lengths of a mask in any form that `mask_fault` accepts."""
    if isinstance(segmentation, np.ndarray):
        return rle.encode(np.asfortranarray(segmentation, np.uint8))
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, *segmentation["size"])
    return segmentation
