"""Fashion-MNIST: 70,000 grey pictures of 28 x 28 px in 10 classes, read from its idx files."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from ..formats.idx import read_idx
from .catalog import datasets_root

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip

FILES = {
    "train-images-idx3-ubyte.gz": (60_000, 28, 28),
    "train-labels-idx1-ubyte.gz": (60_000,),
    "t10k-images-idx3-ubyte.gz": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (10_000,),
}
"""The four files as published, with the shapes of what they hold."""


class Split(NamedTuple):
    """Pictures ``first`` to ``last``, not included, of one of the two files."""

    file: str
    first: int
    last: int


SPLITS = {
    "train": Split("train", 0, 55_000),
    "val": Split("train", 55_000, 60_000),
    "test": Split("t10k", 0, 10_000),
}
"""The validation split is the last 5,000 pictures of the train file, and no others are train's."""


def read_grey(file: str, index: int) -> np.ndarray:
    """Returns picture ``index`` of an idx file as (28, 28, 3) uint8, three times the same grey."""
    return np.repeat(read_idx(file)[index][..., None], 3, axis=2)


def load_fashion_mnist(split: str, video_id: str = "") -> list[dict[str, Any]]:
    """Lists the pictures of a split, in the order of its file, which has no order of classes.

    Returns:
        One dict per picture: ``file_name`` ("FILE#index", the index in the file), ``read_pixels``
        (returns its pixels), ``archive_file_name`` (the file), ``class_id``, ``image_id``,
        ``video_id`` (by default the data set's name) and ``frame_index``.

    Raises:
        UserError: a file is missing or damaged, or is not Fashion-MNIST's.
    """
    part = SPLITS[split]
    folder = datasets_root() / "fashion_mnist"
    images, labels = (
        str(folder / f"{part.file}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
    )
    check_files(folder, [Path(images).name, Path(labels).name])
    classes = read_idx(labels)[part.first : part.last].tolist()
    return [
        {
            "file_name": f"{images}#{index}",
            "archive_file_name": images,
            "read_pixels": partial(read_grey, images, index),
            "image_id": f"{part.file}/{index}",
            "class_id": class_id,
            "video_id": video_id or f"fashion_mnist_{split}",
            "frame_index": index - part.first,
        }
        for index, class_id in enumerate(classes, part.first)
    ]


def check_files(folder: str | os.PathLike[str], names: list[str]) -> None:
    """Checks that files of :data:`FILES` hold what was published.

    Raises:
        UserError: one is missing or damaged, has another shape, or a label that is no class.
    """
    for name in names:
        file = str(Path(folder, name))
        if not os.path.exists(file):
            raise UserError(
                f"{file} is missing: run datasets/prepare_fashion_mnist.py (datasets/README.md)"
            )
        content = read_idx(file)
        if content.shape != FILES[name]:
            raise UserError(f"{file} holds {content.shape} bytes, not {FILES[name]}: replace it")
        if content.ndim == 1 and content.max() >= len(CLASSES):
            raise UserError(f"{file} has label {content.max()}, but classes are 0-9: replace it")


def metadata() -> dict[str, Any]:
    """Returns what all data sets of these pictures have in common."""
    return {"evaluator_type": "image_classes", "classes": list(CLASSES)}


def register_fashion_mnist() -> None:
    """Registers ``fashion_mnist_{train,val,test}``, once."""
    for split in SPLITS:
        name = f"fashion_mnist_{split}"
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(load_fashion_mnist, split))
            MetadataCatalog.get(name).set(**metadata())
