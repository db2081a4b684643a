"""Numbers of coloured pictures against other libraries, published pairs and hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import jensenshannon

from ttt_video.tasks.color_numbers import (
    channel_histograms,
    ciede2000,
    colorfulness,
    frechet_distance,
    inception_scores,
    jensen_shannon,
    mean_ciede2000,
    peak_signal_noise_ratio,
)

# Sharma, Wu and Dalal (2005), Table 1: L, a, b of two colours, and their difference.
SHARMA = """
50.0000 2.6772 -79.7751 50.0000 0.0000 -82.7485 2.0425
50.0000 3.1571 -77.2803 50.0000 0.0000 -82.7485 2.8615
50.0000 2.8361 -74.0200 50.0000 0.0000 -82.7485 3.4412
50.0000 -1.3802 -84.2814 50.0000 0.0000 -82.7485 1.0000
50.0000 -1.1848 -84.8006 50.0000 0.0000 -82.7485 1.0000
50.0000 -0.9009 -85.5211 50.0000 0.0000 -82.7485 1.0000
50.0000 0.0000 0.0000 50.0000 -1.0000 2.0000 2.3669
50.0000 -1.0000 2.0000 50.0000 0.0000 0.0000 2.3669
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0009 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0010 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0011 7.2195
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0012 7.2195
50.0000 -0.0010 2.4900 50.0000 0.0009 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0010 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0011 -2.4900 4.7461
50.0000 2.5000 0.0000 50.0000 0.0000 -2.5000 4.3065
50.0000 2.5000 0.0000 73.0000 25.0000 -18.0000 27.1492
50.0000 2.5000 0.0000 61.0000 -5.0000 29.0000 22.8977
50.0000 2.5000 0.0000 56.0000 -27.0000 -3.0000 31.9030
50.0000 2.5000 0.0000 58.0000 24.0000 15.0000 19.4535
50.0000 2.5000 0.0000 50.0000 3.1736 0.5854 1.0000
50.0000 2.5000 0.0000 50.0000 3.2972 0.0000 1.0000
50.0000 2.5000 0.0000 50.0000 1.8634 0.5757 1.0000
50.0000 2.5000 0.0000 50.0000 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def test_ciede2000_of_the_published_pairs():
    table = torch.tensor([[float(x) for x in line.split()] for line in SHARMA.split("\n") if line])
    columns = table.double().T[..., None]
    assert columns.shape == (7, 34, 1)
    for first, second in ((columns[:3], columns[3:6]), (columns[3:6], columns[:3])):
        np.testing.assert_allclose(ciede2000(first, second), columns[6], atol=5.1e-5)


def test_the_difference_of_colours_is_that_of_scikit_image():
    color = pytest.importorskip("skimage.color")
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    second[:5] = first[:5] // 8 * 8  # near and dark colours, and greys
    second[5:8] = second[5:8, :, :1]
    labs = [color.rgb2lab(picture) for picture in (first, second)]
    expected = color.deltaE_ciede2000(*labs)
    ours = [torch.from_numpy(lab.transpose(2, 0, 1)) for lab in labs]
    np.testing.assert_allclose(ciede2000(*ours), expected, atol=1e-9)
    found = mean_ciede2000(*[torch.from_numpy(p.transpose(2, 0, 1)) for p in (first, second)])
    assert found == pytest.approx(expected.mean(), abs=1e-9)


def test_equal_pictures_do_not_differ():
    greys = torch.arange(256, dtype=torch.uint8)[:, None].expand(3, -1, 1)
    assert mean_ciede2000(greys, greys) == 0
    assert peak_signal_noise_ratio(0, 300) == peak_signal_noise_ratio(1, 300)


def test_signal_to_noise_by_hand():
    assert peak_signal_noise_ratio(4 * 255**2, 4) == 0
    assert peak_signal_noise_ratio(255**2, 100) == pytest.approx(20)


def test_colourfulness_by_hand():
    red, grey = [255, 0, 0], [9, 9, 9]
    assert colorfulness(np.array([[grey, [200] * 3]], np.uint8)) == 0
    # rg is 255 and yb 127.5 everywhere: no deviation.
    uniform = np.array([[red, red]], np.uint8)
    assert colorfulness(uniform) == pytest.approx(0.3 * math.hypot(255, 127.5))
    # Half red, half grey: means and population deviations are both half of that.
    mixed = np.array([[red, grey]], np.uint8)
    assert colorfulness(mixed) == pytest.approx(1.3 * math.hypot(127.5, 63.75))
    # Red and green cancel in the mean of rg, which nothing makes absolute.
    opposed = np.array([[red, [0, 255, 0]]], np.uint8)
    assert colorfulness(opposed) == pytest.approx(255 + 0.3 * 127.5)


def test_divergence_of_histograms_is_scipys():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 40, (2, 6, 5, 3), dtype=np.uint8)
    first, second = map(channel_histograms, pictures)
    assert first.shape == (3, 256)
    assert first.sum(1).tolist() == [30] * 3
    assert first[1, pictures[0, 0, 0, 1]] == (pictures[0, ..., 1] == pictures[0, 0, 0, 1]).sum()
    expected = np.mean([jensenshannon(p, q) ** 2 for p, q in zip(first, second, strict=True)])
    assert jensen_shannon(first, second) == pytest.approx(expected, abs=1e-12)
    assert jensen_shannon(first, 3 * first) == 0
    black, white = (channel_histograms(np.full((2, 2, 3), v, np.uint8)) for v in (0, 255))
    assert jensen_shannon(black, white) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("n", "m"), [(40, 30), (12, 40), (6, 4)])
def test_frechet_distance_is_that_of_a_matrix_root(n, m):
    rng = np.random.default_rng(n)
    first = rng.normal(size=(n, 8)) @ rng.normal(size=(8, 8))
    second = rng.normal(size=(m, 8)) + 1
    found = frechet_distance(first, second)
    means = first.mean(0), second.mean(0)
    one, other = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(one @ other).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(one + other - 2 * root)
    # The root of a singular matrix is what sqrtm finds with half the digits.
    assert found == pytest.approx(expected, rel=1e-9 if min(n, m) > 8 else 1e-4)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_needs_two_pictures():
    assert frechet_distance(np.zeros((1, 3)), np.zeros((5, 3))) is None


def test_frechet_distance_and_inception_score_are_torchmetrics(monkeypatch):
    fid = pytest.importorskip("torchmetrics.image.fid")
    inception = pytest.importorskip("torchmetrics.image.inception")
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 50, 6))
    moments = [
        (torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T))) for x in (first, second)
    ]
    expected = fid._compute_fid(*moments[0], *moments[1])
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)

    logits = 3 * rng.normal(size=(50, 7))
    score = inception.InceptionScore(feature=torch.nn.Identity(), splits=10)
    score.features = [torch.from_numpy(logits)]
    # Theirs draws an order and cuts it; ours deals the pictures out.
    order = torch.arange(50).view(5, 10).T.reshape(-1)
    monkeypatch.setattr(torch, "randperm", lambda n: order)
    mean, deviation = score.compute()
    found = inception_scores(logits + rng.normal(size=(50, 1)), 10)
    assert np.mean(found) == pytest.approx(float(mean), rel=1e-12)
    assert np.std(found, ddof=1) == pytest.approx(float(deviation), rel=1e-9)


def test_inception_score_of_fewer_pictures_than_splits_is_undefined():
    assert inception_scores(np.zeros((3, 5)), 4) == ()
    assert inception_scores(np.zeros((4, 5)), 4) == [1.0] * 4
