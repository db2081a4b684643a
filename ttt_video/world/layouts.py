"""Writes world frames in the layouts of KITTI-STEP, COCO Videos, Cityscapes and COCO.

Only frames with a missing file are rendered, and files appear complete or not at all, so the same
call continues an interrupted one. ``root`` is always the data set's own folder, for example
``$DETECTRON2_DATASETS/coco``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES, COCO_CATEGORIES
from PIL import Image
from tqdm import tqdm

from ..data.coco_videos import LABEL_PERIOD, UNLABELLED
from ..errors import require
from ..files import remove_leftovers, write_atomically
from ..formats.images import write_png
from ..formats.labels import read_segment_ids
from . import segments
from .video import WorldFrame

VIDEO_DATASETS = {
    "kitti_step": "kitti_step_video_sem_seg_val",
    "coco_videos": "coco_videos_panoptic_all",
}
"""Layouts of videos, and the data set that reads each by default."""

JPEG_QUALITY = 95  # COCO's pictures are JPEGs, which detectron2's loader expects


class Frames(Protocol):
    """A sequence of labelled frames that are rendered on access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> WorldFrame: ...


def write_kitti_step(
    root: Path, split: str, sequence: str, frames: Frames, rgb_labels: bool = False
) -> None:
    """Writes one video in KITTI-STEP's layout.

    Files: ``images/<split>/<sequence>/%06d.png``; below ``panoptic_maps/<split>/<sequence>/``,
    ``%06d_sem.png`` (train ids), ``%06d.json`` (size) and, with ``rgb_labels``, ``%06d.png`` in
    KITTI-STEP's own format, which has instances, too.
    """
    images = root / "images" / split / sequence
    labels = root / "panoptic_maps" / split / sequence

    def files(index: int) -> list[Path]:
        name = f"{index:06d}"
        paths = [images / f"{name}.png", labels / f"{name}_sem.png", labels / f"{name}.json"]
        return [*paths, labels / f"{name}.png"] if rgb_labels else paths

    def save(frame: WorldFrame, paths: Sequence[Path]) -> None:
        write_png(paths[0], frame.image)
        write_png(paths[1], frame.sem_seg)
        height, width = frame.sem_seg.shape
        _write_json(paths[2], {"imgHeight": height, "imgWidth": width})
        if rgb_labels:
            write_png(paths[3], segments.kitti_step_panoptic(frame))

    _write_missing(frames, files, save, f"{split}/{sequence}")


def write_coco_videos(root: Path, video: str, frames: Frames) -> None:
    """Writes one video in the layout of COCO Videos: every frame, and labels of every 10th.

    Files: ``raw_images/<video>/<video>_<n>.png`` with n from 1, not padded;
    ``panoptic_images/<video>/`` with the same names for labelled frames;
    ``annotations/train/<video>.json`` in COCO's panoptic format, with a mask (compressed RLE) for
    each segment. Poles and signs are one segment of category 255, unlabelled.
    """
    raw, labels = root / "raw_images" / video, root / "panoptic_images" / video

    def files(index: int) -> list[Path]:
        name = f"{video}_{index + 1}.png"
        return [raw / name, labels / name] if index % LABEL_PERIOD == 0 else [raw / name]

    def save(frame: WorldFrame, paths: Sequence[Path]) -> None:
        write_png(paths[0], frame.image)
        for path in paths[1:]:
            write_png(path, segments.ids_to_rgb(segments.coco_segment_ids(frame)))

    _write_missing(frames, files, save, video)
    images, annotations = [], []
    for index in range(0, len(frames), LABEL_PERIOD):
        label = labels / f"{video}_{index + 1}.png"
        ids = read_segment_ids(label)
        images.append(_image_entry(index + 1, label.name, ids))
        annotations.append(_label_entry(index + 1, label, _describe(ids, segments.coco_category)))
    file = root / "annotations" / "train" / f"{video}.json"
    _write_annotations(file, images, annotations, COCO_CATEGORIES)


def write_coco(root: Path, split: str, frames: Frames) -> None:
    """Writes stills as COCO's instance and panoptic segmentation, split "train" or "val".

    Files: ``<split>2017/%012d.jpg``, ``panoptic_<split>2017/%012d.png``,
    ``annotations/instances_<split>2017.json`` and ``panoptic_<split>2017.json``. Masks of instances
    are compressed RLE, because polygons would not be exact; poles and signs are void.
    """
    pictures, labels = root / f"{split}2017", root / f"panoptic_{split}2017"

    def files(index: int) -> list[Path]:
        return [pictures / f"{index + 1:012d}.jpg", labels / f"{index + 1:012d}.png"]

    def save(frame: WorldFrame, paths: Sequence[Path]) -> None:
        to_jpeg = partial(Image.fromarray(frame.image).save, format="JPEG", subsampling=0)
        write_atomically(paths[0], partial(to_jpeg, quality=JPEG_QUALITY))
        ids = segments.coco_segment_ids(frame)
        ids[ids == UNLABELLED << 16] = 0
        write_png(paths[1], segments.ids_to_rgb(ids))

    _write_missing(frames, files, save, f"{split}2017")
    images: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    things = {c["id"] for c in COCO_CATEGORIES if c["isthing"]}
    for index in range(len(frames)):
        picture, label = files(index)
        ids = read_segment_ids(label)
        images.append(_image_entry(index + 1, picture.name, ids))
        found = _describe(ids, segments.coco_category)
        for segment in found:
            if segment["category_id"] in things:
                number = len(instances) + 1
                instances.append({**segment, "id": number, "image_id": index + 1})
        panoptic.append(_label_entry(index + 1, label, map(_without_mask, found)))
    folder = root / "annotations"
    _write_annotations(folder / f"panoptic_{split}2017.json", images, panoptic, COCO_CATEGORIES)
    categories = [category for category in COCO_CATEGORIES if category["isthing"]]
    _write_annotations(folder / f"instances_{split}2017.json", images, instances, categories)


def write_cityscapes(root: Path, split: str, city: str, frames: Frames) -> None:
    """Writes stills as one city of Cityscapes, with the files of its preparation scripts.

    Files: ``leftImg8bit/<split>/<city>/<still>_leftImg8bit.png`` and below ``gtFine``,
    ``<split>/<city>/<still>_gtFine_{labelIds,labelTrainIds,instanceIds}.png`` and
    ``..._polygons.json``, ``cityscapes_panoptic_<split>/<still>_gtFine_panoptic.png`` and
    ``cityscapes_panoptic_<split>.json``, where <still> is ``<city>_%06d_000000``. The polygons
    drawn one after another give the label ids exactly; each is one visible piece of one thing.

    Raises:
        UserError: OpenCV, which finds the polygons, is missing.
    """
    pictures, ground_truth = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    panoptic = root / "gtFine" / f"cityscapes_panoptic_{split}"

    def files(index: int) -> list[Path]:
        still = f"{city}_{index:06d}_000000"
        kinds = ("labelIds.png", "labelTrainIds.png", "instanceIds.png", "polygons.json")
        return [
            pictures / f"{still}_leftImg8bit.png",
            *(ground_truth / f"{still}_gtFine_{kind}" for kind in kinds),
            panoptic / f"{still}_gtFine_panoptic.png",
        ]

    def save(frame: WorldFrame, paths: Sequence[Path]) -> None:
        ids = segments.cityscapes_instance_ids(frame)
        write_png(paths[0], frame.image)
        write_png(paths[1], segments.cityscapes_label_ids(frame))
        write_png(paths[2], frame.sem_seg)
        write_png(paths[3], ids)
        _write_json(paths[4], _polygons(ids))
        write_png(paths[5], segments.ids_to_rgb(ids))

    _write_missing(frames, files, save, f"{split}/{city}")
    images, annotations = [], []
    for label in sorted(panoptic.glob("[!.]*_gtFine_panoptic.png")):
        ids = read_segment_ids(label)
        still = label.name.removesuffix("_gtFine_panoptic.png")
        picture = f"{still}_gtFine_leftImg8bit.png"  # Cityscapes' own script names it so
        images.append(_image_entry(still, picture, ids))
        found = _describe(ids, segments.cityscapes_category)
        annotations.append(_label_entry(still, label, map(_without_mask, found)))
    file = panoptic.with_suffix(".json")
    _write_annotations(file, images, annotations, CITYSCAPES_CATEGORIES)


def _write_missing(
    frames: Frames,
    files: Callable[[int], list[Path]],
    save: Callable[[WorldFrame, Sequence[Path]], None],
    description: str,
) -> None:
    """Renders and saves the frames with a missing file."""
    for folder in {path.parent for path in files(0)} if len(frames) else ():
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)  # Cityscapes' loaders fail on unknown files
    for index in tqdm(range(len(frames)), desc=description, unit="frame"):
        paths = files(index)
        if not all(path.exists() for path in paths):
            save(frames[index], paths)


def _describe(ids: np.ndarray, category: Callable[[int], int]) -> list[dict[str, Any]]:
    found = np.unique(ids[ids > 0]).tolist()
    return [segments.describe_segment(ids, i, category(i)) for i in found]


def _without_mask(segment: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in segment.items() if key != "segmentation"}


def _image_entry(image_id: int | str, name: str, ids: np.ndarray) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "height": ids.shape[0], "width": ids.shape[1]}


def _label_entry(
    image_id: int | str, label: Path, found: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    return {"image_id": image_id, "file_name": label.name, "segments_info": list(found)}


def _write_annotations(
    path: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
) -> None:
    listed = [{key: c[key] for key in ("id", "name", "isthing")} for c in categories]
    _write_json(path, {"images": images, "annotations": annotations, "categories": listed})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: part.write_text(json.dumps(content)))


def _polygons(ids: np.ndarray) -> dict[str, Any]:
    """Returns Cityscapes' ``*_polygons.json`` of instance ids, (H, W) uint16."""
    cv2 = require("cv2", "opencv-python-headless", "making Cityscapes' polygons")
    names = {category["id"]: category["name"] for category in CITYSCAPES_CATEGORIES}
    outlines = []
    for segment in np.unique(ids).tolist():
        name = names[segments.cityscapes_category(segment)]
        # Pieces that touch only at corners are drawn apart: each may be in a hole of the other.
        pieces, numbers = cv2.connectedComponents((ids == segment).astype(np.uint8), connectivity=4)
        for piece in range(1, pieces):
            mask = (numbers == piece).astype(np.uint8)
            (points,), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            corners = points.reshape(-1, 2)
            missing = max(0, 3 - len(corners))  # readers expect three, even for a single pixel
            outlines.append((name, np.pad(corners, ((0, missing), (0, 0)), mode="edge")))
    # A piece in the hole of another has the smaller box, and is drawn over it.
    outlines.sort(key=lambda item: -int(np.prod(np.ptp(item[1], axis=0) + 1)))
    objects = [{"label": name, "polygon": points.tolist()} for name, points in outlines]
    return {"imgHeight": ids.shape[0], "imgWidth": ids.shape[1], "objects": objects}
