"""COCO Videos: the paper's egocentric videos with COCO panoptic labels on every tenth frame.

Below ``$DETECTRON2_DATASETS/coco_videos``::

    raw_images/<video>/<name>_<n>.png        every frame, n from 1
    panoptic_images/<video>/<name>_<n>.png   labelled frames: id = R + 256 G + 65536 B, 0 = void
    annotations/train/<video>.json           COCO panoptic, with a mask in each segment

Category ids are COCO's, and 255 is "unlabelled". As in detectron2's COCO, the contiguous class ids
are 0-79 for things and 80-132 for stuff.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import BoxMode

from ..errors import UserError
from ..files import read_json_object
from ..formats.coco_json import CocoError, panoptic_faults
from ..formats.coco_masks import compress, mask_fault
from ..formats.images import list_frames
from .catalog import datasets_root

RELEASED_VIDEOS = (
    "bangkok", "bar", "berkeley", "havana", "house", "irvine", "paris", "restaurant", "school",
    "tokyo",
)  # fmt: skip
FRAME_RATE = 10.0  # frames per second
LABEL_PERIOD = 10
"""Frames 0, 10, 20, ... are labelled."""
UNLABELLED = 255
"""Category of segments without a class, in the files and in the records."""

LAYOUT_HINT = (
    "; data sets are looked for under $DETECTRON2_DATASETS (default ./datasets), in the layout of "
    "datasets/README.md"
)

Task = Literal["instance", "panoptic"]
Record = dict[str, Any]

CLASS_OF_CATEGORY = {
    category["id"]: index
    for index, category in enumerate(sorted(COCO_CATEGORIES, key=lambda c: not c["isthing"]))
}
"""Contiguous class ids by COCO category id, things first."""
NUM_THINGS = sum(category["isthing"] for category in COCO_CATEGORIES)


def load_coco_video(root: str | os.PathLike[str], video: str, task: Task) -> list[Record]:
    """Lists all frames of one video in time order.

    Args:
        root: the folder that holds ``raw_images``, ``panoptic_images`` and ``annotations``.
        video: name of the video.
        task: "instance" adds ``annotations``, detectron2's objects.

    Returns:
        One dict per frame: ``file_name``, ``video_id``, ``frame_index`` (position, from 0) and
        ``image_id`` ("<video>/<file's stem>"). Labelled frames also have ``height``, ``width``,
        ``pan_seg_file_name`` and ``segments_info``: all segments with contiguous ``category_id``
        (255 = unlabelled) and ``isthing``. ``annotations`` are the things among them.

    Raises:
        UserError: files are missing or damaged, a label belongs to no frame, or a category is not
            COCO's.
    """
    root = Path(root)
    json_file = root / "annotations" / "train" / f"{video}.json"
    labels = {}
    content = read_json_object(json_file, hint=LAYOUT_HINT)
    # The file's list of categories is not needed: they are COCO's and 255.
    faults = panoptic_faults(content, listed_categories=False) or _video_faults(content, task)
    if faults:
        raise CocoError(f"{json_file} is not COCO Videos' format", faults)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for annotation in content["annotations"]:
        height, width = sizes[annotation["image_id"]]
        name = annotation["file_name"]
        segments = [_segment(s, height, width) for s in annotation["segments_info"]]
        labels[name] = {
            "height": height,
            "width": width,
            "pan_seg_file_name": str(root / "panoptic_images" / video / name),
            "segments_info": segments,
        }
        if task == "instance":
            labels[name]["annotations"] = [
                {**s, "bbox_mode": BoxMode.XYWH_ABS} for s in segments if s["isthing"]
            ]
    folder = root / "raw_images" / video
    records = []
    for index, image in enumerate(list_frames(folder)):
        frame = {
            "file_name": str(image),
            "image_id": f"{video}/{image.stem}",
            "video_id": video,
            "frame_index": index,
        }
        records.append(frame | labels.pop(image.name, {}))
    if labels:
        raise UserError(
            f"{json_file} has labels of {next(iter(labels))}, which is not in {folder} "
            f"({len(labels)} such frames): fetch the video again"
        )
    if not records:
        raise UserError(f"{folder} holds no frames")
    return records


def _video_faults(content: Record, task: Task) -> list[str]:
    """Returns the first mistake in categories and masks, which COCO's panoptic form leaves free."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            name = f"{annotation['file_name']}: segment {segment['id']}"
            category = segment["category_id"]
            if category != UNLABELLED and category not in CLASS_OF_CATEGORY:
                return [f"{name}: category_id {category} is not one of COCO's"]
            thing = CLASS_OF_CATEGORY.get(category, NUM_THINGS) < NUM_THINGS
            fault = mask_fault(segment.get("segmentation"), *sizes[annotation["image_id"]])
            if task == "instance" and thing and fault:
                return [f"{name} {fault}: give it a mask or remove it"]
    return []


def _segment(segment: Record, height: int, width: int) -> Record:
    """Converts a segment of the file: contiguous class id, compressed mask."""
    class_id = CLASS_OF_CATEGORY.get(segment["category_id"], UNLABELLED)
    converted = {
        **segment,
        "category_id": class_id,
        "isthing": class_id < NUM_THINGS,
        "iscrowd": segment.get("iscrowd", 0),
    }
    mask = segment.get("segmentation")
    if isinstance(mask, dict) and not mask_fault(mask, height, width):
        converted["segmentation"] = compress(mask, height, width)
    return converted


def load_coco_videos(
    root: str | os.PathLike[str], task: Task, videos: Sequence[str] | None = None
) -> list[Record]:
    """Lists the frames of several videos; see `load_coco_video`.

    ``videos`` None stands for every video with annotations, sorted by name.
    """
    annotations = Path(root) / "annotations" / "train"
    if videos is None:
        videos = sorted(file.stem for file in annotations.glob("[!.]*.json"))
    if not videos:
        raise UserError(f"no COCO Videos: {annotations} holds no <video>.json{LAYOUT_HINT}")
    return [record for video in videos for record in load_coco_video(root, video, task)]


def register_coco_videos() -> None:
    """Registers ``coco_videos_{instance,panoptic}_<video>`` and ``..._all``, once.

    ``<video>`` is each released video; "all" is every video that is on disk when it is loaded, so
    that your own videos in this layout count too. $DETECTRON2_DATASETS is read at that time.
    """
    for task in get_args(Task):
        for video in (*RELEASED_VIDEOS, "all"):
            name = f"coco_videos_{task}_{video}"
            if name not in DatasetCatalog:
                videos = None if video == "all" else [video]
                DatasetCatalog.register(name, partial(_load_registered, task, videos))
                MetadataCatalog.get(name).set(**coco_videos_metadata(task), frame_rate=FRAME_RATE)


def _load_registered(task: Task, videos: Sequence[str] | None) -> list[Record]:
    return load_coco_videos(datasets_root() / "coco_videos", task, videos)


def coco_videos_metadata(task: Task) -> dict[str, Any]:
    """Returns detectron2's metadata with COCO's 80 classes (instance) or 133 (panoptic).

    ``thing_*`` and ``stuff_*`` both list all 133 classes, as in detectron2's panoptic COCO.
    """
    ordered = sorted(COCO_CATEGORIES, key=lambda category: CLASS_OF_CATEGORY[category["id"]])
    classes = ordered[:NUM_THINGS] if task == "instance" else ordered
    names = [category["name"] for category in classes]
    colors = [list(category["color"]) for category in classes]
    ids = {category["id"]: CLASS_OF_CATEGORY[category["id"]] for category in classes}
    metadata: dict[str, Any] = {
        "thing_classes": names,
        "thing_colors": colors,
        "thing_dataset_id_to_contiguous_id": {i: c for i, c in ids.items() if c < NUM_THINGS},
        "ignore_label": UNLABELLED,
        "label_period": LABEL_PERIOD,
        "evaluator_type": f"video_{task}",
    }
    if task == "panoptic":
        metadata |= {
            "stuff_classes": names,
            "stuff_colors": colors,
            "stuff_dataset_id_to_contiguous_id": {i: c for i, c in ids.items() if c >= NUM_THINGS},
        }
    return metadata
