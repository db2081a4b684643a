"""Classes of data sets against those of models, before anything starts."""

from __future__ import annotations

import uuid

import pytest
from detectron2.data import MetadataCatalog

from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.tasks import InstanceTask, SemanticTask
from ttt_video.tasks.classes import check_predicted_classes, check_trained_classes


@pytest.fixture
def named():
    """``named(**metadata)``: the name of a data set of such metadata."""
    names = []

    def add(**metadata):
        names.append(f"classes_{uuid.uuid4().hex}")
        MetadataCatalog.get(names[-1]).set(**metadata)
        return names[-1]

    yield add
    for name in names:
        MetadataCatalog.pop(name)


def of(number):
    return [str(k) for k in range(number)]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("joint_cityscapes.yaml", "kitti_step_video_sem_seg_val"),
        ("joint_cityscapes.yaml", "cityscapes_fine_sem_seg_val"),
        ("quick/joint_world.yaml", "world_sem_seg_val"),
        ("quick/joint_districts.yaml", "world_districts_sem_seg_val"),
        ("joint_coco_instance.yaml", "coco_videos_instance_all"),
        ("joint_coco_panoptic.yaml", "coco_videos_panoptic_bar"),
        ("joint_coco_panoptic.yaml", "coco_videos_instance_bar"),  # its things alone
        ("quick/joint_world_panoptic.yaml", "coco_videos_instance_bar"),
        ("quick/joint_world_panoptic.yaml", "world_panoptic_val"),
        ("quick/joint_world_zoom.yaml", "world_zoom_panoptic_val"),
        ("joint_cityscapes.yaml", ""),
    ],
)
def test_shipped_models_suit_their_data_sets(config, name):
    check_predicted_classes(load_config(config), name)


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        ("joint_coco_instance.yaml", "coco_videos_panoptic_all", "133 classes, but the model 80 c"),
        (
            "joint_coco_panoptic.yaml",
            "kitti_step_video_sem_seg_val",
            "19 classes, but the model 13",
        ),
        ("joint_cityscapes.yaml", "coco_videos_instance_bar", "80 classes, but the model 19 c"),
    ],
)
def test_other_models_are_refused(config, name, said):
    with pytest.raises(UserError, match=f"data set {name} has {said}.*NUM_CLASSES") as error:
        check_predicted_classes(load_config(config), name)
    assert "\n" not in str(error.value)


def test_own_sets(named):
    cfg = load_config("joint_cityscapes.yaml")
    two = {"stuff_classes": of(2), "ignore_label": 255}
    with pytest.raises(UserError, match="has 2 classes, but the model 19 classes"):
        check_predicted_classes(cfg, named(**two, evaluator_type="video_sem_seg"))
    check_predicted_classes(cfg, named(**two))  # no labels
    check_predicted_classes(cfg, named(evaluator_type="video_sem_seg"))  # nobody knows
    check_predicted_classes(cfg, named(stuff_classes=of(19), evaluator_type="video_sem_seg"))
    panoptic = load_config("joint_coco_panoptic.yaml")
    with pytest.raises(UserError, match="has 2 classes, but the model 80 things"):
        check_predicted_classes(
            panoptic, named(thing_classes=of(2), evaluator_type="video_instance")
        )


def test_training_needs_the_models_classes_and_its_value_of_no_class(named):
    cfg = load_config("joint_cityscapes.yaml")
    check_trained_classes(cfg, "cityscapes_fine_sem_seg_train", SemanticTask)
    check_trained_classes(cfg, named(thing_classes=of(19)), InstanceTask)
    with pytest.raises(UserError, match="has 3 classes, but the model 19 classes"):
        check_trained_classes(cfg, named(stuff_classes=of(3), thing_classes=of(19)), SemanticTask)
    other = named(stuff_classes=of(19), ignore_label=100)
    with pytest.raises(UserError, match=r"by 100, but MODEL\.SEM_SEG_HEAD\.IGNORE_VALUE is 255"):
        check_trained_classes(cfg, other, SemanticTask)
