"""KITTI-STEP and other labelled videos in its layout: reading, writing and registering.

Two kinds of label files exist and both are read:

* ``<seq>/%06d_sem.png``, 8 bit: the Cityscapes train id, 255 = ignore; ``%06d.json`` beside it
  holds ``imgHeight`` and ``imgWidth``;
* ``<seq>/%06d.png``, RGB, KITTI-STEP's own format: R = train id (255 = ignore), instance id =
  256 * G + B.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ..errors import UserError
from ..files import write_atomically
from ..formats.images import DECODING_ERRORS, write_png
from ..formats.labels import PANOPTIC_FORMAT, SEM_SEG_FORMAT_KEY, TRAIN_ID_FORMAT
from .catalog import datasets_root
from .cityscapes import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_COLORS,
    CITYSCAPES_THING_IDS,
    IGNORE_LABEL,
)

SPLITS = ("train", "val")


def load_kitti_step_sem_seg(
    image_root: str | os.PathLike[str], panoptic_root: str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """List the labelled frames below two folders, sequence by sequence and in time order.

    Args:
        image_root: holds ``<seq>/%06d.png``.
        panoptic_root: holds ``<seq>/`` with label files of either kind (see the module); where a
            frame has both, the 8 bit one is taken. Its sequences are the ones that are listed, so
            the images may lie in one folder for all splits.

    Returns:
        One dict per frame: ``file_name``, ``sem_seg_file_name``, ``sem_seg_format``,
        ``panoptic_file_name`` (the RGB file, where there is one), ``image_id`` ("<seq>/<frame>"),
        ``height``, ``width`` (pixels), ``video_id`` (the sequence's folder name) and
        ``frame_index`` (position in the sequence, from 0).

    Raises:
        UserError: a folder is missing or holds no frames, or a frame lacks its image or labels.
    """
    image_root, panoptic_root = Path(image_root), Path(panoptic_root)
    for root in (image_root, panoptic_root):
        if not root.is_dir():
            raise UserError(_expected(root, "no such folder", image_root, panoptic_root))
    dicts: list[dict[str, Any]] = []
    for sequence in sorted(p for p in panoptic_root.iterdir() if p.is_dir()):
        if sequence.name.startswith("."):  # of an editor, or of macOS
            continue
        # Digits alone: label maps may lie in the same folder.
        images = sorted((image_root / sequence.name).glob("[0-9]*.png"))
        images = [image for image in images if image.stem.isdigit()]
        if not images:
            problem = f"no images of sequence {sequence.name}"
            raise UserError(_expected(image_root, problem, image_root, panoptic_root))
        for frame_index, image in enumerate(images):
            labels = _find_labels(sequence, image.stem)
            if not labels:
                problem = f"no labels for {sequence.name}/{image.name}"
                raise UserError(_expected(panoptic_root, problem, image_root, panoptic_root))
            height, width = _read_size(sequence / f"{image.stem}.json", image)
            dicts.append(
                {
                    "file_name": str(image),
                    **labels,
                    "image_id": f"{sequence.name}/{image.stem}",
                    "height": height,
                    "width": width,
                    "video_id": sequence.name,
                    "frame_index": frame_index,
                }
            )
    if not dicts:
        raise UserError(_expected(panoptic_root, "no sequences", image_root, panoptic_root))
    return dicts


def _find_labels(folder: Path, stem: str) -> dict[str, str]:
    """The label keys of one frame; empty where it has no label file."""
    train_ids, panoptic = folder / f"{stem}_sem.png", folder / f"{stem}.png"
    labels = {"panoptic_file_name": str(panoptic)} if panoptic.is_file() else {}
    if train_ids.is_file():
        return labels | {"sem_seg_file_name": str(train_ids), SEM_SEG_FORMAT_KEY: TRAIN_ID_FORMAT}
    if labels:
        return labels | {"sem_seg_file_name": str(panoptic), SEM_SEG_FORMAT_KEY: PANOPTIC_FORMAT}
    return labels


def _read_size(size_file: Path, image: Path) -> tuple[int, int]:
    """Height and width of a frame, from the file of sizes where there is one."""
    if size_file.is_file():
        try:
            size = json.loads(size_file.read_text())
            return int(size["imgHeight"]), int(size["imgWidth"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{size_file} does not hold imgHeight and imgWidth: make it again with "
                "datasets/prepare_kitti_step.py, or remove it"
            ) from error
    try:
        with Image.open(image) as opened:  # reads the header only
            return opened.height, opened.width
    except DECODING_ERRORS as error:
        raise UserError(f"{image} is not a readable image") from error


def _expected(root: Path, problem: str, image_root: Path, panoptic_root: Path) -> str:
    return (
        f"{root}: {problem}; expected {image_root}/<seq>/%06d.png and "
        f"{panoptic_root}/<seq>/%06d_sem.png (train ids) or %06d.png (KITTI-STEP's RGB); "
        "data sets are looked for under $DETECTRON2_DATASETS, by default ./datasets"
    )


def write_video(
    image_root: str | os.PathLike[str],
    panoptic_root: str | os.PathLike[str],
    sequence: str,
    frames: Iterable[Callable[[], tuple[np.ndarray, np.ndarray]]],
) -> int:
    """Write one labelled video; frames that are there already are left alone and not rendered.

    Args:
        image_root, panoptic_root: as for ``load_kitti_step_sem_seg``.
        sequence: name of the video's folders.
        frames: for each frame a function that returns its image, (H, W, 3) uint8 RGB, and its
            labels, (H, W) uint8 train ids.

    Returns:
        The number of frames written. Every file appears complete or not at all.
    """
    images, labels = Path(image_root) / sequence, Path(panoptic_root) / sequence
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    written = 0
    for index, render in enumerate(frames):
        image_file = images / f"{index:06d}.png"
        label_file = labels / f"{index:06d}_sem.png"
        size_file = labels / f"{index:06d}.json"
        if image_file.exists() and label_file.exists() and size_file.exists():
            continue
        image, sem_seg = render()
        size = json.dumps({"imgHeight": int(image.shape[0]), "imgWidth": int(image.shape[1])})
        write_png(image_file, image)
        write_png(label_file, sem_seg)
        write_atomically(size_file, functools.partial(Path.write_text, data=size))
        written += 1
    return written


def register_video_sem_seg(
    name: str, image_root: str | os.PathLike[str], panoptic_root: str | os.PathLike[str]
) -> None:
    """Register labelled videos in KITTI-STEP's layout with Cityscapes' 19 classes.

    The folders are read when the data set is used, not here.
    """
    DatasetCatalog.register(name, lambda: load_kitti_step_sem_seg(image_root, panoptic_root))
    MetadataCatalog.get(name).set(
        image_root=str(image_root), panoptic_root=str(panoptic_root), **video_metadata()
    )


def register_kitti_step(root: str | os.PathLike[str] | None = None) -> None:
    """Register ``kitti_step_video_sem_seg_train`` and ``..._val``, once.

    "train" is the official training split (12 sequences, the paper's "test"), "val" the official
    validation split (9 sequences, the paper's "val").

    Args:
        root: the folder that holds ``kitti_step/``; None stands for $DETECTRON2_DATASETS, which
            is then looked up whenever a data set is loaded.
    """
    for split in SPLITS:
        name = f"kitti_step_video_sem_seg_{split}"
        if name in DatasetCatalog:
            continue

        def load(split: str = split) -> list[dict[str, Any]]:
            base = (datasets_root() if root is None else Path(root)) / "kitti_step"
            return load_kitti_step_sem_seg(
                kitti_step_images(base, split), base / "panoptic_maps" / split
            )

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**video_metadata())


def kitti_step_images(base: Path, split: str) -> Path:
    """The folder of a split's image folders: ``images/<split>``, else as KITTI tracking unpacks."""
    candidates = (base / "images" / split, base / "training" / "image_02", base / "image_02")
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def video_metadata() -> dict[str, Any]:
    """detectron2 metadata of Cityscapes-labelled video; a class's position is its label."""
    return {
        "stuff_classes": list(CITYSCAPES_CLASSES),
        "stuff_colors": [list(color) for color in CITYSCAPES_COLORS],
        "thing_classes": [CITYSCAPES_CLASSES[i] for i in CITYSCAPES_THING_IDS],
        "thing_colors": [list(CITYSCAPES_COLORS[i]) for i in CITYSCAPES_THING_IDS],
        "ignore_label": IGNORE_LABEL,
        "evaluator_type": "video_sem_seg",
    }
