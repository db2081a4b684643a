"""Reads and registers KITTI-STEP and other labelled videos in its layout.

There are two kinds of label files:

* ``<seq>/%06d_sem.png``, 8 bit: the Cityscapes train id, 255 = ignore; ``%06d.json`` beside it
  holds ``imgHeight`` and ``imgWidth``;
* ``<seq>/%06d.png``, RGB, KITTI-STEP's own format: R = train id (255 = ignore), instance id =
  256 * G + B.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ..errors import UserError
from ..formats.images import DECODING_ERRORS
from ..formats.labels import PANOPTIC_FORMAT, SEM_SEG_FORMAT_KEY, TRAIN_ID_FORMAT
from .catalog import datasets_root
from .cityscapes import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, CITYSCAPES_THING_IDS, IGNORE_LABEL

SPLITS = ("train", "val")
FRAME_RATE = 10.0  # frames per second

_LABEL_FILE = re.compile(r"([0-9]+)(_sem)?\.png")


def load_kitti_step_sem_seg(
    image_root: str | os.PathLike[str], panoptic_root: str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """Lists the labelled frames below two folders, sequence by sequence and in time order.

    Args:
        image_root: holds ``<seq>/%06d.png``.
        panoptic_root: holds ``<seq>/`` with label files of either kind (see the module); the 8 bit
            one is preferred. Only its sequences are listed, so ``image_root`` may hold the images
            of all splits.

    Returns:
        One dict per frame: ``file_name``, ``sem_seg_file_name``, ``sem_seg_format``,
        ``panoptic_file_name`` (the RGB file, if there is one), ``image_id`` ("<seq>/<frame>"),
        ``height``, ``width`` (pixels), ``video_id`` (the sequence's folder name) and
        ``frame_index`` (position in the sequence, from 0).

    Raises:
        UserError: a folder is missing or holds no frames, or a frame lacks its image or labels.
    """
    image_root, panoptic_root = Path(image_root), Path(panoptic_root)

    def expected(root: Path, problem: str) -> UserError:
        return UserError(
            f"{root}: {problem}; expected {image_root}/<seq>/%06d.png and "
            f"{panoptic_root}/<seq>/%06d_sem.png (train ids) or %06d.png (KITTI-STEP's RGB); "
            "data sets are looked for under $DETECTRON2_DATASETS, by default ./datasets"
        )

    for root in (image_root, panoptic_root):
        if not root.is_dir():
            raise expected(root, "no such folder")
    dicts: list[dict[str, Any]] = []
    for sequence in sorted(p for p in panoptic_root.iterdir() if p.is_dir()):
        if sequence.name.startswith("."):  # made by an editor or by macOS
            continue
        images = sorted((image_root / sequence.name).glob("[0-9]*.png"))
        images = [image for image in images if image.stem.isdigit()]  # labels may be beside them
        if not images:
            raise expected(image_root, f"no images of sequence {sequence.name}")
        _refuse_labels_of_no_image(sequence, images)
        for frame_index, image in enumerate(images):
            labels = _find_labels(sequence, image.stem)
            if not labels:
                raise expected(panoptic_root, f"no labels for {sequence.name}/{image.name}")
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
        raise expected(panoptic_root, "no sequences")
    return dicts


def _refuse_labels_of_no_image(folder: Path, images: list[Path]) -> None:
    """Raises UserError if the labels of a sequence go beyond its images."""
    known = {image.stem for image in images}
    named = filter(None, map(_LABEL_FILE.fullmatch, sorted(os.listdir(folder))))
    others = [match[0] for match in named if match[1] not in known]
    if others:
        raise UserError(
            f"label map {folder / others[0]} has no frame in {images[0].parent} ({len(others)} "
            "such label maps): restore the frames, or remove their labels"
        )


def _find_labels(folder: Path, stem: str) -> dict[str, str]:
    """Returns the label keys of one frame; empty if it has no label file."""
    train_ids, panoptic = folder / f"{stem}_sem.png", folder / f"{stem}.png"
    labels = {"panoptic_file_name": str(panoptic)} if panoptic.is_file() else {}
    if train_ids.is_file():
        return labels | {"sem_seg_file_name": str(train_ids), SEM_SEG_FORMAT_KEY: TRAIN_ID_FORMAT}
    if labels:
        return labels | {"sem_seg_file_name": str(panoptic), SEM_SEG_FORMAT_KEY: PANOPTIC_FORMAT}
    return labels


def _read_size(size_file: Path, image: Path) -> tuple[int, int]:
    """Returns height and width of a frame, from its json file if there is one."""
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
        with Image.open(image) as opened:
            return opened.height, opened.width
    except DECODING_ERRORS as error:
        raise UserError(f"{image} is not a readable image") from error


def register_video_sem_seg(
    name: str, image_root: str | os.PathLike[str], panoptic_root: str | os.PathLike[str]
) -> None:
    """Registers labelled videos in KITTI-STEP's layout with Cityscapes' 19 classes.

    The folders are not read before the data set is loaded.
    """
    DatasetCatalog.register(name, lambda: load_kitti_step_sem_seg(image_root, panoptic_root))
    MetadataCatalog.get(name).set(
        image_root=str(image_root), panoptic_root=str(panoptic_root), **video_metadata()
    )


def register_kitti_step() -> None:
    """Registers ``kitti_step_video_sem_seg_train`` and ``..._val``, once.

    "train" is the official training split (12 sequences, the paper's "test"), "val" the official
    validation split (9 sequences, the paper's "val"). $DETECTRON2_DATASETS is read when they are
    loaded.
    """
    for split in SPLITS:
        name = f"kitti_step_video_sem_seg_{split}"
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(_load_split, split))
            MetadataCatalog.get(name).set(**video_metadata(), frame_rate=FRAME_RATE)


def _load_split(split: str) -> list[dict[str, Any]]:
    base = datasets_root() / "kitti_step"
    # The authors' layout, then the folders that KITTI tracking unpacks.
    candidates = (base / "images" / split, base / "training" / "image_02", base / "image_02")
    images = next((folder for folder in candidates if folder.is_dir()), candidates[0])
    return load_kitti_step_sem_seg(images, base / "panoptic_maps" / split)


def video_metadata() -> dict[str, Any]:
    """Returns detectron2's metadata of video with Cityscapes' train ids."""
    return {
        "stuff_classes": list(CITYSCAPES_CLASSES),
        "stuff_colors": [list(color) for color in CITYSCAPES_COLORS],
        "thing_classes": [CITYSCAPES_CLASSES[i] for i in CITYSCAPES_THING_IDS],
        "thing_colors": [list(CITYSCAPES_COLORS[i]) for i in CITYSCAPES_THING_IDS],
        "ignore_label": IGNORE_LABEL,
        "evaluator_type": "video_sem_seg",
    }
