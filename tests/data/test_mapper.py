"""The mapper's outputs against hand arithmetic on tiny images."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from ttt_video.config import get_cfg
from ttt_video.data.loader import seeded
from ttt_video.data.mapper import EvaluationMapper, JointDatasetMapper
from ttt_video.errors import UserError
from ttt_video.tasks import Augmented, PanopticTask, SemanticTask

# 4 x 6 labels: left half class 0, right half class 13, one ignored pixel.
LABELS = np.array([[0, 0, 0, 13, 13, 13]] * 4, np.uint8)
LABELS[0, 0] = 255
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


@pytest.fixture
def record(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    Image.fromarray(LABELS).save(tmp_path / "labels.png")
    return {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "height": 4,
        "width": 6,
        "image_id": 7,
    }


def make_mapper(task, augmentations=(), **kwargs):
    return JointDatasetMapper(task=task, augmentations=list(augmentations), **kwargs)


def test_semantic_sample_without_augmentation(record):
    before = copy.deepcopy(record)
    sample = make_mapper("semantic")(record)

    assert record == before
    assert sample["image_id"] == 7
    assert sample["image"].dtype == torch.uint8
    np.testing.assert_array_equal(sample["image"].numpy(), IMAGE.transpose(2, 0, 1))
    assert sample["sem_seg"].dtype == torch.int64
    np.testing.assert_array_equal(sample["sem_seg"].numpy(), LABELS)
    instances = sample["instances"]
    assert instances.image_size == (4, 6)
    assert instances.gt_classes.tolist() == [0, 13]
    masks = instances.gt_masks.tensor
    assert masks.dtype == torch.bool
    assert masks.sum((1, 2)).tolist() == [11, 12]  # the ignored pixel belongs to no class
    assert not masks[0, 0, 0]
    assert not masks.all(0).any()


def test_bgr_reverses_the_channels(record):
    rgb = make_mapper("semantic")(record)["image"]
    bgr = make_mapper("semantic", image_format="BGR")(record)["image"]
    assert torch.equal(bgr, rgb.flip(0))


def test_flip_moves_image_and_labels_together(record):
    flip = T.RandomFlip(prob=1.0)
    sample = make_mapper("semantic", [flip])(record)
    np.testing.assert_array_equal(sample["image"].numpy(), IMAGE[:, ::-1].transpose(2, 0, 1))
    np.testing.assert_array_equal(sample["sem_seg"].numpy(), LABELS[:, ::-1])
    assert sample["instances"].gt_masks.tensor[1, :, :3].all()  # class 13 is now on the left


def test_padding_to_a_multiple(record):
    sample = make_mapper("semantic", size_divisibility=4, ignore_label=255)(record)
    assert sample["image"].shape == (3, 4, 8)
    assert (sample["image"][:, :, 6:] == 128).all()
    assert (sample["sem_seg"][:, 6:] == 255).all()
    assert sample["instances"].image_size == (4, 8)
    assert not sample["instances"].gt_masks.tensor[:, :, 6:].any()
    np.testing.assert_array_equal(sample["image"][:, :, :6].numpy(), IMAGE.transpose(2, 0, 1))


def test_palette_labels_keep_their_indices(record):
    palette = Image.fromarray(LABELS)
    palette.putpalette([255 - i // 3 for i in range(768)])
    palette.save(record["sem_seg_file_name"])
    np.testing.assert_array_equal(make_mapper("semantic")(record)["sem_seg"].numpy(), LABELS)


def test_image_with_nothing_but_ignored_pixels(record):
    Image.fromarray(np.full((4, 6), 255, np.uint8)).save(record["sem_seg_file_name"])
    instances = make_mapper("semantic")(record)["instances"]
    assert len(instances) == 0
    assert instances.gt_masks.tensor.shape == (0, 4, 6)


def square(category, x0, y0, x1, y1, **extra):
    return {
        "bbox": [x0, y0, x1, y1],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category,
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        **extra,
    }


def test_instances_from_polygons(record):
    record["annotations"] = [
        square(3, 0, 0, 2, 2),
        square(5, 3, 1, 6, 4),
        square(9, 0, 0, 6, 4, iscrowd=1),
    ]
    sample = make_mapper("instance")(record)
    assert "sem_seg" not in sample
    instances = sample["instances"]
    assert instances.gt_classes.tolist() == [3, 5]
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, :2, :2] = True
    expected[1, 1:4, 3:6] = True
    assert torch.equal(instances.gt_masks.tensor, expected)


def test_instances_that_a_crop_removes_are_dropped(record):
    record["annotations"] = [square(3, 0, 0, 2, 2), square(5, 3, 1, 6, 4)]
    instances = make_mapper("instance", [T.CropTransform(3, 0, 3, 4)])(record)["instances"]
    assert instances.gt_classes.tolist() == [5]
    assert instances.gt_masks.tensor.sum() == 9


def test_rle_masks_stay_out_of_the_jitter_padding(record):
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:5] = 1
    record["annotations"] = [
        square(3, 2, 1, 5, 3) | {"segmentation": rle.encode(np.asfortranarray(mask))}
    ]
    cfg = get_cfg()
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 12, 1.0, 1.0
    cfg.INPUT.RANDOM_FLIP = "none"
    sample = JointDatasetMapper(cfg, True)(record)
    # 4x6 fits into 12x12 at twice the size, 8x12; the rest is padding.
    assert sample["image"].shape == (3, 12, 12)
    assert (sample["image"][:, 8:] == 128).all()
    instances = sample["instances"]
    assert instances.gt_masks.tensor.sum() == 4 * mask.sum()
    assert not instances.gt_masks.tensor[:, 8:].any()


@pytest.mark.parametrize("style", ["colorization", "colorization_lsj"])
def test_colours_of_padding_are_no_labels(record, style):
    cfg = get_cfg()
    cfg.INPUT.DATASET_MAPPER_NAME = style
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 12, 1.0, 1.0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (8,), 12
    cfg.INPUT.SIZE_DIVISIBILITY = 16
    record["original_file_name"] = record["file_name"]
    sample = JointDatasetMapper(cfg, True)(record)
    assert sample["image"].shape == (3, 16, 16)
    (mask,) = sample["instances"].gt_masks.tensor
    assert mask[:8, :12].all()  # 4x6 at twice the size
    assert mask.sum() == 8 * 12
    assert (sample["image"][:, ~mask] == 128).all()


def test_panoptic_sample(record, tmp_path):
    ids = np.zeros((4, 6), np.int64)
    ids[:, :2], ids[:, 2:4], ids[0, 4:], ids[1:, 4:] = 5, 300, 70000, 9
    png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(png).save(tmp_path / "panoptic.png")
    record["pan_seg_file_name"] = str(tmp_path / "panoptic.png")
    record["segments_info"] = [
        {"id": 5, "category_id": 1, "iscrowd": 0},
        {"id": 300, "category_id": 2, "iscrowd": 0},
        {"id": 70000, "category_id": 3},
        {"id": 9, "category_id": 4, "iscrowd": 1},
        {"id": 1234, "category_id": 6, "iscrowd": 0},  # listed, but nowhere in the picture
    ]
    sample = make_mapper("panoptic", [T.HFlipTransform(6)])(record)
    instances = sample["instances"]
    assert instances.gt_classes.tolist() == [1, 2, 3]
    for mask, segment in zip(instances.gt_masks.tensor.numpy(), (5, 300, 70000), strict=True):
        np.testing.assert_array_equal(mask, ids[:, ::-1] == segment)
    assert "segments_info" not in sample


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 6))
def test_semantic_masks_partition_the_labelled_pixels(seed, height, width):
    labels = np.random.default_rng(seed).choice([0, 1, 7, 18, 255], (height, width))
    labels = labels.astype(np.uint8)
    classes, masks = SemanticTask.training_target(labels, {}, Augmented(labels.shape, None, 255))
    assert sorted(set(classes.tolist())) == classes.tolist()
    np.testing.assert_array_equal(masks.sum(0), labels != 255)
    for label, mask in zip(classes, masks, strict=True):
        assert mask.any()
        np.testing.assert_array_equal(mask, labels == label)


def test_panoptic_target_without_segments():
    classes, masks = PanopticTask.training_target(
        np.zeros((2, 3, 3), np.uint8), {"segments_info": []}, Augmented((2, 3), None, 255)
    )
    assert classes.shape == (0,)
    assert masks.shape == (0, 2, 3)


def crop_cfg(**crop):
    cfg = get_cfg()
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (0,), "choice"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "absolute"
    for key, value in crop.items():
        cfg.INPUT.CROP[key] = value
    return cfg


def test_crop_avoids_windows_of_a_single_category(record):
    """Of the four 4x3 windows, two hold one class only; those must lose."""
    mapper = JointDatasetMapper(crop_cfg(SIZE=(4, 3), SINGLE_CATEGORY_MAX_AREA=0.9), True)
    with seeded(0):
        counts = [len(mapper(record)["instances"]) for _ in range(40)]
    assert counts.count(2) == 40  # ten redraws each: a one-class window has probability 2**-10


def test_cityscapes_augmentation_of_the_shipped_settings(record):
    cfg = crop_cfg(SIZE=(8, 16))
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.COLOR_AUG_SSD = (16, 32), True
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    kinds = [type(a).__name__ for a in JointDatasetMapper(cfg, True).augmentations.augs]
    assert kinds[:2] == ["ResizeShortestEdge", "RandomCrop_CategoryAreaConstraint"]
    assert kinds[3:] == ["RandomFlip"]
    sample = JointDatasetMapper(cfg, True)(record)
    assert sample["image"].shape == (3, 8, 16)
    assert sample["image"].dtype == torch.uint8
    assert sample["sem_seg"].shape == (8, 16)


@pytest.mark.parametrize(
    ("task", "key"),
    [("instance", "annotations"), ("panoptic", "pan_seg_file_name")],
)
def test_missing_labels_are_named(record, task, key):
    with pytest.raises(UserError, match=key):
        make_mapper(task)(record)


def test_label_map_with_colors_is_refused(record):
    Image.fromarray(IMAGE).save(record["sem_seg_file_name"])
    with pytest.raises(UserError, match="no label map of class ids: it is 8-bit RGB"):
        make_mapper("semantic")(record)


@pytest.mark.parametrize("key", ["file_name", "sem_seg_file_name"])
def test_files_that_cannot_be_read_are_named(record, key):
    Path(record[key]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"\.png cannot be read \(") as error:
        make_mapper("semantic")(record)
    assert "\n" not in str(error.value)
    Path(record[key]).unlink()
    with pytest.raises(UserError, match=r"\.png cannot be read \(No such file"):
        make_mapper("semantic")(record)


def test_sizes_that_differ_are_told_in_a_line(record):
    with pytest.raises(UserError, match=r"\(6, 4\).*\(8, 4\)") as error:
        make_mapper("semantic")({**record, "width": 8})
    assert "\n" not in str(error.value)
    Image.fromarray(LABELS[:3]).save(record["sem_seg_file_name"])
    with pytest.raises(UserError, match=r"labels\.png has 3x6 pixels, but its image 4x6"):
        make_mapper("semantic")(record)


def test_wrong_settings_are_refused():
    cfg = get_cfg()
    cfg.INPUT.DATASET_MAPPER_NAME = "no_such_mapper"
    with pytest.raises(UserError, match=r"no_such_mapper.*coco_panoptic_lsj"):
        JointDatasetMapper(cfg, True)
    cfg = crop_cfg(SINGLE_CATEGORY_MAX_AREA=0.75)
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    with pytest.raises(UserError, match="SINGLE_CATEGORY_MAX_AREA"):
        JointDatasetMapper(cfg, True)
    with pytest.raises(ValueError, match="colorize"):
        make_mapper("colorize")
    with pytest.raises(ValueError, match="DatasetMapper"):
        make_mapper("semantic", is_train=False)


def test_coco_json_through_detectron2s_loader(record, tmp_path):
    """A record as detectron2 loads it from a COCO json goes through unchanged."""
    from detectron2.data.datasets import load_coco_json

    coco = {
        "images": [{"id": 1, "file_name": "image.png", "height": 4, "width": 6}],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 18,
                "bbox": [1, 1, 3, 2],
                "area": 6,
                "iscrowd": 0,
                "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]],
            }
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (loaded,) = load_coco_json(str(tmp_path / "coco.json"), str(tmp_path), "mapper_test_coco")
    instances = make_mapper("instance")(loaded)["instances"]
    assert instances.gt_classes.tolist() == [0]
    assert instances.gt_masks.tensor[0, 1:3, 1:4].all()
    assert instances.gt_masks.tensor.sum() == 6


@pytest.mark.parametrize(("smallest", "largest"), [(0, 1333), (8, 1333), (8, 10)])
def test_evaluation_resizes_as_detectron2s_mapper(record, smallest, largest):
    cfg = get_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = "RGB", smallest, largest
    theirs, ours = DatasetMapper(cfg, is_train=False)(record), EvaluationMapper(cfg)(record)
    assert torch.equal(ours["image"], theirs["image"])
    assert theirs.keys() - ours.keys() == {"sem_seg"}
    assert ours["image_id"] == 7
    with pytest.raises(UserError, match="got \\(6, 4\\), expect \\(9, 4\\)"):
        EvaluationMapper(cfg)({**record, "width": 9})
    Path(record["file_name"]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"image\.png cannot be read \(") as error:
        EvaluationMapper(cfg)(record)
    assert type(error.value) is UserError  # by whose name it is known from another process
