"""Quantised colours: which bins there are, soft targets and the way back, priors and weights."""

from __future__ import annotations

import math

import pytest
import torch

from ttt_video.color import bins as color_bins
from ttt_video.color.bins import ColorBins, SoftBins, is_grey, rebalancing_weights
from ttt_video.color.lab import rgb_to_lab

# Lowest and highest b of the published bins, by a.
PUBLISHED = {
    -90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100), -40: (-40, 100),
    -30: (-50, 100), -20: (-50, 100), -10: (-60, 100), 0: (-70, 100), 10: (-80, 90), 20: (-80, 90),
    30: (-90, 90), 40: (-100, 90), 50: (-100, 80), 60: (-110, 80), 70: (-110, 80), 80: (-110, 70),
    90: (-110, 70), 100: (-90, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def bins() -> ColorBins:
    return ColorBins().double()


def colours(steps: int) -> torch.Tensor:
    """ab of a grid of the whole sRGB cube, its corners included: (1, 2, steps^3, 1)."""
    line = torch.linspace(0, 1, steps, dtype=torch.float64)
    return rgb_to_lab(torch.cartesian_prod(line, line, line).T[None, :, :, None])[:, 1:]


def image(*ab: tuple[float, float]) -> torch.Tensor:
    """(1, 2, 1, N) of N colours."""
    return torch.tensor(ab, dtype=torch.float64).T[None, :, None]


def all_distances(bins: ColorBins, ab: torch.Tensor) -> SoftBins:
    """The definition, from the distances to all bins."""
    square = (ab[:, None] - bins.centres[None, :, :, None, None]).square().sum(2)
    near, indices = (t[:, :10] for t in square.sort(dim=1, stable=True))
    weights = (-near / (2 * 5**2)).exp()
    return SoftBins(indices, weights / weights.sum(1, keepdim=True))


def test_the_bins_are_the_published_ones(bins):
    expected = [(a, b) for a, (low, high) in PUBLISHED.items() for b in range(low, high + 1, 10)]
    assert len(bins) == len(expected) == 313
    assert [tuple(centre) for centre in bins.centres.tolist()] == expected


def test_every_colour_lies_between_bins(bins):
    known = {tuple(centre) for centre in bins.centres.tolist()}
    cells = (colours(33)[0, :, :, 0] / 10).floor().T * 10
    for a, b in cells.unique(dim=0).tolist():
        assert {(a, b), (a + 10, b), (a, b + 10), (a + 10, b + 10)} <= known


def test_targets_are_those_of_all_distances(bins):
    generator = torch.Generator().manual_seed(0)
    anywhere = 220 * torch.rand(2, 2, 40, 50, generator=generator, dtype=torch.float64) - 110
    for ab in (anywhere, colours(12)):
        encoded, expected = bins.encode(ab), all_distances(bins, ab)
        assert torch.equal(encoded.indices, expected.indices)
        torch.testing.assert_close(encoded.weights, expected.weights, atol=1e-12, rtol=0)


def test_parts_of_a_batch_are_put_together_again(bins, monkeypatch):
    ab = 60 * torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    whole = bins.encode(ab)
    monkeypatch.setattr("ttt_video.color.bins._CHUNK", 7)
    for tensor, expected in zip(bins.encode(ab), whole, strict=True):
        assert torch.equal(tensor, expected)


def test_ties_go_to_the_first_bins_on_every_grid_point(bins):
    halves = torch.arange(-110.0, 111, 5, dtype=torch.float64)  # bins, and points between them
    ab = torch.cartesian_prod(halves, halves).T[None, :, :, None]
    assert torch.equal(bins.encode(ab).indices, all_distances(bins, ab).indices)


def test_targets_by_hand(bins):
    # (5, 5) is between four bins, at 50 of squared distance; eight follow at 250, six count.
    indices, weights = bins.encode(image((5, 5)))
    near, far = math.exp(-1), math.exp(-5)
    expected = [near] * 4 + [far] * 6
    total = 4 * near + 6 * far
    assert weights.flatten().tolist() == pytest.approx([w / total for w in expected])
    assert {tuple(c) for c in bins.centres[indices.flatten()[:4]].tolist()} == {
        (0, 0), (0, 10), (10, 0), (10, 10),
    }  # fmt: skip


def test_colours_beyond_the_table_count_as_its_edge(bins):
    outside, edge = bins.encode(image((-300, 130))), bins.encode(image((-110, 110)))
    assert torch.equal(outside.indices, edge.indices)
    assert torch.equal(outside.weights, edge.weights)


def test_dense_targets_have_the_same_weights(bins):
    encoded = bins.encode(colours(4).reshape(1, 2, 8, 8))
    dense = encoded.dense(313)
    assert dense.shape == (1, 313, 8, 8)
    torch.testing.assert_close(dense.sum(1), torch.ones(1, 8, 8).double())
    assert torch.equal(dense.gather(1, encoded.indices), encoded.weights)
    assert ((dense > 0).sum(1) == 10).all()


def test_what_is_decoded_is_near_what_was_encoded(bins):
    ab = colours(18)
    logits = bins.encode(ab).dense(313).log()
    plain = (bins.decode(logits, temperature=1) - ab).norm(dim=1)
    annealed = (bins.decode(logits) - ab).norm(dim=1)
    assert plain.max() < 0.45
    assert annealed.max() < 2.8  # drawn to the nearest bin
    assert plain.mean() < 0.25


def test_the_annealed_mean_is_its_definition(bins):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 313, 3, 4, generator=generator, dtype=torch.float64)
    probs = logits.softmax(1)
    power = (probs.log() / 0.38).exp()
    power = power / power.sum(1, keepdim=True)
    expected = (power[:, :, None] * bins.centres[None, :, :, None, None]).sum(1)
    torch.testing.assert_close(bins.decode(logits), expected)
    mean = (probs[:, :, None] * bins.centres[None, :, :, None, None]).sum(1)
    torch.testing.assert_close(bins.decode(logits, temperature=1), mean)
    likeliest = bins.centres[logits.argmax(1)].permute(0, 3, 1, 2)
    torch.testing.assert_close(bins.decode(logits, temperature=1e-4), likeliest)


def test_single_precision_is_near(bins):
    ab = colours(8)
    single = ColorBins().encode(ab.float()).dense(313)
    torch.testing.assert_close(single.double(), bins.encode(ab).dense(313), atol=1e-5, rtol=0)
    assert single.dtype == torch.float32


def test_histograms_add_up(bins):
    ab = colours(6)
    counts = bins.histogram(ab)
    assert counts.sum().item() == pytest.approx(6**3)
    torch.testing.assert_close(counts, bins.encode(ab).dense(313).sum((0, 2, 3)))
    parts = [bins.histogram(part) for part in ab.split(50, dim=2)]
    torch.testing.assert_close(counts, sum(parts))


def test_checkpoints_hold_nothing_of_it(bins):
    assert bins.state_dict() == {}


@pytest.mark.parametrize(
    ("ab", "grey"),
    [([(0, 0), (5, -5)], True), ([(0, 0), (5.1, 0)], False), ([(0, -5.1), (0, 0)], False)],
)
def test_grey_images(ab, grey):
    assert is_grey(torch.cat([image(*ab), image((40, 0), (0, 0))])).tolist() == [grey, False]


def test_weights_by_hand():
    # p = 3/4, 1/4, 0, 0, and a half of 1/4 each: 1/2, 1/4, 1/8, 1/8; inverse 2, 4, 8, 8, whose
    # mean under p is 2.5.
    weights = rebalancing_weights(torch.tensor([6.0, 2.0, 0.0, 0.0]).double())
    assert weights.tolist() == pytest.approx([0.8, 1.6, 3.2, 3.2])


@pytest.mark.parametrize("mix", [0.1, 0.5, 1.0])
def test_weights_have_a_mean_of_one(bins, mix):
    counts = bins.histogram(colours(6) / 2)
    weights = rebalancing_weights(counts, mix)
    assert (weights * counts / counts.sum()).sum().item() == pytest.approx(1)
    assert torch.equal(weights.argmax(), counts.argmin()) or mix == 1
    if mix == 1:
        torch.testing.assert_close(weights, torch.ones_like(weights))


def test_weights_of_nothing_are_refused():
    with pytest.raises(ValueError, match="all training images grey"):
        rebalancing_weights(torch.zeros(313))
    for mix in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="above 0 and up to 1"):
            rebalancing_weights(torch.tensor([1.0, 0.0]), mix)


def test_predictions_need_no_table_of_neighbours(monkeypatch):
    """It takes longer than all else of the bins, and streams that never train h have no targets."""

    def asked(centres):
        raise LookupError

    monkeypatch.setattr(color_bins, "_near_cells", asked)
    bins = ColorBins()
    assert bins.decode(torch.zeros(1, 313, 2, 2)).shape == (1, 2, 2, 2)
    with pytest.raises(LookupError):
        bins.encode(torch.zeros(1, 2, 2, 2))


def test_colours_that_are_not_finite_are_grey():
    broken = torch.full((1, 2, 1, 1), float("nan"))
    found = ColorBins().encode(broken)
    assert torch.equal(found.indices, ColorBins().encode(torch.zeros(1, 2, 1, 1)).indices)
