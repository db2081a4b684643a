"""Reads maps at points, and draws points where a mask is least certain (PointRend).

detectron2's project PointRend has both, but importing it registers its heads and needs OpenCV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Reads (N, C, H, W) maps at (N, P, 2) points, bilinearly; returns (N, C, P).

    Points are x and y; (0, 0) and (1, 1) are the outer corners of the corner pixels. Outside the
    map everything is 0.
    """
    grid = 2.0 * points[:, :, None] - 1.0
    return F.grid_sample(maps, grid, align_corners=False)[..., 0]


def uncertain_points(
    logits: Tensor, num_points: int, *, oversample_ratio: float, importance_sample_ratio: float
) -> Tensor:
    """Draws points, most of them where a mask's logit is close to 0 (PointRend, Section 3.1).

    The logit is read at the point itself: between pixels of -1 and 1 lies a 0.

    Args:
        logits: (N, 1, H, W), one mask each.
        num_points: P, points per mask.
        oversample_ratio: candidates, which are drawn uniformly, per point; at least 1.
        importance_sample_ratio: share of the P points that are the least certain candidates; the
            others are drawn uniformly.

    Returns:
        (N, P, 2) points as :func:`point_sample` takes them.
    """
    count, device = len(logits), logits.device
    candidates = torch.rand(count, int(num_points * oversample_ratio), 2, device=device)
    certainty = point_sample(logits, candidates)[:, 0].abs()
    uncertain = int(importance_sample_ratio * num_points)
    chosen = (-certainty).topk(uncertain, dim=1).indices
    points = candidates.gather(1, chosen[:, :, None].expand(-1, -1, 2))
    if uncertain == num_points:
        return points
    others = torch.rand(count, num_points - uncertain, 2, device=device)
    return torch.cat([points, others], dim=1)
