"""Small labelled videos in the layout of KITTI-STEP's release, written without the package."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_video(
    image_root: Path, panoptic_root: Path, sequence: str, frames: Iterable[tuple[np.ndarray, ...]]
) -> None:
    """Writes pairs of an image, (H, W, 3) uint8 RGB, and its train ids, (H, W) uint8."""
    for root in (image_root, panoptic_root):
        (root / sequence).mkdir(parents=True, exist_ok=True)
    for index, (image, train_ids) in enumerate(frames):
        Image.fromarray(image).save(image_root / sequence / f"{index:06d}.png")
        Image.fromarray(train_ids).save(panoptic_root / sequence / f"{index:06d}_sem.png")
        size = {"imgHeight": image.shape[0], "imgWidth": image.shape[1]}
        (panoptic_root / sequence / f"{index:06d}.json").write_text(json.dumps(size))
