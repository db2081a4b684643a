"""Looks up data sets: their folder, whether they are registered, and their images."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, nearest
from ..formats.images import FrameTransform, read_rgb

FILES = {
    "file_name": "images",
    "sem_seg_file_name": "semantic labels",
    "pan_seg_file_name": "panoptic labels",
    "panoptic_file_name": "panoptic labels with instance ids",
}
"""Keys of a record that name a file, and what is in it."""

NO_TRAIN_IDS = "no labelTrainIds.png: run datasets/prepare_cityscapes.py"


def datasets_root() -> Path:
    """Returns the folder of all data sets: ``$DETECTRON2_DATASETS``, by default ``./datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def check_registered(name: str, key: str = "") -> None:
    """Raises UserError with the closest names if a data set is not registered.

    ``key`` is the config key or flag that names it.
    """
    known = DatasetCatalog.list()
    if name not in known:
        where = f" in {key}" if key else ""
        close = nearest(name, known)
        # Hundreds of names differ in a corruption alone.
        listed = {MetadataCatalog.get(each).get("variant_of", each) for each in known}
        hint = f"did you mean {' or '.join(close)}?" if close else ""
        hint = hint or f"registered are: {', '.join(sorted(listed))}"
        raise UserError(f"unknown data set {name!r}{where}; {hint}")


def file_of(record: Mapping[str, Any], key: str) -> str:
    """Returns the file that a record names: of a picture in an archive, the archive."""
    if key == "file_name" and "archive_file_name" in record:
        key = "archive_file_name"
    return str(record.get(key))


def missing_files(records: Collection[Mapping[str, Any]]) -> Iterator[tuple[str, int, list[str]]]:
    """Yields, for each kind of :data:`FILES`, what it is, how many there are, and which are not.

    Folders are listed, which is a hundred times as fast as a look at each file. Addresses, such as
    ``s3://``, are not looked at.
    """
    names = cache(_names)
    for key, what in FILES.items():
        files = {file_of(record, key) for record in records if key in record}
        if files:
            local = (file for file in files if "://" not in file)
            gone = [f for f in local if os.path.basename(f) not in names(os.path.dirname(f))]
            yield what, len(files), sorted(gone)


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder or "."))
    except OSError:  # the folder is missing, and so are its files
        return set()


def read_pixels(record: Mapping[str, Any]) -> np.ndarray:
    """Returns the (H, W, 3) uint8 RGB pixels of a record, possibly read-only.

    They are what its ``read_pixels`` returns, a function without arguments, and without such a key
    those of ``file_name``.

    Raises:
        BadFrame: the file cannot be read.
    """
    read = record.get("read_pixels")
    return read_rgb(record["file_name"]) if read is None else read()


def training_images(
    names: Sequence[str], transform: FrameTransform, count: int
) -> Iterator[Tensor]:
    """Yields images of registered data sets, resized like the frames of a stream.

    They are the first ones; of pictures in several folders, such as classes, cities or data sets,
    they are spread evenly over all.

    Raises:
        UserError: no data set is named, one is unknown or cannot be loaded, or an image cannot be
            read.
    """
    if not names:
        raise UserError("DATASETS.TRAIN is empty; name a data set with --dataset")
    every: list[dict[str, Any]] = []
    for name in names:
        check_registered(name, "--dataset")
        try:
            every += DatasetCatalog.get(name)
        except OSError as error:
            raise UserError(
                f"data set {name} of --dataset cannot be loaded ({error}): is DETECTRON2_DATASETS "
                "set to its folder?"
            ) from error
    records = every[:count]
    if len({os.path.dirname(record["file_name"]) for record in every}) > 1 and len(every) > count:
        records = [every[place * len(every) // count] for place in range(count)]
    for record in tqdm(records, desc=" + ".join(names), unit="image"):
        yield transform(transform.view(read_pixels(record)))
