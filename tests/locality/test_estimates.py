"""Terms of the theory, from gradients whose laws are known, against loops and closed forms."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from ttt_video.errors import UserError
from ttt_video.locality import Gradients, estimate_locality
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
    scale = (main**2).sum() / (main * recon).sum()
    assert found.scale == pytest.approx(scale, rel=1e-9)
    assert found.main_norm**2 == pytest.approx((main**2).sum(1).mean(), rel=1e-9)
    assert found.cosine == pytest.approx(cosine_of(main, recon), rel=1e-9)
    delta = main - scale * recon
    assert (delta * main).sum() == pytest.approx(0, abs=1e-8)
    sigma2 = delta.var(0, ddof=1).sum()
    offset = (delta.mean(0) ** 2).sum() - sigma2 / 9
    assert found.sigma2 == pytest.approx(sigma2, rel=1e-9)
    assert found.offset == pytest.approx(max(0, offset), rel=1e-9)
    unit = (recon**2).sum(1).mean()
    for d in LAGS:
        for drift, x, one in ((found.drift, main, 1), (found.recon_drift, recon, unit)):
            wanted = math.sqrt(((x[d:] - x[:-d]) ** 2).sum(1).mean() / one)
            assert drift[d] == pytest.approx(wanted, rel=1e-9)
    assert found.beta_eta == found.drift[1]
    for k in WINDOWS:
        places = range(max(WINDOWS) - 1, 9)
        now = main[list(places)]
        mean_main, mean_recon = (
            np.stack([x[t - k + 1 : t + 1].mean(0) for t in places]) for x in (main, recon)
        )
        terms = found.windows[k]
        bias = ((mean_main - now) ** 2).sum(1).mean()
        assert terms.bias == pytest.approx(bias, rel=1e-9, abs=1e-12)
        variance = ((mean_main - scale * mean_recon) ** 2).sum(1).mean() - max(0, offset)
        assert terms.variance == pytest.approx(variance, rel=1e-9)
        assert terms.cosine == pytest.approx(cosine_of(mean_recon, now), rel=1e-9)
        bound = k**2 * found.beta_eta**2 + sigma2 / k
        assert terms.bound == pytest.approx(bound, rel=1e-9)
    assert found.best_cosine == max(WINDOWS, key=lambda k: found.windows[k].cosine)


def test_a_shuffled_window_is_the_mean_over_all_choices_of_other_frames():
    main = walk(9, 40)
    recon = main - np.random.default_rng(8).normal(size=main.shape) / 6
    found = estimate_locality(gradients_of(main, recon), windows=WINDOWS, lags=LAGS)
    for k in WINDOWS:
        windows = [
            (t, recon[[t, *others]].mean(0))
            for t in range(max(WINDOWS) - 1, 9)
            for others in itertools.combinations([i for i in range(9) if i != t], k - 1)
        ]
        now = main[[t for t, _ in windows]]
        wanted = cosine_of(np.stack([mean for _, mean in windows]), now)
        assert found.windows[k].shuffled_cosine == pytest.approx(wanted, rel=1e-9)
    assert found.windows[1].shuffled_cosine == pytest.approx(found.windows[1].cosine, rel=1e-9)


def cosine_of(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the cosine over all frames together."""
    return float((left * right).sum() / math.sqrt((left**2).sum() * (right**2).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("sigma2", [1.0, 100.0])
def test_noise_between_the_tasks_is_found_however_large(sigma2):
    """grad l_m stands still and grad l_s is it less delta: the third assumption and no drift."""
    rng = np.random.default_rng(6)
    main = np.repeat(rng.normal(size=(1, 4000)) / math.sqrt(4000), 400, 0)
    delta = math.sqrt(sigma2 / 4000) * rng.normal(size=main.shape)
    found = estimate_locality(gradients_of(main, main - delta), windows=(1, 4, 16), lags=(1, 2))
    assert found.scale == pytest.approx(1, rel=0.1)
    assert found.cosine == pytest.approx(1 / math.sqrt(1 + sigma2), rel=0.1)
    assert found.sigma2 == pytest.approx(sigma2, rel=0.1)
    assert found.offset == pytest.approx(0, abs=0.03 * sigma2)
    for k, terms in found.windows.items():
        assert terms.cosine == pytest.approx(1 / math.sqrt(1 + sigma2 / k), rel=0.1)
        assert terms.variance == pytest.approx(sigma2 / k, rel=0.15)
    assert found.best_cosine == 16


def test_a_constant_difference_is_an_offset_and_no_variance():
    main = walk(60, 2000)
    apart = np.random.default_rng(7).normal(size=(1, 2000)) / math.sqrt(2000)
    found = estimate_locality(gradients_of(main, main + apart), windows=(1, 4), lags=(1, 2))
    assert found.offset == pytest.approx(1, rel=0.1)
    assert all(abs(terms.variance) < 0.1 for terms in found.windows.values())


def test_gradients_that_oppose_each_other_have_no_scale():
    main = walk(30, 200)
    found = estimate_locality(gradients_of(main, -main), windows=(1, 2), lags=(1, 2))
    assert found.cosine == pytest.approx(-1)
    assert found.scale is found.sigma2 is found.best_bound is found.windows[2].bound is None
    assert "-1.000" in locality_table([found])


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
        assert noisy.windows[k].bias == pytest.approx(quiet.windows[k].bias, abs=0.5)
        assert noisy.windows[k].variance == pytest.approx(quiet.windows[k].variance, abs=0.5)
        for name in ("cosine", "shuffled_cosine"):
            quiet_cosine = getattr(quiet.windows[k], name)
            assert getattr(noisy.windows[k], name) == pytest.approx(quiet_cosine, abs=0.02)


def test_a_length_that_the_draws_hide_gives_no_cosine(tmp_path):
    """The last frames' draws of grad l_s are opposite, so its squared length there is below 0."""
    main = np.ones((2, 6, 2))
    recon = np.ones((2, 6, 2))
    recon[1, 3:] = -1.0
    video = Gradients("street", main, recon, np.ones(6), np.ones(6))
    with pytest.raises(UserError, match="l_s is nothing but noise"):
        estimate_locality(video, windows=(1, 4), lags=(1, 2))
    recon[:, :3] *= 5.0
    found = estimate_locality(video, windows=(1, 4), lags=(1, 2))
    assert found.windows[1].cosine is None
    # Means over 4 frames end at frames 3, 4 and 5: (15 +- 1) / 4, (10 +- 2) / 4, (5 +- 3) / 4.
    square = (14 * 16 + 8 * 12 + 2 * 8) / 16 / 3
    assert found.windows[4].cosine == pytest.approx(10 / 4 / math.sqrt(square))
    assert found.best_cosine == 4
    assert "e+" not in locality_table([found])
    assert all(file.is_file() for file in plot_locality(found, tmp_path))
    recon[0], recon[1] = 1.0, -1.0
    recon[:, 0] = 3.0
    hidden = estimate_locality(video, windows=(1, 2), lags=(1, 2))
    assert hidden.best_cosine is None
    assert "| street | 6" in locality_table([hidden])


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
        assert terms.variance == pytest.approx(6 / k, rel=0.2)
        assert terms.bias == pytest.approx((k - 1) * (2 * k - 1) / (6 * k), rel=0.1, abs=0.02)
        assert terms.bias <= k**2 * found.beta_eta**2
    assert found.best_cosine == 4


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
    with pytest.raises(UserError, match="gradient of l_s is nothing but noise"):
        estimate_locality(gradients_of(main, 0 * main), windows=(1, 2), lags=(1, 2))
    with pytest.raises(UserError, match="gradient of l_m is nothing but noise"):
        estimate_locality(gradients_of(0 * main, main), windows=(1, 2), lags=(1, 2))


def test_numbers_become_json_a_table_and_pictures(tmp_path):
    main = walk(30, 50)
    still = estimate_locality(
        gradients_of(main[:1].repeat(30, 0), main[:1].repeat(30, 0)), windows=(1, 2), lags=(1, 2)
    )
    moving = estimate_locality(gradients_of(main, main), windows=(1, 2), lags=(1, 2))
    values = json.loads(json.dumps([still.to_json(), moving.to_json()], allow_nan=False))
    assert values[0]["best_unlabelled"] is None  # nothing drifts
    assert values[1]["windows"]["2"]["bias"] == moving.windows[2].bias
    table = locality_table([still, moving])
    assert table.count("street") == 2
    files = plot_locality(moving, tmp_path)
    assert all(file.stat().st_size > 5000 for file in files)
