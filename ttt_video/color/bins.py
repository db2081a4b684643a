"""Quantised colours (Zhang et al., 2016): bins of the ab plane, soft targets, and the way back.

A bin is a point of a grid of step 10 in the ab plane. Which of them there are: the sRGB cube fills
a region of the plane, and a cell of the grid belongs if it meets the convex hull of that region;
the bins are the corners of these cells. They are 313, the same as the published ones ("points in
hull"), in the same order. Only bins whose own colour some L has would be 229.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .lab import at_least_single, rgb_to_lab

STEP = 10
NEIGHBOURS = 10
SIGMA = 5.0
TEMPERATURE = 0.38
GREY_UP_TO = 5.0
"""An image is grey where no |a| and no |b| is larger; such images train nothing."""

_REACH = 110  # of all bins, in units of ab
_CELL = 2  # side of a cell with candidates of its own
_CHUNK = 65536  # pixels that are encoded at a time


class SoftBins(NamedTuple):
    """Soft targets, of each pixel the nearest bins, the nearest first.

    indices: (B, 10, H, W) int64, of bins. weights: (B, 10, H, W), positive, of sum 1.
    """

    indices: Tensor
    weights: Tensor

    def dense(self, num_bins: int) -> Tensor:
        """Returns the weights of all bins: (B, Q, H, W)."""
        batch, _, height, width = self.weights.shape
        empty = self.weights.new_zeros(batch, num_bins, height, width)
        return empty.scatter(1, self.indices, self.weights)


class ColorBins(nn.Module):
    """The 313 bins, which encode colours as targets and decode predictions.

    Nothing is learned, and nothing of it stands in checkpoints. ``centres`` is (313, 2), ascending
    in a, then in b.
    """

    centres: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", _centres().float(), persistent=False)
        self._table: Tensor | None = None  # only targets need it, and it takes 0.15 s

    def _candidates(self) -> Tensor:
        """Returns :func:`_near_cells` on the device, made when it is first asked for."""
        if self._table is None:
            self._table = _near_cells(self.centres.double().cpu())
        self._table = self._table.to(self.centres.device)
        return self._table

    def __len__(self) -> int:
        return len(self.centres)

    @torch.no_grad()
    def encode(self, ab: Tensor) -> SoftBins:
        """Returns soft targets: Gaussian weights (sigma 5) on the 10 nearest bins.

        The result is that of all distances; of equally near bins the first ones count. Only 17
        distances per pixel are computed, not 313.

        Args:
            ab: (B, 2, H, W) floats; values beyond -110 to 110, which sRGB has not, are clipped, and
                NaN is grey.
        """
        batch, _, height, width = ab.shape
        points = (
            at_least_single(ab)
            .permute(0, 2, 3, 1)
            .reshape(-1, 2)
            .nan_to_num()
            .clamp(-_REACH, _REACH)
        )
        parts = [self._nearest(part) for part in points.split(_CHUNK)]
        indices, weights = (
            torch.cat(tensors).reshape(batch, height, width, NEIGHBOURS).permute(0, 3, 1, 2)
            for tensors in zip(*parts, strict=True)
        )
        return SoftBins(indices, weights)

    def _nearest(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Returns indices and weights, (N, 10) each, of (N, 2) points."""
        side = 2 * _REACH // _CELL
        cells = ((points + _REACH) / _CELL).long().clamp(max=side - 1)
        known = self._candidates()[cells[:, 0] * side + cells[:, 1]].long()
        squares = (self.centres.to(points)[known] - points[:, None]).square().sum(-1)
        squares, order = squares.sort(stable=True)
        squares = squares[:, :NEIGHBOURS]
        weights = (-squares / (2 * SIGMA**2)).softmax(1)
        return known.gather(1, order[:, :NEIGHBOURS]), weights

    def decode(self, logits: Tensor, temperature: float = TEMPERATURE) -> Tensor:
        """Returns the annealed mean of the predicted distributions, in units of ab.

        Probabilities are raised to 1 / temperature and normalised again before their mean is taken:
        1 gives the plain mean, and towards 0 the likeliest bin.

        Args:
            logits: (B, 313, H, W).
            temperature: above 0.

        Returns:
            (B, 2, H, W).
        """
        probs = (at_least_single(logits) / temperature).softmax(1)
        return torch.einsum("bqhw,qc->bchw", probs, self.centres.to(probs))

    def histogram(self, ab: Tensor) -> Tensor:
        """Returns how many pixels each bin has, shared out as the soft targets do: (313,) float64.

        Their sum over the training images is the prior of :func:`rebalancing_weights`: soft targets
        smooth it with the paper's Gaussian. Grey images are to be left out (:func:`is_grey`).
        """
        indices, weights = self.encode(ab)
        counts = torch.zeros(len(self), dtype=torch.float64, device=ab.device)
        return counts.index_add(0, indices.flatten(), weights.flatten().double())


def is_grey(ab: Tensor) -> Tensor:
    """Says which images have no colour worth learning from: (B,) bool of (B, 2, H, W)."""
    return (ab.abs() <= GREY_UP_TO).flatten(1).all(1)


def rebalancing_weights(counts: Tensor, mix: float = 0.5) -> Tensor:
    """Returns the weight of each bin, so that rare colours count (Zhang et al., Section 2.2).

    w = 1 / ((1 - mix) p + mix / Q), scaled so that sum p w = 1.

    Args:
        counts: (Q,), the sum of :meth:`ColorBins.histogram` over the training images.
        mix: share of the uniform distribution in the prior p; 1 gives weights of 1.

    Raises:
        ValueError: nothing was counted, or ``mix`` is not in 0 to 1, or leaves a bin without share.
    """
    total = counts.sum()
    if not total > 0:
        raise ValueError("no colour was counted: are all training images grey?")
    prior = counts / total
    mixed = (1 - mix) * prior + mix / len(prior)
    if not 0 <= mix <= 1 or not (mixed > 0).all():
        raise ValueError(f"the share of the uniform distribution is above 0 and up to 1, not {mix}")
    weights = 1 / mixed
    return weights / (prior * weights).sum()


def _centres() -> Tensor:
    """(313, 2) float64."""
    from scipy.spatial import ConvexHull  # takes a while to import

    # The cube's twelve edges go round the region's hull, curved as they are in Lab.
    line = torch.linspace(0, 1, 256, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    edges = torch.cartesian_prod(line, ends, ends)
    edges = torch.cat([edges.roll(turn, 1) for turn in range(3)])
    region = rgb_to_lab(edges.T[:, :, None])[1:, :, 0].T.numpy()
    # A cell that the hull meets has its corners less than a step from the hull, in a and in b. All
    # such points are the hull of the region moved by a step both ways, both ways.
    square = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * STEP
    reached = ConvexHull((region[:, None] + square).reshape(-1, 2)).equations
    grid = np.arange(-_REACH - STEP, _REACH + STEP + 1, STEP, dtype=np.float64)
    points = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    inside = (points @ reached[:, :2].T + reached[:, 2] < 0).all(1)
    return torch.from_numpy(points[inside])


def _near_cells(centres: Tensor) -> Tensor:
    """Bins that may be among the 10 nearest of a point, by its cell: (110 * 110, C) int32.

    Between a cell's middle and a point of it the distance to any bin changes by at most half the
    cell's diagonal; so no other bin is nearer than the tenth. Ascending, and as many as the fullest
    cell has.
    """
    middles = torch.arange(-_REACH, _REACH, _CELL, dtype=torch.float64) + _CELL / 2
    rows = []
    for a in middles:
        distances = torch.cdist(torch.stack([a.expand_as(middles), middles], 1), centres)
        tenth = distances.kthvalue(NEIGHBOURS, dim=1).values
        rows.append(distances <= tenth[:, None] + _CELL * 2**0.5 + 1e-9)
    possible = torch.cat(rows)
    most = int(possible.sum(1).max())
    # Those of a cell that has fewer are filled up with bins that are farther away.
    return possible.byte().topk(most, dim=1).indices.sort(1).values.int()
