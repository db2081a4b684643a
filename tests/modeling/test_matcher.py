"""The matcher against plain loops over costs and over every assignment."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ttt_video.modeling.matcher import HungarianMatcher, pairwise_mask_cost


def centres(size: int) -> Tensor:
    """(1, size**2, 2) the (x, y) of every pixel centre, row by row."""
    axis = (torch.arange(size) + 0.5) / size
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)


@pytest.fixture
def at_every_pixel(monkeypatch):
    """The random points of the matcher become the 16 pixel centres of a 4x4 map."""
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: centres(4))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cost_by_hand(logits: list[float], mask: list[float]) -> tuple[float, float]:
    """Mean cross-entropy and smoothed dice of one prediction and one mask."""
    cross_entropy = 0.0
    for x, y in zip(logits, mask, strict=True):
        cross_entropy -= y * math.log(sigmoid(x)) + (1 - y) * math.log(1 - sigmoid(x))
    overlap = sum(sigmoid(x) * y for x, y in zip(logits, mask, strict=True))
    total = sum(map(sigmoid, logits)) + sum(mask)
    return cross_entropy / len(logits), 1 - (2 * overlap + 1) / (total + 1)


def test_pairwise_costs():
    torch.manual_seed(0)
    logits, masks = 2 * torch.randn(4, 6), torch.rand(3, 6).round()
    cross_entropy, dice = pairwise_mask_cost(logits, masks)
    for q, n in itertools.product(range(4), range(3)):
        expected = cost_by_hand(logits[q].tolist(), masks[n].tolist())
        assert (cross_entropy[q, n].item(), dice[q, n].item()) == pytest.approx(expected, rel=1e-5)


def random_problem(queries: int, counts: list[int], classes: int = 3):
    torch.manual_seed(queries)
    outputs = {
        "pred_logits": torch.randn(len(counts), queries, classes + 1),
        "pred_masks": torch.randn(len(counts), queries, 4, 4),
    }
    targets = [
        {"labels": torch.randint(classes, (n,)), "masks": torch.randn(n, 4, 4) > 0} for n in counts
    ]
    return outputs, targets


@pytest.mark.parametrize("weights", [(2.0, 5.0, 5.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)], ids=str)
def test_least_cost_of_all_assignments(at_every_pixel, weights):
    outputs, targets = random_problem(5, [2, 3])
    names = ("cost_class", "cost_mask", "cost_dice")
    matcher = HungarianMatcher(**dict(zip(names, weights, strict=True)), num_points=16)
    matches = matcher(outputs, targets)
    for b, target in enumerate(targets):
        probs = outputs["pred_logits"][b].softmax(-1)
        cost = {}
        for q, n in itertools.product(range(5), range(len(target["labels"]))):
            mask_costs = cost_by_hand(
                outputs["pred_masks"][b, q].flatten().tolist(),
                target["masks"][n].flatten().float().tolist(),
            )
            parts = (-probs[q, target["labels"][n]].item(), *mask_costs)
            cost[q, n] = sum(w * c for w, c in zip(weights, parts, strict=True))
        size = range(len(target["labels"]))
        totals = [
            sum(cost[q, n] for q, n in zip(chosen, size, strict=True))
            for chosen in itertools.permutations(range(5), len(size))
        ]
        found = dict(zip(*(x.tolist() for x in reversed(matches[b])), strict=True))
        assert sorted(found) == list(size)
        assert len(set(found.values())) == len(size)
        assert sum(cost[q, n] for n, q in found.items()) == pytest.approx(min(totals), abs=1e-5)


def test_an_image_without_masks():
    outputs, targets = random_problem(3, [0, 2])
    matcher = HungarianMatcher(cost_class=1, cost_mask=1, cost_dice=1, num_points=20)
    (queries, indices), other = matcher(outputs, targets)
    assert queries.tolist() == indices.tolist() == []
    assert queries.dtype == torch.int64
    assert len(other[0]) == 2


def test_more_masks_than_queries():
    outputs, targets = random_problem(2, [4])
    matcher = HungarianMatcher(cost_class=1, cost_mask=1, cost_dice=1, num_points=20)
    ((queries, indices),) = matcher(outputs, targets)
    assert queries.tolist() == [0, 1]
    assert len(set(indices.tolist())) == 2


def test_masks_of_another_size_than_the_predictions():
    """Points are relative, so a prediction at stride 4 finds its full-size mask."""
    torch.manual_seed(0)
    small = torch.rand(3, 8, 8) < 0.5
    masks = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    outputs = {
        "pred_logits": torch.zeros(1, 3, 2),
        "pred_masks": (20.0 * small - 10)[None, [2, 0, 1]],
    }
    matcher = HungarianMatcher(cost_class=0, cost_mask=1, cost_dice=1, num_points=200)
    ((queries, indices),) = matcher(
        outputs, [{"labels": torch.zeros(3, dtype=torch.int64), "masks": masks}]
    )
    assert indices[queries.argsort()].tolist() == [2, 0, 1]


def test_no_gradient_is_kept():
    outputs, targets = random_problem(3, [2])
    outputs = {k: v.requires_grad_() for k, v in outputs.items()}
    matcher = HungarianMatcher(cost_class=1, cost_mask=1, cost_dice=1, num_points=20)
    ((queries, indices),) = matcher(outputs, targets)
    assert not queries.requires_grad
    assert not indices.requires_grad
