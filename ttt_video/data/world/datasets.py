"""The world's stills as ordinary semantic segmentation data sets, rendered on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from ttt_video.data.datasets import datasets_root
from ttt_video.data.kitti_step import video_metadata, write_png
from ttt_video.errors import UserError

from .video import WORLD_VERSION, render_still

STILL_HEIGHT, STILL_WIDTH = 128, 256
STILL_SEEDS = {"train": range(1000), "val": range(1000, 1200)}
STILLS_PER_SEED = {"train": 4, "val": 1}


def load_world_stills(split: str) -> list[dict[str, Any]]:
    """List the stills of a split, and render those that are not on disk yet.

    They lie in ``$DETECTRON2_DATASETS/world_stills/v<WORLD_VERSION>/<H>x<W>/<split>/``, about
    0.1 s each on one core. Several processes may do this at once: files appear complete or not at
    all, and all processes would write the same.

    Args:
        split: "train" (4000 stills of worlds 0-999) or "val" (200 of worlds 1000-1199).

    Returns:
        One dict per still: ``file_name``, ``sem_seg_file_name`` (8 bit PNG, Cityscapes train
        ids), ``height``, ``width``, ``image_id`` ("<seed>_<number>").

    Raises:
        UserError: the folder cannot be written.
    """
    size = f"{STILL_HEIGHT}x{STILL_WIDTH}"
    folder = datasets_root() / "world_stills" / f"v{WORLD_VERSION}" / size / split
    # All worlds once, then again: any beginning of the list is as varied as it can be.
    stills = [(s, k) for k in range(STILLS_PER_SEED[split]) for s in STILL_SEEDS[split]]
    try:
        _render_missing(folder, stills)
    except OSError as error:
        raise UserError(
            f"cannot write the world's stills to {folder} ({error.strerror}); "
            "point $DETECTRON2_DATASETS at a folder that can be written"
        ) from error
    return [
        {
            "file_name": str(_image_file(folder, seed, number)),
            "sem_seg_file_name": str(_label_file(folder, seed, number)),
            "height": STILL_HEIGHT,
            "width": STILL_WIDTH,
            "image_id": f"{seed:04d}_{number}",
        }
        for seed, number in stills
    ]


def _image_file(folder: Path, seed: int, number: int) -> Path:
    return folder / f"{seed:04d}_{number}.png"


def _label_file(folder: Path, seed: int, number: int) -> Path:
    return folder / f"{seed:04d}_{number}_sem.png"


def _render_missing(folder: Path, stills: list[tuple[int, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    missing = [
        (seed, number)
        for seed, number in stills
        if not {_image_file(folder, seed, number).name, _label_file(folder, seed, number).name}
        <= there
    ]
    for seed, number in tqdm(missing, desc=f"rendering {folder}", disable=not missing):
        label_file = _label_file(folder, seed, number)
        if label_file.exists():  # written last; another process was here meanwhile
            continue
        frame = render_still(seed, STILL_HEIGHT, STILL_WIDTH, number)
        write_png(_image_file(folder, seed, number), frame.image)
        write_png(label_file, frame.sem_seg)


def register_world_stills() -> None:
    """Register ``world_sem_seg_train`` and ``world_sem_seg_val``, once; renders nothing yet."""
    for split in STILL_SEEDS:
        name = f"world_sem_seg_{split}"
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, lambda split=split: load_world_stills(split))
            MetadataCatalog.get(name).set(**{**video_metadata(), "evaluator_type": "sem_seg"})
