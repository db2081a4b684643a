"""Converts a world frame's labels to the ids of COCO, Cityscapes and KITTI-STEP: pure functions.

A segment's id always contains its category, so that a data set's JSON files can be made from the
label pictures alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

from ..data.coco_videos import UNLABELLED
from .scene import BUILDING, CAR, PERSON, ROAD, SIDEWALK, SKY, VEGETATION
from .video import WorldFrame

COCO_IDS = {
    PERSON: 1,
    CAR: 3,
    ROAD: 149,
    VEGETATION: 184,  # tree-merged
    SKY: 187,  # sky-other-merged
    SIDEWALK: 191,  # pavement-merged
    BUILDING: 197,  # building-other-merged
}
"""COCO category ids by Cityscapes train id; COCO has no poles and no signs."""

CITYSCAPES_IDS = {category["trainId"]: category["id"] for category in CITYSCAPES_CATEGORIES}
"""Cityscapes label ids by train id."""

_INSTANCES_PER_CATEGORY = 1 << 16


def _table(mapping: dict[int, int], default: int) -> np.ndarray:
    """Makes a lookup table, (256,) int32."""
    table = np.full(256, default, dtype=np.int32)
    table[list(mapping)] = list(mapping.values())
    return table


_TO_COCO = _table(COCO_IDS, UNLABELLED)
_TO_CITYSCAPES = _table(CITYSCAPES_IDS, 0)


def coco_segment_ids(frame: WorldFrame) -> np.ndarray:
    """Returns (H, W) int32 in [0, 2^24): category * 65536 + instance, which is 0 for stuff.

    Ids of things are the same in every frame of a video. Classes that COCO lacks are one segment of
    category 255, unlabelled.
    """
    return _TO_COCO[frame.sem_seg] * _INSTANCES_PER_CATEGORY + frame.instances


def coco_category(segment_id: int) -> int:
    """Returns the category of a segment of ``coco_segment_ids``."""
    return segment_id // _INSTANCES_PER_CATEGORY


def cityscapes_label_ids(frame: WorldFrame) -> np.ndarray:
    """Returns (H, W) uint8 Cityscapes label ids, as in ``*_labelIds.png``."""
    return _TO_CITYSCAPES[frame.sem_seg].astype(np.uint8)


def cityscapes_instance_ids(frame: WorldFrame) -> np.ndarray:
    """Returns (H, W) uint16, as in ``*_instanceIds.png``: label id * 1000 + number for things.

    Stuff has its label id. Numbers start at 0 in every frame and class.
    """
    labels = _TO_CITYSCAPES[frame.sem_seg]
    ids = labels.copy()
    for label in np.unique(labels[frame.instances > 0]).tolist():
        things = (labels == label) & (frame.instances > 0)
        _, numbers = np.unique(frame.instances[things], return_inverse=True)
        ids[things] = label * 1000 + numbers.reshape(-1)
    return ids.astype(np.uint16)


def cityscapes_category(segment_id: int) -> int:
    """Returns the category of a segment of ``cityscapes_instance_ids``."""
    return segment_id // 1000 if segment_id >= 1000 else segment_id


def kitti_step_panoptic(frame: WorldFrame) -> np.ndarray:
    """Returns KITTI-STEP's label picture, (H, W, 3) uint8: R = train id, instance = 256 G + B."""
    high, low = np.divmod(frame.instances, 256)
    return np.stack([frame.sem_seg, high, low], axis=-1).astype(np.uint8)


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Converts segment ids, (H, W) in [0, 2^24), to COCO's label picture, (H, W, 3) uint8."""
    ids = ids.astype(np.int32)
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def describe_segment(ids: np.ndarray, segment_id: int, category_id: int) -> dict[str, Any]:
    """Returns an entry of COCO panoptic's ``segments_info``, with a mask as compressed RLE.

    ``bbox`` is [x, y, width, height] and ``area`` the number of pixels, both of the visible part.
    """
    rle = mask_util.encode(np.asfortranarray(ids == segment_id, dtype=np.uint8))
    return {
        "id": segment_id,
        "category_id": category_id,
        "area": int(mask_util.area(rle)),
        "bbox": [int(number) for number in mask_util.toBbox(rle)],
        "iscrowd": 0,
        "segmentation": {"size": list(ids.shape), "counts": rle["counts"].decode("ascii")},
    }
