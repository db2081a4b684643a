"""Turns the labels of any detectron2 mapper into class ids and masks for the criterion."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, PolygonMasks
from torch import Tensor

from ..errors import UserError
from .matcher import Target


def prepare_target(
    x: dict[str, Any],
    size: tuple[int, int],
    *,
    num_classes: int,
    ignore_label: int,
    device: torch.device,
) -> Target:
    """Returns the ground truth of one input, its masks zero-padded to the batch's size.

    Args:
        x: has ``instances`` (``gt_classes``; ``gt_masks`` as BitMasks, PolygonMasks or an (N, h, w)
            tensor), or else ``sem_seg`` (h, w), which gives one mask per class that occurs.
        size: (H, W) of the padded batch, px.
        num_classes: all labels are smaller.
        ignore_label: ``sem_seg`` value that belongs to no mask.
        device: where the result lives.

    Raises:
        UserError: the input lacks labels or masks, or has a label out of range.
    """
    name = x.get("file_name", "")
    if "instances" in x:
        instances = x["instances"]
        labels = instances.gt_classes.to(device)
        masks = _mask_tensor(instances, device)
        if len(masks) != len(labels):
            raise UserError(
                f"input {name!r} has {len(labels)} instances and {len(masks)} masks; with "
                "detectron2's own mapper, set MODEL.MASK_ON to True"
            )
    elif "sem_seg" in x:
        sem_seg = x["sem_seg"].to(device)
        labels = sem_seg.unique().long()
        labels = labels[labels != ignore_label]
        masks = sem_seg[None] == labels[:, None, None]
    else:
        raise UserError(
            f"input {name!r} has neither 'instances' nor 'sem_seg': training needs labels; "
            "check the data set and the mapper"
        )
    # A label of num_classes would silently mean "no object"; a higher one kills a GPU's context.
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise UserError(
            f"input {name!r} has label {outside[0].item()}; MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
            f"{num_classes}, so labels are 0 to {num_classes - 1}"
        )
    height, width = masks.shape[-2:]
    masks = F.pad(masks, (0, size[1] - width, 0, size[0] - height))
    return {"labels": labels, "masks": masks}


def count_masks(x: dict[str, Any], ignore_label: int) -> int:
    """Counts the masks that :func:`prepare_target` makes of an input, without making them."""
    if "instances" in x:
        return len(x["instances"])
    labels = x["sem_seg"].unique() if "sem_seg" in x else torch.empty(0)
    return int((labels != ignore_label).sum())


def _mask_tensor(instances: Any, device: torch.device) -> Tensor:
    if not instances.has("gt_masks"):  # an image without annotations
        return torch.zeros(0, *instances.image_size, dtype=torch.bool, device=device)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    if isinstance(masks, BitMasks):
        masks = masks.tensor
    return masks.to(device=device, dtype=torch.bool)
