"""Turns class and mask logits into detectron2's outputs, one image at a time."""

from __future__ import annotations

import itertools
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..errors import UserError
from .kernels import kernels_choice, use_kernels
from .tables import is_exporting

LEAST = 1 << 23
"""Numbers of enlarged masks from which a CPU makes them in bands; fewer gain little."""

BAND, FEWEST_ROWS = 1 << 20, 4
"""About the numbers of a band, and the rows of masks that it is of at least."""

ALIGNED = 8
"""Classes of a product on a GPU are filled up to a multiple of this: 16 bytes in bfloat16."""


def semantic_inference(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Returns each class's score at each pixel, the sum of class times mask probability.

    ``class_logits`` are (Q, K + 1), ``mask_logits`` (Q, H, W). The scores are (K, H, W) float and
    not normalised over classes.
    """
    return _summed_over_queries(class_logits, mask_logits.sigmoid())


def _summed_over_queries(class_logits: Tensor, mask_probs: Tensor) -> Tensor:
    probs = class_logits.softmax(-1)[:, :-1]
    return torch.einsum("qk,qhw->khw", probs, mask_probs)


def enlarged(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns mask logits (Q, h, w) at another size, (Q, H, W) float32."""
    return F.interpolate(
        mask_logits[None].float(), size=size, mode="bilinear", align_corners=False
    )[0]


def enlarged_semantic_inference(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]
) -> Tensor:
    """Returns :func:`semantic_inference` of :func:`enlarged` mask logits.

    Where the kernels run, no full-size mask is written but its probabilities in the dtype of the
    product, and they have no gradient.
    """
    if torch.is_grad_enabled() or not use_kernels(mask_logits):
        if not torch.is_grad_enabled() and _takes_bands(mask_logits, size):
            return _by_bands(class_logits, mask_logits, size)
        # In place, as a second tensor of this size takes longer to get than to fill.
        return _summed_over_queries(class_logits, enlarged(mask_logits, size).sigmoid_())
    from .kernels.masks import mask_probabilities
    from .kernels.norms import product_dtype

    probs = class_logits.softmax(-1)[:, :-1]
    classes = probs.shape[1]
    masks = mask_probabilities(mask_logits, size, product_dtype(probs))
    probs = F.pad(probs, (0, -classes % ALIGNED)).to(masks.dtype)
    return (probs.t() @ masks.flatten(1))[:classes].unflatten(1, size)


def _takes_bands(mask_logits: Tensor, size: tuple[int, int]) -> bool:
    """Returns whether enlarged masks are too large for a CPU's caches; a band is whole rows."""
    if is_exporting() or mask_logits.device.type != "cpu" or kernels_choice() == "off":
        return False
    if torch.is_autocast_enabled("cpu"):  # whose products have another dtype
        return False
    queries, height, _ = mask_logits.shape
    return queries * size[0] * size[1] >= LEAST and size[0] % height == 0


def _by_bands(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the scores from a few rows of the enlarged masks at a time.

    Channels are innermost, so that all queries of a pixel are interpolated at once. Numbers differ
    from those of whole masks by rounding.
    """
    queries, height, _ = mask_logits.shape
    factor = size[0] // height
    probs = class_logits.softmax(-1)[:, :-1].t()
    maps = mask_logits[None].float().contiguous(memory_format=torch.channels_last)
    scores = maps.new_empty(len(probs), *size)
    rows = max(BAND // (queries * size[1] * factor), FEWEST_ROWS)
    for top in range(0, height, rows):
        # One more row on either side, which interpolation reads.
        first, last = max(top - 1, 0), min(top + rows + 1, height)
        band = F.interpolate(
            maps[:, :, first:last],
            size=((last - first) * factor, size[1]),
            mode="bilinear",
            align_corners=False,
        )
        inside = slice(factor * top, factor * min(top + rows, height))
        band = band[:, :, inside.start - factor * first : inside.stop - factor * first]
        masks = band.permute(0, 2, 3, 1).reshape(-1, queries).sigmoid_()
        scores[:, inside] = (probs @ masks.t()).unflatten(1, (-1, size[1]))
    return scores


def resized(pictures: Tensor, image_size: tuple[int, int], height: int, width: int) -> Tensor:
    """Returns (C, H, W) without padding, bilinearly resized: (C, height, width).

    It is detectron2's function, which also interpolates between pixels that stay where they are.
    """
    if image_size == (height, width):
        return pictures[:, :height, :width]
    return sem_seg_postprocess(pictures, image_size, height, width)


def instance_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    topk: int,
    thing_classes: Set[int] | None = None,
) -> Instances:
    """Returns the ``topk`` highest scoring (query, class) pairs as instances.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, H, W).
        topk: number of instances, at most Q * K.
        thing_classes: the only classes to keep (the others are stuff); None keeps all.

    Returns:
        ``pred_masks`` (N, H, W) float 0/1, ``pred_boxes`` (zeros, as in Mask2Former, because mask
        metrics need none), ``scores`` (class probability times the mean probability inside the
        mask) and ``pred_classes``.
    """
    num_classes = class_logits.shape[-1] - 1
    class_probs = class_logits.softmax(-1)[:, :-1].flatten()
    scores, flat = class_probs.topk(min(topk, len(class_probs)), sorted=False)
    classes = flat % num_classes
    logits = mask_logits[torch.div(flat, num_classes, rounding_mode="floor")]
    if thing_classes is not None:
        things = torch.tensor(sorted(thing_classes), device=classes.device)
        keep = torch.isin(classes, things)
        scores, classes, logits = scores[keep], classes[keep], logits[keep]

    result = Instances((mask_logits.shape[-2], mask_logits.shape[-1]))
    result.pred_masks = (logits > 0).float()
    result.pred_boxes = Boxes(torch.zeros(len(logits), 4, device=logits.device))
    inside = result.pred_masks.flatten(1)
    mask_scores = (logits.sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
    result.scores = scores * mask_scores
    result.pred_classes = classes
    return result


def panoptic_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    object_mask_threshold: float,
    overlap_threshold: float,
    thing_classes: Set[int],
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Gives each pixel to one query; queries that lose most of their mask are dropped.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, H, W).
        object_mask_threshold: queries of a class probability up to this are dropped.
        overlap_threshold: segments that keep less than this share of their mask are dropped.
        thing_classes: contiguous ids of classes whose segments stay apart; segments of any other
            class are merged.

    Returns:
        (H, W) int32 segment ids (0 = none) and detectron2's ``segments_info``.
    """
    scores, labels = class_logits.softmax(-1).max(-1)
    no_object = class_logits.shape[-1] - 1
    keep = (labels != no_object) & (scores > object_mask_threshold)
    probs, scores, labels = mask_logits[keep].sigmoid(), scores[keep], labels[keep]

    segmentation = torch.zeros(mask_logits.shape[-2:], dtype=torch.int32, device=labels.device)
    segments: list[dict[str, Any]] = []
    if len(labels) == 0:
        return segmentation, segments
    winner = (scores[:, None, None] * probs).argmax(0)
    stuff_ids: dict[int, int] = {}
    for query, category in enumerate(labels.tolist()):
        own = probs[query] >= 0.5
        won = winner == query
        mask = own & won
        own_area = own.sum().item()
        if own_area == 0 or not mask.any() or won.sum().item() / own_area < overlap_threshold:
            continue
        is_thing = category in thing_classes
        if not is_thing and category in stuff_ids:
            segmentation[mask] = stuff_ids[category]
            continue
        segment_id = len(segments) + 1
        segmentation[mask] = segment_id
        if not is_thing:
            stuff_ids[category] = segment_id
        segments.append({"id": segment_id, "isthing": is_thing, "category_id": category})
    return segmentation, segments


@dataclass(frozen=True)
class Postprocessing:
    """Makes the outputs that ``MODEL.MASK_FORMER.TEST.*`` asks for.

    Attributes:
        semantic, instance, panoptic: which outputs are made.
        resize_masks: mask logits, not scores, are resized to the output size.
        object_mask_threshold, overlap_threshold: thresholds of panoptic inference.
        topk: number of instances per image.
        thing_classes: contiguous ids of the countable classes, which panoptic inference needs.
    """

    semantic: bool = True
    instance: bool = False
    panoptic: bool = False
    resize_masks: bool = False
    object_mask_threshold: float = 0.0
    overlap_threshold: float = 0.0
    topk: int = 100
    thing_classes: frozenset[int] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Postprocessing:
        """Reads the config, and the thing classes from the metadata of the first training set.

        Raises:
            UserError: panoptic outputs are asked for without known thing classes.
        """
        test, things = cfg.MODEL.MASK_FORMER.TEST, None
        if cfg.DATASETS.TRAIN:
            metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
            ids = metadata.get("thing_dataset_id_to_contiguous_id")
            things = None if ids is None else frozenset(ids.values())
        if test.PANOPTIC_ON and things is None:
            raise UserError(
                "MODEL.MASK_FORMER.TEST.PANOPTIC_ON needs to know the thing classes: name a data "
                "set with thing_dataset_id_to_contiguous_id metadata in DATASETS.TRAIN"
            )
        return cls(
            semantic=test.SEMANTIC_ON,
            instance=test.INSTANCE_ON,
            panoptic=test.PANOPTIC_ON,
            resize_masks=test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE
            or test.PANOPTIC_ON
            or test.INSTANCE_ON,
            object_mask_threshold=test.OBJECT_MASK_THRESHOLD,
            overlap_threshold=test.OVERLAP_THRESHOLD,
            topk=cfg.TEST.DETECTIONS_PER_IMAGE,
            thing_classes=things,
        )

    @property
    def outputs(self) -> frozenset[str]:
        """The keys of a prediction."""
        keys = ("sem_seg", "instances", "panoptic_seg")
        asked = (self.semantic, self.instance, self.panoptic)
        return frozenset(itertools.compress(keys, asked))

    def __call__(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        height: int,
        width: int,
    ) -> dict[str, Any]:
        """Makes the outputs of one image, at ``height`` and ``width`` px.

        ``class_logits`` are (Q, K + 1). ``mask_logits`` are (Q, h, w) of the image padded to
        ``padded_size``, whose height and width without padding are ``image_size``.
        """
        if self.outputs == {"sem_seg"} and not self.resize_masks:
            scores = enlarged_semantic_inference(class_logits, mask_logits, padded_size)
            return {"sem_seg": resized(scores, image_size, height, width)}
        result: dict[str, Any] = {}
        mask_logits = enlarged(mask_logits, padded_size)
        if self.resize_masks:
            mask_logits = resized(mask_logits, image_size, height, width)
        if self.semantic:
            scores = semantic_inference(class_logits, mask_logits)
            if not self.resize_masks:
                scores = resized(scores, image_size, height, width)
            result["sem_seg"] = scores
        if self.panoptic:
            assert self.thing_classes is not None
            result["panoptic_seg"] = panoptic_inference(
                class_logits,
                mask_logits,
                object_mask_threshold=self.object_mask_threshold,
                overlap_threshold=self.overlap_threshold,
                thing_classes=self.thing_classes,
            )
        if self.instance:
            things = self.thing_classes if self.panoptic else None
            result["instances"] = instance_inference(
                class_logits, mask_logits, topk=self.topk, thing_classes=things
            )
        return result
