"""From a dataset record to a training input: one mapper for all three segmentation tasks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances
from detectron2.structures.masks import polygons_to_bitmask
from pycocotools import mask as rle
from torch.nn import functional as F

from ttt_video.data.color_jitter import SSDColorJitter
from ttt_video.data.images import BadFrame, FrameTransform, read_rgb
from ttt_video.data.kitti_step import read_sem_seg
from ttt_video.data.labels import read_segment_colors
from ttt_video.errors import UserError

# Mask2Former pads images with mid grey before normalisation, detectron2's FixedSizeCrop too.
IMAGE_PAD_VALUE = 128

# INPUT.DATASET_MAPPER_NAME, as Mask2Former names them: the task, and the way of cropping.
MAPPER_NAMES: dict[str, tuple[str, str]] = {
    "mask_former_semantic": ("semantic", "crop"),
    "mask_former_instance": ("instance", "crop"),
    "mask_former_panoptic": ("panoptic", "crop"),
    "coco_instance_lsj": ("instance", "lsj"),
    "coco_panoptic_lsj": ("panoptic", "lsj"),
}

TASKS = ("semantic", "instance", "panoptic")
_LABEL_KEYS = {
    "semantic": ("sem_seg_file_name",),
    "instance": ("annotations",),
    "panoptic": ("pan_seg_file_name", "segments_info"),
}

Record = dict[str, Any]
Target = tuple[np.ndarray, np.ndarray]  # classes (N,) int64 and masks (N, H, W) bool, N >= 0


def semantic_target(sem_seg: np.ndarray, ignore_label: int) -> Target:
    """One mask per class that occurs in an already transformed (H, W) label map."""
    classes = np.unique(sem_seg)
    classes = classes[classes != ignore_label]
    return classes.astype(np.int64), sem_seg[None] == classes[:, None, None]


def instance_target(
    annotations: Sequence[Record], image_shape: tuple[int, int], transforms: T.TransformList
) -> Target:
    """One mask per annotated object; crowds are left out.

    Args:
        annotations: detectron2's, with polygons, compressed RLE or a bitmap as "segmentation", in
            the coordinates of the original image.
        image_shape: (height, width) after ``transforms``.
        transforms: what was done to the image.
    """
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
    masks = np.zeros((len(objects), *image_shape), bool)
    for mask, annotation in zip(masks, objects, strict=True):
        shape = annotation["segmentation"]
        if isinstance(shape, list):
            # Moved point by point and clipped by the rasteriser: transforms.apply_polygons would
            # clip them with shapely, one more dependency for the same mask.
            polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in shape]
            moved = [transforms.apply_coords(polygon).reshape(-1) for polygon in polygons]
            mask[:] = polygons_to_bitmask(moved, *image_shape)
        else:
            bitmap = rle.decode(shape) if isinstance(shape, dict) else shape
            mask[:] = transforms.apply_segmentation(bitmap.astype(np.uint8))
    return np.array([annotation["category_id"] for annotation in objects], np.int64), masks


def panoptic_target(colors: np.ndarray, segments_info: Sequence[Record]) -> Target:
    """One mask per segment of an already transformed (H, W, 3) uint8 COCO panoptic map.

    A pixel's segment is ``R + 256 G + 65536 B``; crowds and unlisted segments are left out.
    """
    ids = colors.astype(np.int64) @ np.array([1, 256, 256**2])
    segments = [segment for segment in segments_info if not segment.get("iscrowd", 0)]
    classes = np.array([segment["category_id"] for segment in segments], np.int64)
    segment_ids = np.array([segment["id"] for segment in segments], np.int64)
    return classes, ids[None] == segment_ids[:, None, None]


class JointDatasetMapper:
    """Reads, augments and pads one training sample, and makes its main-task target.

    The result holds the record's own keys and

    - ``image``: (3, H, W) uint8 in ``image_format`` order;
    - ``instances``: detectron2 ``Instances`` with ``gt_classes`` (N,) int64 and ``gt_masks``
      (``BitMasks``), padded like the image, without masks that the augmentation emptied;
    - ``sem_seg``: (H, W) int64, padded with ``ignore_label``, for the semantic task only.

    Patch masks are not drawn here: the model draws a fresh one over the padded image in each
    forward pass, so that there is one place for it in training and at test time.

    Args:
        task: "semantic" reads ``sem_seg_file_name``, "instance" reads ``annotations``,
            "panoptic" reads ``pan_seg_file_name`` and ``segments_info``.
        augmentations: detectron2's, applied in order.
        image_format: "RGB" or "BGR".
        ignore_label: label of pixels without ground truth.
        size_divisibility: px; height and width are padded to a multiple of it, 0 for none.
        is_train: only training is supported; `EvaluationMapper` serves evaluation.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        task: Literal["semantic", "instance", "panoptic"],
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "RGB",
        ignore_label: int = 255,
        size_divisibility: int = 0,
    ):
        if not is_train:
            raise ValueError("JointDatasetMapper makes training samples; use EvaluationMapper")
        if task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, not {task!r}")
        self.task = task
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.ignore_label = ignore_label
        self.size_divisibility = size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The task and augmentation that ``INPUT.DATASET_MAPPER_NAME`` stands for."""
        name = cfg.INPUT.DATASET_MAPPER_NAME
        if name not in MAPPER_NAMES:
            raise UserError(
                f"INPUT.DATASET_MAPPER_NAME is {name!r}; choose one of {', '.join(MAPPER_NAMES)}"
            )
        task, style = MAPPER_NAMES[name]
        if style == "lsj":
            augmentations = large_scale_jitter(cfg)
        else:
            if task != "semantic" and cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA < 1.0:
                raise UserError(
                    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA below 1 needs semantic labels, which "
                    f"{name} does not read; set it to 1.0"
                )
            augmentations = resize_and_crop(cfg)
        return {
            "is_train": is_train,
            "task": task,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "size_divisibility": max(cfg.INPUT.SIZE_DIVISIBILITY, 0),
        }

    def __call__(self, record: Record) -> Record:
        """Maps one detectron2 dataset dict, which is not modified.

        Raises:
            UserError: the record lacks the label that the task needs, a file cannot be read, or
                image, labels and the size that the record says differ.
        """
        record = copy.deepcopy(record)
        missing = [key for key in _LABEL_KEYS[self.task] if key not in record]
        if missing:
            raise UserError(
                f"{record['file_name']}: the {self.task} task needs {missing[0]!r} in the "
                "dataset; choose another INPUT.DATASET_MAPPER_NAME or data set"
            )
        image = _read(record, self.image_format)
        sem_seg = None
        if self.task == "semantic":
            sem_seg = _sized(read_sem_seg(record), record["sem_seg_file_name"], image)
            del record["sem_seg_file_name"]
        augmented = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)
        shape = augmented.image.shape[:2]

        if self.task == "semantic":
            classes, masks = semantic_target(augmented.sem_seg, self.ignore_label)
            labels = torch.from_numpy(augmented.sem_seg.astype(np.int64))
            record["sem_seg"] = self._pad(labels, self.ignore_label)
        elif self.task == "instance":
            classes, masks = instance_target(record.pop("annotations"), shape, transforms)
        else:
            # Moved as the uint8 picture that it is: that is exact, and faster than on ids.
            file_name = record.pop("pan_seg_file_name")
            colors = _sized(read_segment_colors(file_name), file_name, image)
            colors = transforms.apply_segmentation(colors)
            classes, masks = panoptic_target(colors, record.pop("segments_info"))

        visible = masks.any(axis=(1, 2))
        pixels = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        record["image"] = self._pad(pixels, IMAGE_PAD_VALUE)
        bitmasks = self._pad(torch.from_numpy(masks[visible]), 0)
        instances = Instances(tuple(bitmasks.shape[-2:]))
        instances.gt_classes = torch.from_numpy(classes[visible])
        instances.gt_masks = BitMasks(bitmasks)
        record["instances"] = instances
        return record

    def _pad(self, tensor: torch.Tensor, value: int) -> torch.Tensor:
        """Pads (..., H, W) at the right and bottom."""
        if self.size_divisibility == 0:
            return tensor
        height, width = tensor.shape[-2:]
        right, bottom = -width % self.size_divisibility, -height % self.size_divisibility
        return F.pad(tensor, (0, right, 0, bottom), value=value)


class EvaluationMapper:
    """Reads and resizes one image for a model's prediction, as a stream does with its frames.

    The result holds the record's own keys without its labels, ``image`` (3, h, w) uint8, and the
    ``height`` and ``width`` of the file.
    """

    def __init__(self, cfg: CfgNode):
        self.transform = FrameTransform.from_config(cfg)

    def __call__(self, record: Record) -> Record:
        """Maps one detectron2 dataset dict, which is not modified.

        Raises:
            UserError: the image cannot be read, or has another size than the record says.
        """
        mapped = {k: v for k, v in record.items() if k not in ("annotations", "sem_seg_file_name")}
        image = _read(mapped, "RGB")
        return {**mapped, "image": self.transform(image)}


def _read(record: Record, image_format: str) -> np.ndarray:
    """Reads a record's image, (H, W, 3) uint8; the record learns its size, or must have it."""
    try:
        image = read_rgb(record["file_name"])
    except BadFrame as error:
        # The error of a loading process is known by the name of its class.
        raise UserError(str(error)) from error
    try:
        utils.check_image_size(record, image)
    except utils.SizeMismatchError as error:
        raise UserError(" ".join(str(error).split())) from error
    return image[:, :, ::-1] if image_format == "BGR" else image


def _sized(labels: np.ndarray, file_name: str, image: np.ndarray) -> np.ndarray:
    """Returns the labels, which must be as large as their image."""
    if labels.shape[:2] != image.shape[:2]:
        own, wanted = ("x".join(map(str, pixels.shape[:2])) for pixels in (labels, image))
        raise UserError(f"{file_name} has {own} pixels, but its image {wanted}")
    return labels


def resize_and_crop(cfg: CfgNode) -> list[T.Augmentation | T.Transform]:
    """Mask2Former's Cityscapes recipe: random size, random crop, SSD's colour jitter, flip."""
    size = cfg.INPUT
    augmentations: list[T.Augmentation | T.Transform] = [
        T.ResizeShortestEdge(size.MIN_SIZE_TRAIN, size.MAX_SIZE_TRAIN, size.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if size.CROP.ENABLED:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                size.CROP.TYPE,
                size.CROP.SIZE,
                size.CROP.SINGLE_CATEGORY_MAX_AREA,
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            )
        )
    if size.COLOR_AUG_SSD:
        augmentations.append(SSDColorJitter(size.FORMAT))
    return augmentations + _flip(cfg)


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation | T.Transform]:
    """Mask2Former's COCO recipe: flip, random scale, square crop padded to its full size."""
    side = cfg.INPUT.IMAGE_SIZE
    return [
        *_flip(cfg),
        T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, side, side),
        # Labels are padded with 0, which is "no object" in instance masks and "no segment" in
        # panoptic maps; detectron2's default of 255 would put every RLE mask into the padding.
        T.FixedSizeCrop((side, side), pad_value=IMAGE_PAD_VALUE, seg_pad_value=0),
    ]


def _flip(cfg: CfgNode) -> list[T.Augmentation]:
    direction = cfg.INPUT.RANDOM_FLIP
    if direction == "none":
        return []
    return [T.RandomFlip(horizontal=direction == "horizontal", vertical=direction == "vertical")]
