"""MaskFormerTTT: one encoder f with the main-task head h and the reconstruction decoder g."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from .criterion import LossNormalizers, SetCriterion
from .graphs import unstacked
from .heads import MaskFormerTTTHead
from .interface import OBJECT_OUTPUTS, output_size
from .matcher import HungarianMatcher, Target
from .pixel_classes import MainTask, covered_cells, image_area, pixel_classes, pixel_entropy
from .postprocess import Postprocessing, semantic_inference
from .reconstructing import DenseModel
from .targets import count_masks, prepare_target


@META_ARCH_REGISTRY.register()
class MaskFormerTTT(DenseModel):
    """Mask2Former that can also reconstruct masked images (paper, Section 4.3).

    Parameters have the names of Mask2Former and of the published joint checkpoints:
    ``backbone.*``, ``sem_seg_head.*``, ``recon_head.*``, ``criterion.empty_weight``.
    """

    sem_seg_head: MaskFormerTTTHead

    @configurable
    def __init__(
        self,
        *,
        criterion: SetCriterion,
        deep_supervision: bool,
        postprocess: Postprocessing,
        **common: Any,
    ) -> None:
        """
        Args:
            criterion: weighted main-task losses.
            deep_supervision: supervise every layer of h.
            postprocess: makes the outputs.
            common: arguments of :class:`DenseModel`.
        """
        super().__init__(**common)
        self.criterion = criterion
        self.deep_supervision = deep_supervision
        self.postprocess = postprocess

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads ``MODEL.*``, ``TTT.*``, ``TEST.DETECTIONS_PER_IMAGE`` and the training metadata."""
        common = cls.common_arguments(cfg)
        former = cfg.MODEL.MASK_FORMER
        matcher = HungarianMatcher(
            cost_class=former.CLASS_WEIGHT,
            cost_mask=former.MASK_WEIGHT,
            cost_dice=former.DICE_WEIGHT,
            num_points=former.TRAIN_NUM_POINTS,
        )
        criterion = SetCriterion(
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            matcher=matcher,
            weights={
                "loss_ce": former.CLASS_WEIGHT,
                "loss_mask": former.MASK_WEIGHT,
                "loss_dice": former.DICE_WEIGHT,
            },
            no_object_weight=former.NO_OBJECT_WEIGHT,
            num_points=former.TRAIN_NUM_POINTS,
            oversample_ratio=former.OVERSAMPLE_RATIO,
            importance_sample_ratio=former.IMPORTANCE_SAMPLE_RATIO,
        )
        return {
            **common,
            "criterion": criterion,
            "deep_supervision": former.DEEP_SUPERVISION,
            "postprocess": Postprocessing.from_config(cfg),
        }

    @property
    def outputs(self) -> frozenset[str]:
        return self.postprocess.outputs

    def loss_normalizers(self, batched_inputs: list[dict[str, Any]], parts: int) -> LossNormalizers:
        """Counts the divisors of a batch's losses, which is computed in ``parts`` forward passes.

        The inputs are this process's share of the batch. With these normalizers, the mean of the
        passes' losses is the loss of the whole batch.
        """
        counts = [count_masks(x, self.sem_seg_head.ignore_value) for x in batched_inputs]
        predictor: Any = self.sem_seg_head.predictor
        return self.criterion.normalizers(counts, predictor.query_feat.num_embeddings, parts)

    def main_losses(
        self, batched_inputs: list[dict[str, Any]], normalizers: LossNormalizers | None = None
    ) -> dict[str, Tensor]:
        """Returns l_m(h(f(x)), y), the labelled loss: ``loss_ce*``, ``loss_mask*``, ``loss_dice*``.

        Labels are ``instances`` (``gt_classes``; ``gt_masks`` as BitMasks, PolygonMasks or an
        (N, H, W) tensor) or a ``sem_seg`` map (H, W).
        """
        images = self.normalize(batched_inputs)
        targets: list[Target] = [
            prepare_target(
                x,
                images.tensor.shape[-2:],
                num_classes=self.sem_seg_head.num_classes,
                ignore_label=self.sem_seg_head.ignore_value,
                device=self.device,
            )
            for x in batched_inputs
        ]
        predictions = self.sem_seg_head(
            self.encode(images.tensor), every_layer=self.deep_supervision
        )
        return self.criterion(predictions, targets, normalizers)

    def main_task(
        self, batched_inputs: list[dict[str, Any]], *, mask_with: torch.Generator | None = None
    ) -> MainTask:
        """Returns h(f(x)) before post-processing, at the stride of the mask logits (4 px).

        ``mask_with`` is a CPU generator that draws masks of patches to hide, as in reconstruction.
        """
        images = self.normalize(batched_inputs)
        visible = None
        if mask_with is not None:
            visible = self.masks.of_batch(batched_inputs, images, mask_with)
        output = self.sem_seg_head(self.encode(images.tensor, visible))[-1]
        mask_logits = output["pred_masks"]
        inside = image_area(images, *mask_logits.shape[-2:])
        return MainTask(pixel_classes(output["pred_logits"], mask_logits), inside)

    def prediction_entropy(
        self, returned: Sequence[Mapping[str, Tensor]], size: Sequence[int], /
    ) -> Tensor:
        """Returns how unsure the prediction of one image is: nats, the mean over its pixels.

        A pixel may be nothing, whatever the outputs are, so that a doubt about which query has a
        pixel counts beside that about the class (:func:`pixel_entropy`).

        Args:
            returned: what h returned in the forward pass.
            size: height and width of the image, whose padding does not count.
        """
        class_logits, masks = returned[-1]["pred_logits"], returned[-1]["pred_masks"]
        rows, columns = covered_cells(size, self._padded(size[1]) / masks.shape[-1])
        pixels = pixel_classes(class_logits, masks[..., :rows, :columns])
        return pixel_entropy(pixels, background=True).mean()

    def predict(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns h(f(x)) as detectron2's outputs: ``sem_seg`` (K, height, width), ``instances``,
        ``panoptic_seg``, as ``MODEL.MASK_FORMER.TEST.*`` asks; and ``finite``, a bool.
        """
        images = self.normalize(batched_inputs)
        return self._outputs(batched_inputs, images.image_sizes, self._logits(images.tensor))

    def prediction_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """Returns ``scores`` and ``labels`` of a semantic model, logits of queries of the others.

        They are those of :class:`~ttt_video.modeling.interface.ExportableModel`.
        """
        pixels = self.normalize(unstacked(images)).tensor
        class_logits, masks = self._logits(pixels)
        masks = F.interpolate(masks, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
        masks = masks[..., : images.shape[-2], : images.shape[-1]]
        result: dict[str, Tensor] = {}
        if self.postprocess.semantic:
            scores = semantic_inference(class_logits[0], masks[0])[None]
            result |= {"scores": scores, "labels": scores.argmax(1).int()}
        if self.outputs & OBJECT_OUTPUTS:
            result |= {"class_logits": class_logits, "mask_logits": masks}
        return result

    def replayed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the part of :meth:`predict` that a graph can replay, for images of one size.

        Args:
            images: (B, 3, H, W) uint8.

        Returns:
            Class logits (B, Q, K + 1), and mask logits (B, Q, h, w) of the padded images.
        """
        return self._logits(self.normalize(unstacked(images)).tensor)

    def finished(
        self, batched_inputs: list[dict[str, Any]], logits: tuple[Tensor, Tensor]
    ) -> list[dict[str, Any]]:
        """Returns the rest of :meth:`predict`, of inputs and what :meth:`replayed` returns."""
        sizes = [(x["image"].shape[-2], x["image"].shape[-1]) for x in batched_inputs]
        return self._outputs(batched_inputs, sizes, logits)

    def _logits(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.sem_seg_head(self.encode(pixels))[-1]
        return outputs["pred_logits"], outputs["pred_masks"]

    def _outputs(
        self,
        batched_inputs: list[dict[str, Any]],
        image_sizes: Sequence[tuple[int, int]],
        logits: tuple[Tensor, Tensor],
    ) -> list[dict[str, Any]]:
        class_logits, all_masks = logits[0].float(), logits[1]
        height, width = (self._padded(max(sides)) for sides in zip(*image_sizes, strict=True))
        # Images go one at a time, as full-size masks of all queries are by far the largest tensors.
        results = []
        for i, (x, size) in enumerate(zip(batched_inputs, image_sizes, strict=True)):
            masks = all_masks[i]
            result = self.postprocess(
                class_logits[i], masks, (height, width), size, *output_size(x, size)
            )
            # A sum is finite only if its terms are, and it needs no second tensor of their size.
            scores = class_logits[i].sum() + masks.sum(dtype=torch.float32)
            results.append({**result, "finite": scores.isfinite()})
        return results
