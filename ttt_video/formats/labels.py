"""Reads label maps of classes and of segments, and tells label maps from frames.

Pillow changes ids without a word: it keeps only the high byte of 16-bit colours, and spreads gray
of 1, 2 and 4 bits over 0 to 255. So the readers here look at how the pixels are stored, undo the
spreading and refuse the rest.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile
from PIL.ExifTags import Base as ExifTag

from ..errors import UserError
from .images import DECODING_ERRORS, decoding_reason

TRAIN_ID_FORMAT = "train_id"
PANOPTIC_FORMAT = "kitti_step_panoptic"
SEM_SEG_FORMAT_KEY = "sem_seg_format"
"""Key of a dataset dict; its value, one of the two above, says how to decode the label file."""

# Pillow's names of the ways in which pixels are stored ("raw modes").
_CLASS_MAPS = {"1": 1, "L": 1, "P": 1, "P;1": 1, "P;2": 1, "P;4": 1, "L;2": 85, "L;4": 17}
"""Modes with one small number per pixel, and the factor by which Pillow multiplies it."""
_SEGMENT_MAPS = {"RGB": 1}
_NAMES = {
    "I;16": "16-bit gray",
    "I;16B": "16-bit gray",
    "L": "8-bit gray",
    "LA": "gray with transparency",
    "LA;16B": "16-bit gray with transparency",
    "P": "8-bit palette",
    "RGB": "8-bit RGB",
    "RGB;16B": "16-bit RGB",
    "RGB;16L": "16-bit RGB",
    "RGBA": "RGB with transparency",
    "RGBA;16B": "16-bit RGB with transparency",
}
_LOSSLESS = ("PNG", "TIFF", "BMP", "PPM")


def read_class_map(file_name: str | os.PathLike[str]) -> np.ndarray:
    """Reads class ids, (H, W) uint8, from any path that detectron2's PathManager opens.

    The ids are gray values or palette indices of at most 8 bits, as they are stored.

    Raises:
        UserError: the file is missing, damaged, or stored in another way.
    """
    return _read(file_name, _CLASS_MAPS, "class ids", "8-bit gray or palette")


def read_segment_ids(file_name: str | os.PathLike[str]) -> np.ndarray:
    """Reads a COCO panoptic map: segment ids R + 256 G + 65536 B, (H, W) int32.

    Raises:
        UserError: the file is missing, damaged, or no 8-bit RGB image.
    """
    colors = read_segment_colors(file_name)
    four_bytes = np.zeros((*colors.shape[:2], 4), dtype=np.uint8)
    four_bytes[..., :3] = colors
    return four_bytes.view("<i4")[..., 0]


def read_segment_colors(file_name: str | os.PathLike[str]) -> np.ndarray:
    """Reads a label map whose colours are ids (COCO panoptic, KITTI-STEP), (H, W, 3) uint8 RGB.

    Raises:
        UserError: the file is missing, damaged, or no 8-bit RGB image.
    """
    return _read(file_name, _SEGMENT_MAPS, "panoptic ids", "8-bit RGB")


def _read(
    file_name: str | os.PathLike[str], accepted: dict[str, int], content: str, wanted: str
) -> np.ndarray:
    try:
        with PathManager.open(os.fspath(file_name), "rb") as file, Image.open(file) as image:
            stored = _stored_as(image)  # before decoding, which forgets it
            if stored not in accepted:
                raise UserError(
                    f"{file_name} is no label map of {content}: it is {_NAMES.get(stored, stored)}"
                    f", {image.height}x{image.width} (height x width); save it as {wanted} PNG"
                )
            pixels = np.array(image, dtype=np.uint8)
            orientation = image.getexif().get(ExifTag.Orientation, 1)
    except DECODING_ERRORS as error:
        raise UserError(
            f"label map {file_name} cannot be read ({decoding_reason(error)})"
        ) from error
    if orientation != 1:
        # Some tools turn the pixels but keep the tag, and some readers ignore it.
        raise UserError(
            f"label map {file_name} has an orientation tag ({orientation}), which leaves open how "
            "it lies on its frame: save it as it is to be read, without the tag"
        )
    return pixels // accepted[stored] if accepted[stored] > 1 else pixels


def _stored_as(image: ImageFile.ImageFile) -> str:
    """Returns Pillow's raw mode of an image before decoding, or why its ids cannot be read."""
    codec, _, _, arguments = image.tile[0] if image.tile else ("", (0, 0, 0, 0), 0, "")
    compression = str(image.info.get("compression", ""))
    if image.format not in _LOSSLESS or "jpeg" in compression or "webp" in compression:
        return f"{image.format}, whose compression may change ids"
    if codec.startswith("ppm"):
        return "of a greatest value other than 255"
    return arguments[0] if isinstance(arguments, tuple) else str(arguments)


def present_ids(class_map: np.ndarray) -> list[int]:
    """Returns the values that occur in an (H, W) uint8 class map, sorted."""
    return np.flatnonzero(np.bincount(class_map.ravel())).tolist()


def check_class_ids(ids: Iterable[int], num_classes: int, ignore_label: int, where: Any) -> None:
    """Checks that labels are classes of their data set or ``ignore_label``.

    Args:
        ids: the labels that occur.
        num_classes: number of classes; 0, if it is unknown, skips the check.
        ignore_label: the value for "no class".
        where: the labels' file, for the message.

    Raises:
        UserError: names the first other label, the file and the fix.
    """
    if not num_classes:
        return
    wrong = [k for k in ids if not 0 <= k < num_classes and k != ignore_label]
    if wrong:
        raise UserError(
            f"{where} has label {min(wrong)}, but its data set has classes 0 to {num_classes - 1}, "
            f"and {ignore_label} for no class: mend the labels, or register all classes"
        )


# ---- label maps beside frames


_LETTERS = re.compile(r"(?:[ ._-]*[A-Za-z](?:[^ ._-]*[A-Za-z])?)+$")
_STARTS = re.compile(r"(?<=[^ ._-])[ ._-]|(?<=[0-9])(?=[A-Za-z])")


def refuse_label_maps(files: Sequence[Path], fix: str) -> None:
    """Raises UserError if files of one folder hold two pictures of one frame, such as label maps.

    These are two files with one stem (``0.jpg 0.png``), and files with a common ending that all
    have a companion without it (``0.png 0_sem.png``) or with another ending (``a_image.png
    a_mask.png``). Endings consist of letters, because digits number frames. ``fix`` ends the
    message.
    """
    by_stem: dict[str, Path] = {}
    for file in files:
        if (other := by_stem.setdefault(file.stem, file)) is not file:
            raise _mixed(other, file, fix)
    endings: dict[str, list[str]] = defaultdict(list)  # by beginning
    count: dict[str, int] = defaultdict(int)
    for stem in by_stem:
        endings[stem].append("")
        for ending in _endings(stem):
            endings[stem.removesuffix(ending)].append(ending)
            count[ending] += 1
    pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for beginning, own in endings.items():
        for pair in permutations(own, 2):
            if pair[1]:
                pairs[pair].append(beginning)
    for (first, second), beginnings in pairs.items():
        # A single pair may be chance (street and street_night), but not if both have a number.
        enough = len(beginnings) > 1 or (not first and beginnings[0][-1:].isdigit())
        if enough and len(beginnings) == count[second]:
            one, other = by_stem[beginnings[0] + first], by_stem[beginnings[0] + second]
            raise _mixed(one, other, fix)


def _endings(stem: str) -> list[str]:
    """Returns the endings of a stem that consist of letters, without the whole stem."""
    tail = _LETTERS.search(stem)
    if tail is None:
        return []
    starts = [match.start() for match in _STARTS.finditer(stem)]
    return [stem[start:] for start in starts if start >= max(tail.start(), 1)]


def _mixed(one: Path, other: Path, fix: str) -> UserError:
    return UserError(
        f"{one} and {other.name} are two pictures of one frame, as a frame and its label map are, "
        f"and labels must not be streamed as frames: {fix}"
    )


def refuse_labels_as_frames(name: str, records: Iterable[dict[str, Any]]) -> None:
    """Raises UserError if a data set lists label maps as frames, too."""
    keys = ("sem_seg_file_name", "pan_seg_file_name", "panoptic_file_name")
    records = list(records)
    labels = {str(record[key]) for record in records for key in keys if key in record}
    both = [r["file_name"] for r in records if str(r["file_name"]) in labels]
    if both:
        raise UserError(
            f"data set {name} lists {both[0]} as a frame and as a label map "
            f"({len(both)} such files): register the frames alone"
        )


def read_sem_seg(dataset_dict: dict[str, Any]) -> np.ndarray:
    """Decodes the labels of one frame: (H, W) uint8 train ids, 255 = ignore.

    Args:
        dataset_dict: has ``sem_seg_file_name``, and ``sem_seg_format`` if the file is not 8 bit.

    Raises:
        UserError: the file is missing, unreadable, or has another format.
    """
    file_name = dataset_dict["sem_seg_file_name"]
    label_format = dataset_dict.get(SEM_SEG_FORMAT_KEY, TRAIN_ID_FORMAT)
    if label_format not in (TRAIN_ID_FORMAT, PANOPTIC_FORMAT):
        raise UserError(f"unknown {SEM_SEG_FORMAT_KEY} {label_format!r} of {file_name}")
    if label_format == PANOPTIC_FORMAT:
        return np.ascontiguousarray(read_segment_colors(file_name)[..., 0])
    return read_class_map(file_name)
