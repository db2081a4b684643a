"""Registers the world's stills as training data sets, which are rendered on first use.

``world_sem_seg_*`` has semantic labels. ``world_panoptic_*`` has the same pictures in COCO's layout
with panoptic and instance labels, ``world_zoom_panoptic_*`` stills with a longer lens.
``world_districts_sem_seg_*`` has stills of the districts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from tqdm import tqdm

from ..data.catalog import datasets_root
from ..data.coco_videos import coco_videos_metadata
from ..data.kitti_step import video_metadata
from ..errors import UserError
from ..formats.images import write_png
from .districts import DISTRICTS_VERSION
from .layouts import write_coco
from .video import WORLD_VERSION, WorldStills

STILL_HEIGHT, STILL_WIDTH = 128, 256
NUM_STILLS = {"train": 4000, "val": 200}
"""Four of each world 0-999, and one of each world 1000-1199."""

NUM_DISTRICT_STILLS = {"train": 2000, "val": 200}
"""Two of each world 0-999, and one of each world 1000-1199, with their districts."""

ZOOM = 4.0
"""The lens of ``world_zoom_*``: its things are nearer to COCO's in size, half of them have 62 px or
more, where it is 10 without a zoom (docs/world.md has more)."""


def load_world_stills(split: str, *, districts: bool = False) -> list[dict[str, Any]]:
    """Lists the stills of a split, "train" or "val", and renders those that are missing.

    They are in ``$DETECTRON2_DATASETS/world_stills/v<WORLD_VERSION>/<H>x<W>/<split>/``, those with
    districts in ``world_stills/districts-v<DISTRICTS_VERSION>/<H>x<W>/<split>/``. One takes about
    0.1 s on one core. Several processes may do this at once: files appear complete or not at all,
    and all processes write the same.

    Returns:
        One dict per still: ``file_name``, ``sem_seg_file_name`` (8 bit PNG, Cityscapes train
        ids), ``height``, ``width``, ``image_id`` ("<seed>_<number>").

    Raises:
        UserError: the folder cannot be written.
    """
    folder = _stills_folder(districts=districts) / split
    stills = _stills(split, districts=districts)
    names = [f"{seed:04d}_{number}" for seed, number in map(stills.origin, range(len(stills)))]
    with _writing(folder):
        _render_missing(folder, stills, names)
    return [
        {
            "file_name": str(folder / f"{name}.png"),
            "sem_seg_file_name": str(folder / f"{name}_sem.png"),
            "height": STILL_HEIGHT,
            "width": STILL_WIDTH,
            "image_id": name,
        }
        for name in names
    ]


def load_world_color(split: str) -> list[dict[str, Any]]:
    """Lists the same stills for colorization, each its own label: ``original_file_name``."""
    return [
        {
            **{key: value for key, value in record.items() if key != "sem_seg_file_name"},
            "original_file_name": record["file_name"],
        }
        for record in load_world_stills(split)
    ]


def load_world_panoptic(split: str, *, zoom: float = 1.0) -> list[dict[str, Any]]:
    """Lists the same stills in COCO's layout (``layouts.write_coco``), with COCO's 133 classes.

    They are in ``.../<H>x<W>/coco``, beside those of :func:`load_world_stills`, and those with a
    zoom in ``.../<H>x<W>/coco-zoom<ZOOM>``. This call also sets the paths in the metadata, because
    ``$DETECTRON2_DATASETS`` is not read before.

    Returns:
        One dict per still, as of detectron2's panoptic COCO: ``pan_seg_file_name`` and
        ``segments_info`` with contiguous category ids.

    Raises:
        UserError: the folder cannot be written.
    """
    root = _stills_folder() / ("coco" if zoom == 1.0 else f"coco-zoom{zoom:g}")
    annotations = {
        kind: root / "annotations" / f"{kind}_{split}2017.json"
        for kind in ("instances", "panoptic")
    }
    if not all(file.exists() for file in annotations.values()):  # written after all pictures
        with _writing(root):
            write_coco(root, split, _stills(split, zoom=zoom))
    paths = {
        "image_root": str(root / f"{split}2017"),
        "panoptic_root": str(root / f"panoptic_{split}2017"),
        "panoptic_json": str(annotations["panoptic"]),
        "json_file": str(annotations["instances"]),
    }
    metadata = _panoptic_metadata()
    name = f"world_{'panoptic' if zoom == 1.0 else 'zoom_panoptic'}_{split}"
    MetadataCatalog.pop(name)  # it would refuse other paths than before
    MetadataCatalog.get(name).set(**metadata, **paths)
    return load_coco_panoptic_json(
        paths["panoptic_json"], paths["image_root"], paths["panoptic_root"], metadata
    )


def _panoptic_metadata() -> dict[str, Any]:
    return {**coco_videos_metadata("panoptic"), "evaluator_type": "coco_panoptic_seg"}


def _stills(split: str, *, districts: bool = False, zoom: float = 1.0) -> WorldStills:
    count = (NUM_DISTRICT_STILLS if districts else NUM_STILLS)[split]
    return WorldStills(split, count, STILL_HEIGHT, STILL_WIDTH, districts=districts, zoom=zoom)


def _stills_folder(*, districts: bool = False) -> Path:
    version = f"districts-v{DISTRICTS_VERSION}" if districts else f"v{WORLD_VERSION}"
    return datasets_root() / "world_stills" / version / f"{STILL_HEIGHT}x{STILL_WIDTH}"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the world's stills to {folder} ({error.strerror}); "
            "point $DETECTRON2_DATASETS at a folder that can be written"
        ) from error


def _render_missing(folder: Path, stills: WorldStills, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    missing = [i for i, n in enumerate(names) if not {f"{n}.png", f"{n}_sem.png"} <= there]
    for index in tqdm(missing, desc=f"rendering {folder}", disable=not missing):
        label_file = folder / f"{names[index]}_sem.png"
        if not label_file.exists():  # another process may have finished the still since
            frame = stills[index]
            write_png(folder / f"{names[index]}.png", frame.image)
            write_png(label_file, frame.sem_seg)


def register_world_stills() -> None:
    """Registers ``world_*_{train,val}``: sem_seg, panoptic, color and those of other streets, once.

    Nothing is rendered yet.
    """
    semantic = {**video_metadata(), "evaluator_type": "sem_seg"}
    kinds: dict[str, tuple[Callable[[str], list[dict[str, Any]]], dict[str, Any]]] = {
        "sem_seg": (load_world_stills, semantic),
        "districts_sem_seg": (partial(load_world_stills, districts=True), semantic),
        "panoptic": (load_world_panoptic, _panoptic_metadata()),
        "zoom_panoptic": (partial(load_world_panoptic, zoom=ZOOM), _panoptic_metadata()),
        "color": (load_world_color, {"evaluator_type": "video_color"}),
    }
    for kind, (load, metadata) in kinds.items():
        for split in NUM_STILLS:
            name = f"world_{kind}_{split}"
            if name not in DatasetCatalog:
                DatasetCatalog.register(name, partial(load, split))
                MetadataCatalog.get(name).set(**metadata)
