"""Mappers from a dataset record to a model's input; the training mapper serves all tasks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances
from torch.nn import functional as F

from ..errors import UserError
from ..formats.images import BadFrame, FrameTransform
from ..tasks import Augmented, Task, tasks
from .catalog import read_pixels
from .color_jitter import SSDColorJitter
from .grey import grey_input

IMAGE_PAD_VALUE = 128  # mid grey, as Mask2Former and detectron2's FixedSizeCrop pad

Record = dict[str, Any]


def mapper_names() -> dict[str, tuple[type[Task], str]]:
    """Returns task and way of cropping for each value of ``INPUT.DATASET_MAPPER_NAME``."""
    return {name: (task, style) for task in tasks() for name, style in task.mappers.items()}


class JointDatasetMapper:
    """Reads, augments and pads one training sample, and makes the target of its main task.

    The result has the record's own keys and

    - ``image``: (3, H, W) uint8 in ``image_format`` order;
    - ``instances``: detectron2 ``Instances`` with ``gt_classes`` (N,) int64 and ``gt_masks``
      (``BitMasks``), padded like the image, without masks that the augmentation emptied;
    - ``sem_seg``: (H, W) int64, padded with ``ignore_label``, for the semantic task only.

    The model draws the patch masks, in training as at test time.

    Args:
        task: ``kind`` of the task whose labels are read.
        augmentations: detectron2's, applied in order.
        image_format: "RGB" or "BGR".
        ignore_label: label of pixels without ground truth.
        size_divisibility: px; height and width are padded to a multiple of it, 0 for none.
        is_train: must be True; `EvaluationMapper` is for evaluation.
        labelled: False reads no labels and makes no target: the result has ``image`` alone.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        labelled: bool = True,
        task: str,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "RGB",
        ignore_label: int = 255,
        size_divisibility: int = 0,
    ):
        if not is_train:
            raise ValueError("JointDatasetMapper makes training samples; use EvaluationMapper")
        trainable = {each.kind: each for each, _ in mapper_names().values()}
        if task not in trainable:
            raise ValueError(f"task must be one of {tuple(trainable)}, not {task!r}")
        self.task = trainable[task]
        self.labelled = labelled
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.ignore_label = ignore_label
        self.size_divisibility = size_divisibility

    @classmethod
    def from_config(
        cls, cfg: CfgNode, is_train: bool = True, *, labelled: bool = True
    ) -> dict[str, Any]:
        """Returns the arguments that ``INPUT.DATASET_MAPPER_NAME`` stands for."""
        name, known = cfg.INPUT.DATASET_MAPPER_NAME, mapper_names()
        if name not in known:
            raise UserError(
                f"INPUT.DATASET_MAPPER_NAME is {name!r}; choose one of {', '.join(known)}"
            )
        task, style = known[name]
        if style == "lsj":
            augmentations = large_scale_jitter(cfg)
        else:
            if labelled and task.objects_key and cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA < 1.0:
                raise UserError(
                    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA below 1 needs semantic labels, which "
                    f"{name} does not read; set it to 1.0"
                )
            augmentations = resize_and_crop(cfg, labelled=labelled)
        return {
            "is_train": is_train,
            "labelled": labelled,
            "task": task.kind,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "size_divisibility": max(cfg.INPUT.SIZE_DIVISIBILITY, 0),
        }

    def __call__(self, record: Record) -> Record:
        """Maps one detectron2 dataset dict, which is not modified.

        Raises:
            UserError: the record lacks the label that the task needs, a file cannot be read, or
                the sizes of image, labels and record differ.
        """
        record = copy.deepcopy(record)
        if not self.labelled:
            return self._unlabelled(record)
        self.task.require_labels(record)
        image = read_image(record, self.image_format)
        labels = self.task.training_labels(record)
        is_map = isinstance(labels, np.ndarray)
        if is_map and labels.shape[:2] != image.shape[:2]:
            own, wanted = ("x".join(map(str, pixels.shape[:2])) for pixels in (labels, image))
            name = record[self.task.label_keys[0]]
            raise UserError(f"{name} has {own} pixels, but its image {wanted}")
        # The augmentations need the labels, because a crop may ask which classes it would have.
        augmented = T.AugInput(image, sem_seg=labels if is_map and labels.ndim == 2 else None)
        transforms = self.augmentations(augmented)
        if augmented.sem_seg is not None:
            labels = augmented.sem_seg
            class_map = torch.from_numpy(labels.astype(np.int64))
            record["sem_seg"] = self._pad(class_map, self.ignore_label)
        elif is_map:
            labels = transforms.apply_segmentation(labels)
        moved = Augmented(augmented.image.shape[:2], transforms, self.ignore_label)
        classes, masks = self.task.training_target(labels, record, moved)
        for key in self.task.label_keys:
            record.pop(key, None)

        visible = masks.any(axis=(1, 2))
        record["image"] = self._pixels(augmented.image)
        bitmasks = self._pad(torch.from_numpy(masks[visible]), 0)
        instances = Instances(tuple(bitmasks.shape[-2:]))
        instances.gt_classes = torch.from_numpy(classes[visible])
        instances.gt_masks = BitMasks(bitmasks)
        record["instances"] = instances
        return record

    def _unlabelled(self, record: Record) -> Record:
        """Returns the augmented image of a record that may have labels."""
        augmented = T.AugInput(read_image(record, self.image_format))
        self.augmentations(augmented)
        others = {key: value for key, value in record.items() if key not in self.task.label_keys}
        return {**others, "image": self._pixels(augmented.image)}

    def _pixels(self, image: np.ndarray) -> torch.Tensor:
        """Returns a padded (3, H, W) of an (H, W, 3) image."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return self._pad(pixels, IMAGE_PAD_VALUE)

    def _pad(self, tensor: torch.Tensor, value: int) -> torch.Tensor:
        """Pads (..., H, W) at the right and bottom."""
        if self.size_divisibility == 0:
            return tensor
        height, width = tensor.shape[-2:]
        right, bottom = -width % self.size_divisibility, -height % self.size_divisibility
        return F.pad(tensor, (0, right, 0, bottom), value=value)


class EvaluationMapper:
    """Reads and resizes one image for prediction, as a stream does with its frames.

    The result has the record's own keys, ``image`` (3, h, w) uint8, and ``height`` and ``width`` of
    the file or its single crop. Where ``INPUT.GREY`` says so the image is grey, and ``grey``
    (1, height, width) uint8 is there, too. Labels that an evaluator takes from its inputs, such as
    ``class_id`` and ``original_file_name``, stay; ``annotations`` and ``sem_seg_file_name``, which
    detectron2's evaluators read from the catalog, do not.
    """

    def __init__(self, cfg: CfgNode):
        self.transform = FrameTransform.from_config(cfg)
        self.grey = cfg.INPUT.GREY != "off"

    def __call__(self, record: Record) -> Record:
        """Maps one detectron2 dataset dict, which is not modified.

        Raises:
            UserError: the image cannot be read, or has another size than the record says.
        """
        mapped = {k: v for k, v in record.items() if k not in ("annotations", "sem_seg_file_name")}
        image = self.transform.view(read_image(mapped, "RGB"))
        mapped["height"], mapped["width"] = image.shape[:2]
        if self.grey:
            pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            return {**mapped, **grey_input(pixels, self.transform)}
        return {**mapped, "image": self.transform(image)}


def read_image(record: Record, image_format: str) -> np.ndarray:
    """Reads a record's image, (H, W, 3) uint8, and checks or sets the record's size."""
    try:
        image = read_pixels(record)
    except BadFrame as error:
        # error_of_process knows the errors of workers by the name UserError.
        raise UserError(str(error)) from error
    try:
        utils.check_image_size(record, image)
    except utils.SizeMismatchError as error:
        raise UserError(" ".join(str(error).split())) from error
    return image[:, :, ::-1] if image_format == "BGR" else image


def resize_and_crop(cfg: CfgNode, *, labelled: bool) -> list[T.Augmentation | T.Transform]:
    """Returns Mask2Former's Cityscapes recipe: random size, crop, SSD's colour jitter, flip.

    Without labels no crop is drawn again because one class fills it.
    """
    size = cfg.INPUT
    augmentations: list[T.Augmentation | T.Transform] = [
        T.ResizeShortestEdge(size.MIN_SIZE_TRAIN, size.MAX_SIZE_TRAIN, size.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if size.CROP.ENABLED:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                size.CROP.TYPE,
                size.CROP.SIZE,
                size.CROP.SINGLE_CATEGORY_MAX_AREA if labelled else 1.0,
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            )
        )
    if size.COLOR_AUG_SSD:
        augmentations.append(SSDColorJitter(size.FORMAT))
    return augmentations + _flip(cfg)


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation | T.Transform]:
    """Returns Mask2Former's COCO recipe: flip, random scale, square crop padded to full size."""
    side = cfg.INPUT.IMAGE_SIZE
    return [
        *_flip(cfg),
        T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, side, side),
        # 0 is "no object" in instance masks and "no segment" in panoptic maps. detectron2's default
        # of 255 would extend every RLE mask over the padding.
        T.FixedSizeCrop((side, side), pad_value=IMAGE_PAD_VALUE, seg_pad_value=0),
    ]


def _flip(cfg: CfgNode) -> list[T.Augmentation]:
    direction = cfg.INPUT.RANDOM_FLIP
    if direction == "none":
        return []
    return [T.RandomFlip(horizontal=direction == "horizontal", vertical=direction == "vertical")]
