"""The main-task losses against hand arithmetic at every pixel, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ttt_video.modeling import criterion as module
from ttt_video.modeling.criterion import SetCriterion, dice, sigmoid_cross_entropy
from ttt_video.modeling.matcher import HungarianMatcher

WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 3.0}


class FixedMatches(nn.Module):
    def __init__(self, *matches: tuple[list[int], list[int]]) -> None:
        super().__init__()
        self.matches = [tuple(torch.tensor(x, dtype=torch.int64) for x in m) for m in matches]

    def forward(self, outputs, targets):
        return self.matches


def make(matcher: nn.Module, **changes) -> SetCriterion:
    options = {
        "matcher": matcher,
        "weights": WEIGHTS,
        "no_object_weight": 0.1,
        "num_points": 16,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
    }
    return SetCriterion(2, **(options | changes))


@pytest.fixture
def at_every_pixel(monkeypatch):
    """The chosen points become the 16 pixel centres of a 4x4 map."""
    axis = (torch.arange(4) + 0.5) / 4
    centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)
    monkeypatch.setattr(
        module,
        "uncertain_points",
        lambda logits, *args, **ratios: centres.expand(len(logits), -1, -1),
    )


def predictions(seed: int = 0, batch: int = 2) -> dict[str, Tensor]:
    """Three queries, two classes, 4x4 masks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pred_logits": torch.randn(batch, 3, 3, generator=generator).requires_grad_(),
        "pred_masks": torch.randn(batch, 3, 4, 4, generator=generator).requires_grad_(),
    }


def targets(*labels: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [
        {
            "labels": torch.tensor(x, dtype=torch.int64),
            "masks": torch.rand(len(x), 4, 4, generator=generator) < 0.5,
        }
        for x in labels
    ]


MATCHES = ([0, 2], [1, 0]), ([1], [0])
"""Query 0 with mask 1 and 2 with 0 in the first image, 1 with 0 in the second."""


def expected_losses(outputs, truth, matches) -> dict[str, float]:
    """The definitions, one query and one pixel at a time."""
    count = max(sum(len(t["labels"]) for t in truth), 1)
    ce = ce_weight = bce = dices = 0.0
    for b, (queries, indices) in enumerate(matches):
        pairs = dict(zip(queries, indices, strict=True))
        for q in range(3):
            label = truth[b]["labels"][pairs[q]].item() if q in pairs else 2
            logits = outputs["pred_logits"][b, q].tolist()
            weight = 0.1 if label == 2 else 1.0
            ce -= weight * (logits[label] - math.log(sum(map(math.exp, logits))))
            ce_weight += weight
        for q, n in pairs.items():
            overlap = total = 0.0
            for y in range(4):
                for x in range(4):
                    p = 1 / (1 + math.exp(-outputs["pred_masks"][b, q, y, x].item()))
                    inside = bool(truth[b]["masks"][n, y, x])
                    bce -= math.log(p if inside else 1 - p) / 16
                    overlap += 2 * p * inside
                    total += p + inside
            dices += 1 - (overlap + 1) / (total + 1)
    return {
        "loss_ce": 2.0 * ce / ce_weight,
        "loss_mask": 5.0 * bce / count,
        "loss_dice": 3.0 * dices / count,
    }


def test_losses_by_hand(at_every_pixel):
    outputs, truth = predictions(), targets([1, 0], [1])
    losses = make(FixedMatches(*MATCHES))([outputs], truth)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        expected_losses(outputs, truth, MATCHES), rel=1e-5
    )


def test_every_supervised_prediction_has_its_own_losses(at_every_pixel):
    layers = [predictions(seed) for seed in range(3)]
    truth = targets([1, 0], [1])
    losses = make(FixedMatches(*MATCHES))(layers, truth)
    assert len(losses) == 9
    for suffix, outputs in zip(("_0", "_1", ""), layers, strict=True):
        for name, value in expected_losses(outputs, truth, MATCHES).items():
            assert losses[name + suffix].item() == pytest.approx(value, rel=1e-5)


def test_each_prediction_is_matched_for_itself():
    """Two layers that agree on the masks in another order of the queries have the same losses."""
    truth = targets([0, 1])
    masks = torch.full((1, 3, 4, 4), -5.0)
    masks[0, :2] = 10.0 * truth[0]["masks"] - 5
    logits = torch.tensor([[[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]]])
    first = {"pred_logits": logits, "pred_masks": masks}
    second = {k: v[:, [2, 0, 1]] for k, v in first.items()}
    matcher = HungarianMatcher(cost_class=2, cost_mask=5, cost_dice=5, num_points=100)
    losses = make(matcher)([first, second], truth)
    assert losses["loss_ce_0"].item() == pytest.approx(losses["loss_ce"].item())
    assert losses["loss_ce"] < 0.1


@pytest.mark.parametrize("labels", [([], []), ([], [1])], ids=str)
def test_images_without_masks(at_every_pixel, labels):
    """All queries learn "no object" there; the losses stay finite and differentiable."""
    outputs, truth = predictions(), targets(*labels)
    matches = tuple((list(range(len(x))), list(range(len(x)))) for x in labels)
    losses = make(FixedMatches(*matches))([outputs], truth)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        expected_losses(outputs, truth, matches), rel=1e-5
    )
    sum(losses.values()).backward()
    assert outputs["pred_masks"].grad is not None
    assert not outputs["pred_masks"].grad[0].any()
    assert outputs["pred_logits"].grad.abs().sum() > 0


def test_losses_are_normalised_over_all_processes(at_every_pixel, monkeypatch):
    """Three masks in six queries here, seven in twelve there: five masks per process, and five
    matched queries and four that are not."""
    outputs, truth = predictions(), targets([1, 0], [1])
    criterion = make(FixedMatches(*MATCHES))
    alone = criterion([outputs], truth)
    monkeypatch.setattr(module.comm, "get_world_size", lambda: 2)
    other = torch.tensor([7.0, 7.0, 5.0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda totals: totals.add_(other))
    together = criterion([outputs], truth)
    for name in ("loss_mask", "loss_dice"):
        assert together[name].item() == pytest.approx(alone[name].item() * 3 / 5, rel=1e-5)
    ratio = (3 + 3 * 0.1) / (5 + 4 * 0.1)
    assert together["loss_ce"].item() == pytest.approx(alone["loss_ce"].item() * ratio, rel=1e-5)


@pytest.mark.parametrize("labels", [([1, 0], [1]), ([], [1]), ([], []), ([0, 1, 1, 0, 1], [])])
def test_parts_of_a_batch_have_its_losses(at_every_pixel, labels):
    """Images with few masks and with many, and more masks than queries."""
    outputs, truth = predictions(), targets(*labels)
    matches = [tuple(list(range(min(len(x), 3))) for _ in range(2)) for x in labels]
    whole = make(FixedMatches(*matches))([outputs], truth)
    parts = []
    for i in range(2):
        part = make(FixedMatches(matches[i]))
        normalizers = part.normalizers([len(x) for x in labels], num_queries=3, parts=2)
        inputs = {name: value[i : i + 1] for name, value in outputs.items()}
        parts.append(part([inputs], truth[i : i + 1], normalizers))
    for name, loss in whole.items():
        mean = (parts[0][name].item() + parts[1][name].item()) / 2
        assert mean == pytest.approx(loss.item(), rel=1e-5)


def test_gradients_reach_matched_masks_only(at_every_pixel):
    outputs, truth = predictions(), targets([1, 0], [1])
    sum(make(FixedMatches(*MATCHES))([outputs], truth).values()).backward()
    touched = outputs["pred_masks"].grad.flatten(2).any(-1)
    assert touched.tolist() == [[True, False, True], [False, True, False]]
    assert outputs["pred_logits"].grad.any(-1).all()


@pytest.mark.parametrize("loss", [sigmoid_cross_entropy, dice])
def test_gradcheck_of_the_mask_losses(loss):
    torch.manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(3, 7, dtype=torch.float64).round()
    assert torch.autograd.gradcheck(lambda x: loss(x, masks, 2.0), logits)


def test_gradcheck_of_the_classification():
    torch.manual_seed(0)
    criterion = make(FixedMatches(*MATCHES))
    truth = targets([1, 0], [1])

    def loss(logits: Tensor) -> Tensor:
        return criterion.loss_labels({"pred_logits": logits}, truth, criterion.matcher.matches, 3.3)

    logits = torch.randn(2, 3, 3, requires_grad=True)
    (analytic,) = torch.autograd.grad(loss(logits), logits)
    for position in [(0, 0, 1), (0, 1, 2), (1, 1, 0)]:
        ends = []
        for step in (1e-2, -1e-2):
            moved = logits.detach().clone()
            moved[position] += step
            ends.append(loss(moved))
        difference = (ends[0] - ends[1]).item() / 2e-2
        assert analytic[position].item() == pytest.approx(difference, abs=1e-4)


def test_points_are_taken_where_the_prediction_is_uncertain():
    """The left half says nothing (log 2 of loss), the right half is surely right (no loss)."""
    torch.manual_seed(0)
    logits = torch.full((1, 3, 32, 32), 20.0)
    logits[..., :16] = 0
    outputs = {"pred_logits": torch.zeros(1, 3, 3), "pred_masks": logits}
    truth = [{"labels": torch.tensor([0]), "masks": torch.ones(1, 32, 32, dtype=torch.bool)}]
    matcher = FixedMatches(([0], [0]))

    def loss(importance: float) -> float:
        criterion = make(matcher, num_points=200, importance_sample_ratio=importance)
        return criterion([outputs], truth)["loss_mask"].item() / WEIGHTS["loss_mask"]

    assert loss(1.0) == pytest.approx(math.log(2), rel=0.05)
    assert loss(0.0) == pytest.approx(math.log(2) / 2, rel=0.3)


def test_a_perfect_prediction_costs_nothing(at_every_pixel):
    truth = targets([1, 0])
    outputs = {
        "pred_logits": torch.tensor([[[0.0, 50, 0], [0, 0, 50], [50, 0, 0]]]),
        "pred_masks": torch.zeros(1, 3, 4, 4),
    }
    outputs["pred_masks"][0, [0, 2]] = 100.0 * truth[0]["masks"] - 50
    for name, loss in make(FixedMatches(([0, 2], [0, 1])))([outputs], truth).items():
        assert loss < 1e-6, name


def test_the_weight_of_no_object_is_a_buffer_of_the_checkpoint():
    state = make(FixedMatches()).state_dict()
    assert list(state) == ["empty_weight"]
    torch.testing.assert_close(state["empty_weight"], torch.tensor([1.0, 1.0, 0.1]))
