"""Hungarian matching between queries and ground-truth masks (Mask2Former, Section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .points import point_sample

Target = dict[str, Tensor]
"""``labels`` (N,) int64 class ids and ``masks`` (N, H, W) bool of one image."""

Match = tuple[Tensor, Tensor]
"""Indices of n queries and of the masks they are matched to, (n,) int64 each."""


def pairwise_mask_cost(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns binary cross-entropy and dice of every prediction with every mask, (Q, N) each.

    ``logits`` (Q, P) and ``masks`` (N, P), 0..1, are values at the same P points.
    """
    points = logits.shape[1]
    positive, negative = F.softplus(-logits), F.softplus(logits)
    cross_entropy = (positive @ masks.T + negative @ (1 - masks).T) / points
    probs = logits.sigmoid()
    overlap = 2 * probs @ masks.T
    total = probs.sum(-1)[:, None] + masks.sum(-1)[None, :]
    return cross_entropy, 1 - (overlap + 1) / (total + 1)


class HungarianMatcher(nn.Module):
    """Finds the one-to-one assignment of least cost; masks are compared at random points."""

    def __init__(
        self, *, cost_class: float, cost_mask: float, cost_dice: float, num_points: int
    ) -> None:
        """``cost_*`` are weights of the three costs; ``num_points`` are sampled per image."""
        super().__init__()
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], targets: list[Target]) -> list[Match]:
        """Returns the matches of each image.

        ``outputs`` has ``pred_logits`` (B, Q, K + 1) and ``pred_masks`` (B, Q, h, w).
        """
        from scipy.optimize import linear_sum_assignment  # 0.5 s, which only training needs

        matches = []
        for logits, mask_logits, target in zip(
            outputs["pred_logits"].float(), outputs["pred_masks"].float(), targets, strict=True
        ):
            # A prediction that is not finite is matched last, so that the loss shows it; the
            # assignment would fail. It is 0 in the matrix products, which might spread a NaN to
            # other rows.
            finite = mask_logits.isfinite().all(2).all(1)[:, None]
            cost = self._cost(logits, mask_logits.where(finite[:, None], 0), target)
            worst = torch.finfo(cost.dtype).max
            cost = cost.masked_fill(~finite, worst)
            cost = cost.nan_to_num(nan=worst, posinf=worst, neginf=worst)
            queries, indices = linear_sum_assignment(cost.cpu().numpy())
            matches.append((torch.as_tensor(queries), torch.as_tensor(indices)))
        return matches

    def _cost(self, logits: Tensor, mask_logits: Tensor, target: Target) -> Tensor:
        """Returns the (Q, N) costs of one image."""
        # Sums over thousands of points overflow float16 and lose digits in bfloat16.
        with torch.autocast(mask_logits.device.type, enabled=False):
            # All masks of an image are compared at the same points.
            points = torch.rand(1, self.num_points, 2, device=mask_logits.device)
            predicted = point_sample(mask_logits[None], points)[0]
            masks = target["masks"].to(mask_logits.dtype)
            sampled = point_sample(masks[None], points)[0]
            cross_entropy, dice = pairwise_mask_cost(predicted, sampled)
            return (
                self.cost_class * -logits.softmax(-1)[:, target["labels"]]
                + self.cost_mask * cross_entropy
                + self.cost_dice * dice
            )
