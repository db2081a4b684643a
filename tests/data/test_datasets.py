"""Registration of all data sets: complete, repeatable, and without touching the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ttt_video import register_all
from ttt_video.data.catalog import datasets_root

NAMES = (
    "kitti_step_video_sem_seg_train",
    "kitti_step_video_sem_seg_val",
    "world_panoptic_train",
    "world_panoptic_val",
    "world_sem_seg_train",
    "world_sem_seg_val",
)


def test_register_all_reads_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    register_all()
    register_all()
    assert set(NAMES) <= set(DatasetCatalog.list())
    assert not (tmp_path / "nowhere").exists()
    for name in NAMES:
        metadata = MetadataCatalog.get(name)
        assert metadata.ignore_label == 255
        assert len(metadata.stuff_classes) == (133 if "panoptic" in name else 19)
        assert metadata.evaluator_type


@pytest.mark.parametrize(
    ("name", "kind", "classes"),
    [
        ("cityscapes_fine_sem_seg_train", "stuff", 19),
        ("cityscapes_fine_sem_seg_val", "stuff", 19),
        ("coco_2017_train", "thing", 80),
        ("coco_2017_val", "thing", 80),
        ("coco_2017_train_panoptic", "stuff", 133),
        ("coco_2017_val_panoptic", "stuff", 133),
    ],
)
def test_what_the_training_configs_name_has_classes_and_colours(name, kind, classes):
    metadata = MetadataCatalog.get(name)
    assert len(metadata.get(f"{kind}_classes")) == len(metadata.get(f"{kind}_colors")) == classes
    assert metadata.evaluator_type


def test_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert datasets_root() == Path("datasets")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    assert datasets_root() == Path.home() / "data"
