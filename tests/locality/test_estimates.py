"""Terms of the theory, from gradients whose laws are known, against loops and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from ttt_video.errors import UserError
from ttt_video.locality import Gradients, Sketch, estimate_locality
from ttt_video.locality.estimates import CHUNK, best_window, window_of_drift
from ttt_video.report.locality_figures import locality_table, plot_locality

WINDOWS, LAGS = (1, 2, 5), (1, 2, 3)


def gradients_of(main: np.ndarray, recon: np.ndarray, noise: float = 0.0) -> Gradients:
    """Two draws of (T, D) gradients, with independent noise of each draw."""
    rng = np.random.default_rng(1)
    draws = [
        np.stack([x + noise * rng.normal(size=x.shape) for _ in range(2)]) for x in (main, recon)
    ]
    frames = len(main)
    return Gradients("street", draws[0], draws[1], np.ones(frames), np.ones(frames))


def walk(frames: int, dimension: int, seed: int = 0, start: float = 3.0) -> np.ndarray:
    steps = np.random.default_rng(seed).normal(size=(frames, dimension)) / math.sqrt(dimension)
    return start / math.sqrt(dimension) + np.cumsum(steps, axis=0)


def test_terms_are_those_of_loops_over_frames_and_windows():
    rng = np.random.default_rng(2)
    main = walk(9, CHUNK + 3)
    recon = 0.5 * (main - rng.normal(size=main.shape) / 60)
    found = estimate_locality(gradients_of(main, recon), windows=WINDOWS, lags=LAGS)
    scale = (main * recon).sum() / (recon**2).sum()
    assert found.scale == pytest.approx(scale, rel=1e-9)
    assert found.main_norm**2 == pytest.approx((main**2).sum(1).mean(), rel=1e-9)
    cosine = (main * recon).sum() / math.sqrt((main**2).sum() * (recon**2).sum())
    assert found.cosine == pytest.approx(cosine, rel=1e-9)
    delta = main - scale * recon
    assert found.offset == pytest.approx((delta.mean(0) ** 2).sum(), rel=1e-9)
    assert found.sigma2 == pytest.approx(delta.var(0, ddof=1).sum(), rel=1e-9)
    for d in LAGS:
        for drift, x in ((found.drift, main), (found.recon_drift, scale * recon)):
            wanted = math.sqrt(((x[d:] - x[:-d]) ** 2).sum(1).mean())
            assert drift[d] == pytest.approx(wanted, rel=1e-9)
    assert found.beta_eta == found.drift[1]
    for k in WINDOWS:
        terms = {"bias": [], "variance": [], "error": []}
        for t in range(max(WINDOWS) - 1, 9):
            mean_main = main[t - k + 1 : t + 1].mean(0)
            mean_recon = scale * recon[t - k + 1 : t + 1].mean(0)
            terms["bias"].append(((mean_main - main[t]) ** 2).sum())
            terms["variance"].append(((mean_recon - mean_main) ** 2).sum())
            terms["error"].append(((mean_recon - main[t]) ** 2).sum())
        for name, values in terms.items():
            measured = getattr(found.windows[k], name)
            assert measured == pytest.approx(np.mean(values), rel=1e-9, abs=1e-12), (k, name)
        bound = k**2 * found.beta_eta**2 + found.sigma2 / k
        assert found.windows[k].bound == pytest.approx(bound, rel=1e-12)
    assert found.windows[1].bias == pytest.approx(0, abs=1e-12)
    assert found.best_error == min(WINDOWS, key=lambda k: found.windows[k].error)


def test_noise_of_the_draws_is_in_no_number():
    main = walk(60, 3000)
    recon = main + np.random.default_rng(3).normal(size=main.shape) / 40
    quiet = estimate_locality(gradients_of(main, recon), windows=WINDOWS, lags=LAGS)
    noisy = estimate_locality(gradients_of(main, recon, 0.05), windows=WINDOWS, lags=LAGS)
    # One draw's square would be 0.05^2 * 3000 = 7.5 larger, and a difference's twice that.
    assert noisy.main_norm**2 == pytest.approx(quiet.main_norm**2, abs=0.5)
    assert noisy.sigma2 == pytest.approx(quiet.sigma2, abs=0.5)
    for d in LAGS:
        assert noisy.drift[d] ** 2 == pytest.approx(quiet.drift[d] ** 2, abs=0.5)
    for k in WINDOWS:
        assert noisy.windows[k].error == pytest.approx(quiet.windows[k].error, abs=0.5)


def test_the_laws_of_a_walk_seen_through_noise():
    """q = 1 and tau^2 = 6: the window without labels is sqrt(3 * 6 / 1), within what 400 frames of
    4,000 numbers tell; errors of window means are tau^2 / k + q (k - 1) (2 k - 1) / (6 k)."""
    main = walk(400, 4000)
    recon = main + math.sqrt(6 / 4000) * np.random.default_rng(4).normal(size=main.shape)
    found = estimate_locality(
        gradients_of(main, recon), windows=(1, 2, 4, 8, 16), lags=(1, 2, 4, 8)
    )
    assert found.scale == pytest.approx(1, abs=0.05)
    assert found.sigma2 == pytest.approx(6, rel=0.05)
    assert found.beta_eta == pytest.approx(1, rel=0.05)
    assert found.best_bound == pytest.approx(3 ** (1 / 3), rel=0.1)
    assert found.best_unlabelled == pytest.approx(math.sqrt(18), rel=0.1)
    for k, terms in found.windows.items():
        # c fits the noise, too, so it is a little below 1.
        delta = found.scale**2 * 6 / k + (1 - found.scale) ** 2 * found.main_norm**2
        assert terms.variance == pytest.approx(delta, rel=0.1)
        assert terms.bias == pytest.approx((k - 1) * (2 * k - 1) / (6 * k), rel=0.1, abs=0.02)
        assert terms.bias <= k**2 * found.beta_eta**2
    assert found.best_error == 4


def test_best_windows_are_the_least_of_their_sums():
    for sigma2, drift in ((40.0, 0.3), (2.0, 1.0)):
        grid = np.linspace(0.2, 40, 200_000)
        best = grid[np.argmin(grid**2 * drift**2 + sigma2 / grid)]
        assert best_window(sigma2, drift) == pytest.approx(best, abs=1e-3)
    assert best_window(1.0, 0.0) == math.inf
    assert window_of_drift({d: 2 * 12 + 4.0 * d for d in (1, 2, 5)}) == pytest.approx(3)
    assert window_of_drift({1: 1.0, 2: 2.0}) == 1  # a walk without noise
    assert window_of_drift({1: 2.0, 2: 2.0}) == math.inf  # noise without drift


def test_short_videos_and_gradients_of_noise_are_refused():
    main = walk(5, 10)
    with pytest.raises(UserError, match="street has 5 frames; windows and lags of up to 5 frames"):
        estimate_locality(gradients_of(main, main), windows=(1, 5), lags=(1, 2))
    with pytest.raises(UserError, match="nothing but noise"):
        estimate_locality(gradients_of(main, 0 * main), windows=(1, 2), lags=(1, 2))


def test_a_sketch_keeps_inner_products_and_sums():
    rng = torch.Generator().manual_seed(5)
    vectors = torch.randn(40, 20_000, generator=rng)
    vectors[1::2] += vectors[::2]
    sketch = Sketch(20_000, 2048, seed=1)
    small = torch.stack([sketch(v) for v in vectors])
    assert small.shape == (40, 2048)
    torch.testing.assert_close(sketch(vectors[0] + vectors[1]), small[0] + small[1])
    lengths = vectors.norm(dim=1)
    off = (small @ small.T - vectors @ vectors.T) / torch.outer(lengths, lengths)
    # Its standard deviation is at most sqrt(2 / 2048) = 0.031.
    assert off.std() < 0.031
    assert abs(off.mean()) < 0.01
    whole = Sketch(100, 2048)
    assert torch.equal(whole(vectors[0, :100]), vectors[0, :100])


def test_numbers_become_json_a_table_and_pictures(tmp_path):
    main = walk(30, 50)
    still = estimate_locality(
        gradients_of(main[:1].repeat(30, 0), main[:1].repeat(30, 0)), windows=(1, 2), lags=(1, 2)
    )
    moving = estimate_locality(gradients_of(main, main), windows=(1, 2), lags=(1, 2))
    values = json.loads(json.dumps([still.to_json(), moving.to_json()], allow_nan=False))
    assert values[0]["best_bound"] is None
    assert values[1]["windows"]["2"]["bias"] == moving.windows[2].bias
    table = locality_table([still, moving])
    assert table.count("street") == 2
    files = plot_locality(moving, tmp_path)
    assert all(file.stat().st_size > 5000 for file in files)
