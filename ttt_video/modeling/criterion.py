"""The main-task loss l_m, which is Mask2Former's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn

from .matcher import HungarianMatcher, Match, Target
from .points import point_sample, uncertain_points


def sigmoid_cross_entropy(logits: Tensor, masks: Tensor, num_masks: float) -> Tensor:
    """Returns the binary cross-entropy of (N, P) points: mean over points, sum over masks / n."""
    loss = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return loss.mean(1).sum() / num_masks


def dice(logits: Tensor, masks: Tensor, num_masks: float) -> Tensor:
    """Returns the dice loss of (N, P) points, smoothed by 1: sum over masks / n."""
    probs = logits.sigmoid()
    overlap = 2 * (probs * masks).sum(-1)
    total = probs.sum(-1) + masks.sum(-1)
    return (1 - (overlap + 1) / (total + 1)).sum() / num_masks


class LossNormalizers(NamedTuple):
    """Divisors of a batch's losses, each divided by the number of parts of the batch.

    Attributes:
        num_masks: number of masks in the whole batch, at least 1.
        class_weight: sum of the class weights of all queries in the whole batch.
    """

    num_masks: float
    class_weight: float


class SetCriterion(nn.Module):
    """Compares every supervised prediction with the masks that its queries are matched to."""

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        matcher: HungarianMatcher,
        weights: dict[str, float],
        no_object_weight: float,
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
    ) -> None:
        """
        Args:
            num_classes: K, without "no object".
            matcher: pairs queries with masks.
            weights: factors of ``loss_ce``, ``loss_mask`` and ``loss_dice``.
            no_object_weight: weight of "no object" in the classification.
            num_points: points per mask in the mask losses.
            oversample_ratio, importance_sample_ratio: PointRend's point selection.
        """
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weights = weights
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    def forward(
        self,
        predictions: list[dict[str, Tensor]],
        targets: list[Target],
        normalizers: LossNormalizers | None = None,
    ) -> dict[str, Tensor]:
        """Returns the weighted losses of all predictions.

        Args:
            predictions: the head's, from the first layer to the last.
            targets: one for each image.
            normalizers: those of the batch that these images are a part of; by default the images
                are this process's whole share of it.

        Returns:
            ``loss_ce``, ``loss_mask``, ``loss_dice`` of the last prediction, and the same with the
            suffix ``_0``, ``_1``, ... for the earlier ones.
        """
        if normalizers is None:
            counts = [len(t["labels"]) for t in targets]
            normalizers = self.normalizers(counts, predictions[-1]["pred_logits"].shape[1])
        # The last prediction goes first, because Mask2Former draws its random points in that order.
        named = {"": predictions[-1]} | {f"_{i}": p for i, p in enumerate(predictions[:-1])}
        losses = {}
        for suffix, outputs in named.items():
            matches = self.matcher(outputs, targets)
            values = {
                "loss_ce": self.loss_labels(outputs, targets, matches, normalizers.class_weight),
                **self.loss_masks(outputs, targets, matches, normalizers.num_masks),
            }
            losses.update({k + suffix: self.weights[k] * v for k, v in values.items()})
        return losses

    def normalizers(self, counts: list[int], num_queries: int, parts: int = 1) -> LossNormalizers:
        """Counts the divisors over all processes, each of which has ``parts`` forward passes.

        The mean of the losses over all passes of all processes is then the loss of the whole batch.
        Mask2Former does this for mask losses only; its classification loss is a weighted mean
        within each process, where a query of a process with few masks counts for more.

        ``counts`` are the masks in each of this process's images. Each of ``num_queries`` queries
        of an image is matched to at most one mask.
        """
        matched = sum(min(count, num_queries) for count in counts)
        unmatched = len(counts) * num_queries - matched
        totals = self.empty_weight.new_tensor([sum(counts), matched, unmatched])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(totals)
        masks, matched, unmatched = (totals / (parts * comm.get_world_size())).tolist()
        least = 1.0 / (parts * comm.get_world_size())
        weight = matched + unmatched * self.empty_weight[-1].item()
        return LossNormalizers(max(masks, least), weight)

    def loss_labels(
        self,
        outputs: dict[str, Tensor],
        targets: list[Target],
        matches: list[Match],
        class_weight: float,
    ) -> Tensor:
        """Returns the weighted cross-entropy of all queries, divided by ``class_weight``.

        Queries without a mask belong to "no object".
        """
        logits = outputs["pred_logits"].float()
        classes = torch.full(
            logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device
        )
        for row, target, (queries, indices) in zip(classes, targets, matches, strict=True):
            row[queries] = target["labels"][indices]
        summed = F.cross_entropy(
            logits.transpose(1, 2), classes, self.empty_weight, reduction="sum"
        )
        return summed / class_weight

    def loss_masks(
        self,
        outputs: dict[str, Tensor],
        targets: list[Target],
        matches: list[Match],
        num_masks: float,
    ) -> dict[str, Tensor]:
        """Returns cross-entropy and dice at points where the prediction is least certain."""
        logits = torch.cat(
            [m[queries] for m, (queries, _) in zip(outputs["pred_masks"], matches, strict=True)]
        )[:, None].float()
        with torch.no_grad():
            points = uncertain_points(
                logits,
                self.num_points,
                oversample_ratio=self.oversample_ratio,
                importance_sample_ratio=self.importance_sample_ratio,
            )
            # Images differ in size, so their masks are sampled one image at a time.
            per_image = points.split([len(queries) for queries, _ in matches])
            sampled = [
                point_sample(target["masks"][indices, None].to(logits.dtype), at)
                for target, (_, indices), at in zip(targets, matches, per_image, strict=True)
            ]
            masks = torch.cat(sampled).squeeze(1)
        at_points = point_sample(logits, points).squeeze(1)
        return {
            "loss_mask": sigmoid_cross_entropy(at_points, masks, num_masks),
            "loss_dice": dice(at_points, masks, num_masks),
        }
