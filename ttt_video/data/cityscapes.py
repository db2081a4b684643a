"""The 19 classes that Cityscapes evaluates; a class's position is its train id."""

from __future__ import annotations

import numpy as np
from detectron2.data import MetadataCatalog

IGNORE_LABEL = 255

CITYSCAPES_CLASSES: tuple[str, ...] = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)  # fmt: skip

CITYSCAPES_COLORS: tuple[tuple[int, int, int], ...] = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
"""The data set's own palette, RGB."""

CITYSCAPES_THING_IDS: tuple[int, ...] = tuple(range(11, 19))
"""Train ids of things: person, rider, car, truck, bus, train, motorcycle, bicycle."""

CITYSCAPES_LABEL_IDS: tuple[int, ...] = (
    7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33,
)  # fmt: skip
"""The id of each class in the data set's own ``*_labelIds.png``."""

NUM_LABEL_IDS = 34
"""Label ids are 0-33; those of classes that are not evaluated are ignored."""


def train_ids(label_ids: np.ndarray) -> np.ndarray:
    """Converts (H, W) uint8 label ids to train ids, 255 for what is not evaluated.

    Raises:
        ValueError: a value is no label id.
    """
    highest = int(label_ids.max(initial=0))
    if highest >= NUM_LABEL_IDS:
        raise ValueError(f"label id {highest} is not one of Cityscapes' 0-{NUM_LABEL_IDS - 1}")
    table = np.full(NUM_LABEL_IDS, IGNORE_LABEL, np.uint8)
    table[list(CITYSCAPES_LABEL_IDS)] = np.arange(len(CITYSCAPES_LABEL_IDS))
    return table[label_ids]


def complete_metadata() -> None:
    """Adds the colours that detectron2's ``cityscapes_fine_sem_seg_*`` lack."""
    for split in ("train", "val", "test"):
        metadata = MetadataCatalog.get(f"cityscapes_fine_sem_seg_{split}")
        metadata.set(stuff_colors=[list(color) for color in CITYSCAPES_COLORS])
