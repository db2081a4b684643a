"""Do the classes of a data set and of a model agree? Asked before a stream or a training starts."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ttt_video.errors import UserError

_TASK_OF_TYPE = {
    "sem_seg": "semantic",
    "cityscapes_sem_seg": "semantic",
    "video_sem_seg": "semantic",
    "coco": "instance",
    "video_instance": "instance",
    "coco_panoptic_seg": "panoptic",
    "video_panoptic": "panoptic",
}
"""``evaluator_type`` of a data set's metadata to the kind of its labels."""


def class_names(kind: str, metadata: Any) -> list[str]:
    """Returns the names of the contiguous classes of one kind of labels; [] where nobody says."""
    return list(metadata.get("thing_classes" if kind == "instance" else "stuff_classes") or [])


def check_predicted_classes(cfg: CfgNode, dataset_name: str) -> None:
    """Refuses a data set whose labels a model's predictions cannot be compared with.

    A data set without an ``evaluator_type`` has no labels to compare, and every model suits it.

    Args:
        cfg: of the model.
        dataset_name: registered, and loaded (COCO's classes are read with its json); "" for videos
            without a data set.

    Raises:
        UserError: the numbers of classes differ.
    """
    metadata = MetadataCatalog.get(dataset_name) if dataset_name else None
    task = _TASK_OF_TYPE.get(metadata.get("evaluator_type")) if metadata else None
    if task is None:
        return
    number, what = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, "classes"
    if task == "instance" and cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON and cfg.DATASETS.TRAIN:
        # The instances of a panoptic model are things alone.
        source = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        things = source.get("thing_dataset_id_to_contiguous_id")
        number, what = (len(things), "things") if things else (number, what)
    _compare(dataset_name, len(class_names(task, metadata)), number, what)


def check_trained_classes(cfg: CfgNode, dataset_name: str, task: str) -> None:
    """Refuses a data set whose labels a model cannot be trained on.

    Args:
        cfg: of the model.
        dataset_name: registered, and loaded.
        task: what the model is trained for: "semantic", "instance" or "panoptic".

    Raises:
        UserError: the numbers of classes differ, or the values that stand for "no class".
    """
    metadata = MetadataCatalog.get(dataset_name)
    number = len(class_names(task, metadata))
    _compare(dataset_name, number, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, "classes")
    ignored, ours = metadata.get("ignore_label"), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if task == "semantic" and ignored is not None and ignored != ours:
        raise UserError(
            f"data set {dataset_name} marks pixels of no class by {ignored}, but "
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ours}: set it to {ignored}"
        )


def _compare(dataset_name: str, labelled: int, predicted: int, what: str) -> None:
    if labelled and labelled != predicted:
        raise UserError(
            f"data set {dataset_name} has {labelled} classes, but the model {predicted} {what}: "
            "choose a model of these classes, or set MODEL.SEM_SEG_HEAD.NUM_CLASSES (with "
            "TTT.NEW_CLASSES True to train a new class layer)"
        )
